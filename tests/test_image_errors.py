"""The image processor's errors: what was got, what is needed, what to do."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from poolformer_kernels.models.poolformer.image_processing import PoolFormerImageProcessor


def pattern(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def truncated_jpeg() -> bytes:
    stored = io.BytesIO()
    Image.fromarray(pattern(64, 64)).save(stored, "JPEG")
    return stored.getvalue()[:-400]


BAD_IMAGES = {
    "none": (None, TypeError, r"images is no image: got NoneType; pass a PIL image"),
    "number in list": ([pattern(9, 8), 3], TypeError, r"images\[1\] is no image: got int"),
    "object array": (np.array([["a"]]), TypeError, "dtype <U1; pass integers"),
    "complex": (np.zeros((4, 5), complex), TypeError, "dtype complex128"),
    "no images": ([], ValueError, "images is empty"),
    "empty array": (np.zeros((0, 5, 3), "uint8"), ValueError, r"shape \(0, 5, 3\)"),
    "empty picture": (Image.new("RGB", (0, 5)), ValueError, "0 x 5 pixels"),
    "one axis": (np.zeros(5, "uint8"), ValueError, r"shape \(5,\); pass"),
    "five axes": (np.zeros((1, 2, 3, 4, 5), "uint8"), ValueError, "batch with one axis more"),
    "5 channels": (np.zeros((5, 9, 9), "uint8"), ValueError, r"channel count \(1, 3 or 4\)"),
    "over 255": (np.full((4, 5), 256), ValueError, r"values in \[256, 256\]; integer images need"),
    "negative": (np.full((4, 5), -1), ValueError, r"need 0\.\.255"),
    "float over 1": (np.full((9, 9), 1.5), ValueError, r"values in \[1.5, 1.5\]; resizing needs"),
    "not a number": (np.full((9, 9), np.nan), ValueError, "resizing needs"),
    "float alpha": (np.full((9, 9, 4), 200.0), ValueError, "drop the alpha channel"),
    "mixed nesting": ([pattern(9, 8), [pattern(9, 8)]], ValueError, "mixes images and lists"),
    "mixed kinds": ([pattern(9, 8), pattern(9, 8) / 255], ValueError, "mixes integer and floating"),
    "bytes": (b"no image at all", ValueError, "15 bytes cannot be decoded as an image"),
    "truncated": (truncated_jpeg(), ValueError, "cannot be decoded.*truncated"),
    "no file": ("/no/such/file.png", FileNotFoundError, "no image file at '/no/such/file.png'"),
    "address": ("https://example.org/cat.png", ValueError, "download it first"),
    "32-bit": (Image.new("I", (4, 4), 70000), ValueError, 'mode "I" is read as 16-bit'),
    "gradient": (torch.zeros(3, 9, 9, requires_grad=True), ValueError, r"pass image.detach\(\)"),
    "other device": (torch.zeros(3, 9, 9, device="meta"), ValueError, r"on meta; pass image.cpu"),
    "hair": (np.zeros((1, 10**7), "uint8"), ValueError, "would be resized to"),
}


@pytest.mark.parametrize(("image", "error", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        PoolFormerImageProcessor()(image)


def test_corrupt_files_and_lazy_pictures(tmp_path):
    (tmp_path / "half.jpg").write_bytes(truncated_jpeg())
    with pytest.raises(ValueError, match=r"half.jpg' cannot be decoded"):
        PoolFormerImageProcessor()(tmp_path / "half.jpg")
    lazy = Image.open(tmp_path / "half.jpg")
    with lazy, pytest.raises(ValueError, match="JPEG image cannot be decoded"):
        PoolFormerImageProcessor()(lazy)


BAD_OPTIONS = {
    "unknown": ({"crop": 1}, TypeError, r"unknown options \['crop'\]"),
    "size 0": ({"size": 0}, ValueError, "every length must be an integer >= 1"),
    "size keys": ({"size": {"longest_edge": 9}}, ValueError, "size is .*; pass an int"),
    "size text": ({"size": "224"}, ValueError, "size is '224'; pass an int"),
    "crop_size edge": ({"crop_size": {"shortest_edge": 9}}, ValueError, "crop_size is"),
    "crop_pct": ({"crop_pct": -0.9}, ValueError, "crop_pct is -0.9; pass a number > 0"),
    "resample": ({"resample": 9}, ValueError, r"resample is 9; pass one of 0 \(NEAREST\)"),
    "mean": ({"image_mean": "imagenet"}, ValueError, "image_mean is 'imagenet'"),
    "mean of 2": ({"image_mean": [1, 2]}, ValueError, "image_mean has 2 entries"),
    "std 0": ({"image_std": [1, 0, 1]}, ValueError, "no entry may be 0"),
    "factor": ({"rescale_factor": "1/255"}, ValueError, "rescale_factor is '1/255'"),
    "tensors": ({"return_tensors": "tf"}, ValueError, "return_tensors is 'tf'"),
    "layout": ({"data_format": "NHWC"}, ValueError, "data_format is 'NHWC'"),
    "input layout": ({"input_data_format": "CHW"}, ValueError, "input_data_format is 'CHW'"),
    "wrong layout": (
        {"input_data_format": "channels_first"}, ValueError, r"has 9 channels .*channels_first"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys()
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        PoolFormerImageProcessor()(pattern(9, 11), **options)


def test_unequal_shapes_cannot_be_stacked():
    images = [pattern(20, 30), pattern(30, 20)]
    processor = PoolFormerImageProcessor(do_center_crop=False)
    assert [p.shape for p in processor(images)["pixel_values"]] == [(3, 248, 372), (3, 372, 248)]
    with pytest.raises(ValueError, match=r"2 different shapes.*use do_center_crop=True"):
        processor(images, return_tensors="pt")


def test_missing_and_broken_configs(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no preprocessor_config.json; it has: nothing"
    ):
        PoolFormerImageProcessor.from_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"size": ')
    with pytest.raises(ValueError, match="is not valid JSON"):
        PoolFormerImageProcessor.from_pretrained(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list; needed is an object"):
        PoolFormerImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file; pass a folder"):
        PoolFormerImageProcessor().save_pretrained(file)


def test_a_hub_that_cannot_help(tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match="There is no folder 'no/such-model'"):
        PoolFormerImageProcessor.from_pretrained(
            "no/such-model", local_files_only=True, cache_dir=tmp_path / "cache"
        )
    with pytest.raises(FileNotFoundError, match="nor a name that a hub repository can have"):
        PoolFormerImageProcessor.from_pretrained("not a name/of/a/repository")
