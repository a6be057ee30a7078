"""examples.feature_pyramid: backbone, neck and detector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import KERNELS
from model_cases import randomize, tiny_config

import poolformer_kernels as pk

pytest.importorskip("torchvision")
from examples import feature_pyramid


def make() -> feature_pyramid.Pyramid:
    backbone = randomize(pk.PoolFormerBackbone(tiny_config()))
    return feature_pyramid.Pyramid(backbone, out_channels=16).eval()


@pytest.mark.parametrize("backend", KERNELS)
def test_maps_are_those_of_plain_pytorch(backend: str) -> None:
    pyramid, x = make(), torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = pk.accelerate(pyramid, "torch")(x)
        result = pk.accelerate(pyramid, backend)(x)
    assert [tuple(m.shape) for m in result.values()] == [
        (2, 16, 96 // stride, 64 // stride) for stride in (4, 8, 16, 32)
    ]
    for name, truth in expected.items():
        torch.testing.assert_close(result[name], truth, rtol=1e-4, atol=1e-4)


def test_a_detector_trains() -> None:
    model = feature_pyramid.detector(make(), num_classes=3).train()
    assert model.anchor_generator.sizes == ((32,), (64,), (128,), (256,))
    boxes = torch.tensor([[4.0, 4.0, 40.0, 36.0]])
    losses = model([torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.tensor([1])}])
    sum(losses.values()).backward()
    lacking = [n for n, p in model.backbone.named_parameters() if p.grad is None]
    assert not lacking
    model.eval()
    found = model([torch.rand(3, 64, 64)])[0]
    assert found["boxes"].shape[1] == 4


def test_as_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("numpy")
    image.new("RGB", (80, 60), (200, 30, 90)).save(tmp_path / "photo.png")
    assert feature_pyramid.main([str(tmp_path / "photo.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "stride 32: (1, 256, 7, 7)" in lines[3]
    assert feature_pyramid.main([str(tmp_path / "none.png")]) == 2
    assert "none.png" in capsys.readouterr().err
