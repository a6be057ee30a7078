"""Bad input of the ops: refused with what was got, what is needed and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKENDS

import poolformer_kernels as pk

X = torch.randn(2, 8, 5, 4)
V = torch.ones(8)
W1, W2 = torch.ones(16, 8), torch.ones(8, 16)
MLP = {
    "x": X,
    "norm_weight": V,
    "norm_bias": V,
    "fc1_weight": W1,
    "fc1_bias": torch.ones(16),
    "fc2_weight": W2,
    "fc2_bias": V,
    "layer_scale": V,
}
MIXER = {"x": X, "norm_weight": V, "norm_bias": V, "layer_scale": V}
NORM = {"x": X, "weight": V, "bias": V}

BAD_X = [
    ({"x": X[0]}, ValueError, r"x has shape \(8, 5, 4\); it has to be \(B, C, H, W\)"),
    ({"x": X.long()}, TypeError, "x is torch.int64; it has to be float32"),
    ({"x": X.numpy()}, TypeError, "x is a ndarray; it has to be a torch.Tensor"),
    ({"x": X[:, :, :0]}, ValueError, "C, H and W have to be at least 1"),
    ({"num_groups": 3}, ValueError, "num_groups is 3; .* divides the 8 channels"),
    ({"num_groups": 0}, ValueError, "num_groups is 0"),
    ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ({"eps": float("nan")}, ValueError, "eps is nan"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu'; it has to be one of 'auto', 'torch'"),
    ({"stats": torch.ones(2, 1, 3)}, ValueError, r"stats has shape .* needs \(2, 1, P, 3\)"),
    ({"stats": torch.ones(2, 1, 0, 3)}, ValueError, r"stats has shape .* needs \(2, 1, P, 3\)"),
    ({"stats": torch.ones(2, 1, 1, 3).double()}, TypeError, "stats is torch.float64 on cpu"),
]
BAD_MIXER = [
    ({"x": X[:, :4]}, ValueError, r"norm_weight has shape \(8,\); x of shape .* needs \(4,\)"),
    ({"pool_size": 2}, ValueError, "pool_size is 2; it has to be an odd positive int"),
    ({"pool_size": 3.0}, ValueError, "pool_size is 3.0"),
    ({"norm_weight": V.double()}, TypeError, "norm_weight is torch.float64 and x is torch.float32"),
    ({"layer_scale": torch.ones(8, 1, 1)}, ValueError, "layer_scale has shape"),
    ({"layer_scale": 1e-5}, TypeError, "layer_scale is a float"),
    ({"layer_scale": V.to("meta")}, ValueError, "layer_scale is on meta and x is on cpu"),
    ({"drop_path": torch.ones(3)}, ValueError, r"drop_path has shape \(3,\).* needs \(2,\)"),
    ({"drop_path": torch.ones(2).half()}, TypeError, "drop_path is torch.float16"),
    ({"drop_path": torch.ones(2, requires_grad=True)}, ValueError, "drop_path.detach()"),
]
BAD_MLP = [
    ({"act": "swish"}, ValueError, "act is 'swish'; it has to be one of 'gelu'"),
    ({"act": 3}, TypeError, "act is a int"),
    ({"fc1_weight": torch.ones(16, 9)}, ValueError, r"fc1_weight has shape \(16, 9\)"),
    ({"fc1_weight": torch.ones(16)}, ValueError, r"fc1_weight has shape \(16,\)"),
    ({"fc1_weight": torch.ones(16, 8, 3, 3)}, ValueError, r"needs \(16, 8, 1, 1\)"),
    ({"fc1_weight": torch.ones(0, 8)}, ValueError, "hidden >= 1"),
    ({"fc2_weight": torch.ones(8, 15)}, ValueError, r"fc2_weight has shape .* needs \(8, 16\)"),
    ({"fc1_weight": None}, TypeError, "fc1_weight is a NoneType"),
    ({"fc1_bias": torch.ones(8)}, ValueError, r"fc1_bias has shape \(8,\).* needs \(16,\)"),
    ({"fc2_weight": W2.half()}, TypeError, "fc2_weight is torch.float16"),
    ({"hidden_drop_path": torch.ones(3)}, ValueError, "hidden_drop_path has shape"),
]
CASES = [
    *(("pool_mixer", MIXER, *bad) for bad in BAD_X + BAD_MIXER),
    *(("mlp", MLP, *bad) for bad in BAD_X + BAD_MLP),
    *(("group_norm", NORM, *bad) for bad in BAD_X),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "good", "bad", "error", "message"), CASES)
def test_refused(
    op: str, good: dict[str, Any], bad: dict[str, Any], error: type, message: str, backend: str
) -> None:
    function = getattr(pk, op)
    function(**good, backend=backend)
    with pytest.raises(error, match=message) as raised:
        function(**{**good, "backend": backend, **bad})
    assert str(raised.value).startswith((op, "backend"))
