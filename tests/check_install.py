"""Run with `python -I`, outside the tree: what is installed imports, loads and computes."""

from __future__ import annotations

from pathlib import Path

import torch

import poolformer_kernels
from poolformer_kernels import _extension

TREE = Path(__file__).resolve().parents[1]


def main() -> None:
    package = Path(poolformer_kernels.__file__).resolve().parent
    assert package != TREE / "poolformer_kernels", f"imported from the tree: {package}"
    assert _extension.load() is not None, _extension.why_not()
    record = _extension.build_info()
    assert record is not None and record["cuda"] == torch.version.cuda
    x, weight, bias = torch.randn(2, 8, 7, 5), torch.rand(8), torch.rand(8)
    ours = poolformer_kernels.pool_mixer(x, weight, bias, backend="cpu")
    plain = poolformer_kernels.pool_mixer(x, weight, bias, backend="torch")
    torch.testing.assert_close(ours, plain)
    print(f"{package} works: built for {record['mode']}, with PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
