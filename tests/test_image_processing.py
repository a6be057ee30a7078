"""The image processor: equal to transformers' on photographs, and every kind of image it takes."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from poolformer_kernels.models.poolformer.image_processing import (
    BatchFeature,
    PoolFormerFeatureExtractor,
    PoolFormerImageProcessor,
)

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def pattern(height: int, width: int, channels: int = 3, dtype: str = "uint8") -> np.ndarray:
    """Smooth waves with noise, in the dtype's own range."""
    generator = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + c)) * np.cos(y / (9 - c)) for c in range(channels)]
    unit = 0.5 + 0.35 * np.stack(waves, -1) + 0.1 * generator.uniform(-1, 1, (height, width, 1))
    return unit.astype(dtype) if dtype.startswith("float") else (unit * 255).astype(dtype)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    datasets = pytest.importorskip("sklearn.datasets")
    data = pytest.importorskip("skimage.data")
    images = datasets.load_sample_images().images  # china, flower
    images += [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return [Image.fromarray(image) for image in images]


@pytest.fixture(scope="module")
def theirs():
    module = pytest.importorskip("transformers.models.poolformer.image_processing_pil_poolformer")
    return module.PoolFormerImageProcessorPil


def same(ours: BatchFeature, theirs) -> None:
    got, expected = np.stack(ours["pixel_values"]), np.stack(theirs["pixel_values"])
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.astype("float64"), expected, rtol=0, atol=1e-6)


OPTIONS = {
    "default": {},
    "crop 0.95": {"crop_pct": 0.95},
    "size 384": {"size": 384, "crop_size": 384, "crop_pct": 1.0},
    "square": {"size": {"height": 200, "width": 200}, "crop_size": 160},
    "oblong": {"size": {"height": 150, "width": 260}, "crop_size": (140, 97)},
    "pair": {"size": (181, 97), "do_center_crop": True, "crop_size": {"height": 99, "width": 64}},
    "padded": {"size": 64, "crop_size": {"height": 111, "width": 150}},
    "padded one way": {"size": 101, "crop_size": (150, 33)},
    "odd crop": {"crop_size": 223},
    "bilinear": {"resample": 2},
    "lanczos": {"resample": Image.Resampling.LANCZOS, "crop_pct": 0.875},
    "nearest": {"resample": 0},
    "no resize": {"do_resize": False, "crop_size": (333, 700)},
    "no rescale": {"do_rescale": False},
    "no normalize": {"do_normalize": False},
    "bytes only": {"do_rescale": False, "do_normalize": False},
    "factor": {"rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.6], "image_std": [1, 2, 3]},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_transformers_on_photographs(photographs, theirs, options):
    ours, reference = PoolFormerImageProcessor(**options), theirs(**options)
    for image in photographs:
        same(ours(image), reference(image))
    call_time = PoolFormerImageProcessor()(photographs[:2], return_tensors="np", **options)
    np.testing.assert_array_equal(call_time["pixel_values"], ours(photographs[:2])["pixel_values"])


@pytest.mark.parametrize("crop_pct", [None, 0.7, 0.95, 1.3])
@pytest.mark.parametrize("size", [31, (40, 40), (33, 47)])
def test_equals_transformers_on_odd_shapes(theirs, crop_pct, size):
    """Shapes around the crop, thin ones, one pixel: each end of the padding and cropping rules."""
    for shape in [(31, 31), (32, 31), (7, 45), (45, 8), (1, 1), (3, 5), (63, 61)]:
        image = Image.fromarray(pattern(*shape))
        options = {"size": size, "crop_size": (33, 32)}
        reference = theirs(**options)
        reference.crop_pct = crop_pct  # its constructor takes None for the default
        same(PoolFormerImageProcessor()(image, crop_pct=crop_pct, **options), reference(image))


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_equals_transformers_on_arrays_and_tensors(theirs, dtype, layout):
    image = pattern(120, 91, dtype="uint8").astype(dtype)
    image = image / image.dtype.type(255) if dtype.startswith("float") else image
    image = image.transpose(2, 0, 1).copy() if layout == "channels_first" else image
    options = {"do_rescale": not dtype.startswith("float"), "size": 96, "crop_size": 90}
    for resize in (True, False):
        expected = theirs(**options)(image, do_resize=resize)
        processor = PoolFormerImageProcessor(**options)
        for given in (image, torch.from_numpy(image), [image], [[image]], image[None]):
            same(processor(given, do_resize=resize), expected)
        same(processor(image, do_resize=resize, input_data_format=layout), expected)


def test_equals_transformers_on_grey_palette_and_transparent_images(theirs):
    photo = Image.fromarray(pattern(120, 91))
    alpha = Image.fromarray(pattern(120, 91, 1)[..., 0])
    transparent = photo.copy()
    transparent.putalpha(alpha)
    grey_alpha = transparent.convert("LA")
    palette = photo.quantize(64)
    with_hole = palette.copy()
    with_hole.info["transparency"] = 3
    pictures = [photo.convert(mode) for mode in ("L", "1", "CMYK", "YCbCr", "HSV")]
    for picture in [*pictures, palette, with_hole, transparent, grey_alpha]:
        same(
            PoolFormerImageProcessor()(picture, size=96, crop_size=90),
            theirs()(picture, size=96, crop_size=90, do_convert_rgb=True),
        )
    array = np.asarray(transparent)
    for given in (array, (array / 255).astype("float32"), array[..., :1]):
        options = {"size": 96, "crop_size": 90, "do_rescale": given.dtype == np.uint8}
        same(
            PoolFormerImageProcessor()(given, **options),
            theirs()(given, do_convert_rgb=True, **options),
        )


def bare(image, **options) -> np.ndarray:
    """The image's own pixels: no resize, crop, rescale or normalisation."""
    off = {f"do_{step}": False for step in ("resize", "center_crop", "rescale", "normalize")}
    return PoolFormerImageProcessor(**off)(image, data_format="channels_last", **options)[
        "pixel_values"
    ][0]


def test_sixteen_bit_images_are_scaled_not_clipped():
    wide = np.array([[0, 128, 129, 257 * 77, 257 * 254, 65535]], dtype=np.uint16)
    expected = np.array([0, 0, 1, 77, 254, 255], dtype=np.uint8)
    swapped = Image.fromarray(wide)  # a 16-bit PNG comes back as I;16, as I in older Pillow
    stored = io.BytesIO()
    swapped.save(stored, "PNG")
    big_endian = Image.frombytes("I;16B", (6, 1), wide.astype(">u2").tobytes())
    for image in (wide, wide.astype(">u2"), torch.from_numpy(wide), swapped, big_endian):
        np.testing.assert_array_equal(bare(image)[0, :, 0], expected)
    np.testing.assert_array_equal(bare(stored.getvalue())[0, :, 2], expected)
    np.testing.assert_array_equal(bare(Image.fromarray(wide.astype(np.int32)))[0, :, 1], expected)
    colour = np.repeat(wide.reshape(2, 3, 1), 3, -1)
    np.testing.assert_array_equal(bare(colour)[..., 0].ravel(), expected)


def test_one_bit_and_boolean_images_are_black_and_white():
    mask = np.array([[True, False, True]] * 2)
    for image in (mask, torch.from_numpy(mask), Image.fromarray(mask)):
        np.testing.assert_array_equal(bare(image)[0, :, 1], [255, 0, 255])


def test_alpha_is_composited_onto_white():
    pixels = [[10, 20, 30, 0], [10, 20, 30, 255], [0, 100, 200, 51]]
    colour = np.array([pixels] * 5, dtype=np.uint8)
    expected = [[255, 255, 255], [10, 20, 30], [204, 224, 244]]
    for image in (colour, torch.from_numpy(colour), Image.fromarray(colour)):
        np.testing.assert_array_equal(bare(image)[0], expected)
    grey = np.array([[[0, 0], [7, 255]]], dtype=np.uint8)
    image = bare(grey, input_data_format="channels_last")
    np.testing.assert_array_equal(image[0], [[255] * 3, [7] * 3])
    clear = Image.fromarray(pattern(9, 8, 4)).quantize(16)  # a palette whose colours have alpha
    assert (clear.mode, clear.palette.mode) == ("P", "RGBA")
    np.testing.assert_array_equal(bare(clear), bare(clear.convert("RGBA")))
    # LAB has a band named A that is no alpha.
    assert bare(Image.new("LAB", (2, 2), (0, 128, 128))).max() < 5


def test_own_channels_are_kept_on_request():
    grey = Image.fromarray(pattern(60, 50)).convert("L")
    options = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}
    values = PoolFormerImageProcessor(**options)(grey, return_tensors="pt").pixel_values
    assert values.shape == (1, 1, 224, 224)
    with pytest.raises(ValueError, match=r"image_mean has 3 entries, the image has 1 channels"):
        PoolFormerImageProcessor(do_convert_rgb=False)(grey)


def test_files_and_bytes_are_decoded_and_turned_upright(tmp_path):
    picture = Image.fromarray(pattern(40, 60))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    picture.save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", str(tmp_path / "turned.png")):
        np.testing.assert_array_equal(bare(source), np.asarray(picture.transpose(4)))
    np.testing.assert_array_equal(
        bare((tmp_path / "turned.png").read_bytes()), np.asarray(picture.transpose(4))
    )


def test_batches_of_every_nesting_give_the_same_order():
    arrays = [pattern(30, 40), pattern(41, 29), pattern(50, 50)]
    processor = PoolFormerImageProcessor(size=32, crop_size=32)
    expected = processor(arrays, return_tensors="np").pixel_values
    pictures = [Image.fromarray(array) for array in arrays]
    mixed = [pictures[0], torch.from_numpy(arrays[1]), arrays[2]]
    for images in (pictures, tuple(arrays), mixed, [[arrays[0]], arrays[1:]]):
        np.testing.assert_array_equal(processor(images)["pixel_values"], expected)
    stacked = np.stack([arrays[2]] * 2)
    batch = processor([stacked, torch.from_numpy(stacked).permute(0, 3, 1, 2)])["pixel_values"]
    np.testing.assert_array_equal(batch, np.stack([expected[2]] * 4))


def test_tensors_half_and_sliced():
    image = torch.from_numpy(pattern(32, 32).astype("float32") / 255)
    processor = PoolFormerImageProcessor(do_resize=False, do_rescale=False, crop_size=32)
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        got = processor(image.to(dtype), return_tensors="pt").pixel_values
        torch.testing.assert_close(
            got, processor(image, return_tensors="pt").pixel_values, rtol=0, atol=tolerance
        )
    flipped = pattern(32, 32)[::-1, ::-1]  # negative strides
    np.testing.assert_array_equal(bare(flipped), flipped)


def test_batch_feature():
    batch = PoolFormerImageProcessor()(pattern(30, 30), return_tensors="pt")
    assert list(batch) == ["pixel_values"] and batch.pixel_values is batch["pixel_values"]
    assert batch.pixel_values.is_contiguous() and batch.pixel_values.dtype == torch.float32
    first = batch.pixel_values
    assert batch.to(torch.bfloat16) is batch and batch.pixel_values.dtype == torch.bfloat16
    assert batch.to("cpu", torch.float64).pixel_values.dtype == torch.float64
    whole = BatchFeature(labels=torch.tensor([1]), name="x").to(dtype=torch.float16)
    assert whole.labels.dtype == torch.int64 and whole.name == "x"
    with pytest.raises(AttributeError, match="the keys are"):
        _ = batch.logits
    last = PoolFormerImageProcessor()(
        pattern(30, 30), return_tensors="pt", data_format="channels_last"
    )
    assert torch.equal(last.pixel_values.permute(0, 3, 1, 2), first)


def test_configs_are_read_by_transformers_and_theirs_by_us(theirs, tmp_path):
    options = {"size": 300, "crop_pct": 0.95, "crop_size": (96, 128), "resample": 2}
    image = Image.fromarray(pattern(90, 130))
    PoolFormerImageProcessor(**options).save_pretrained(tmp_path / "ours")
    theirs(**options).save_pretrained(tmp_path / "theirs")
    files = [json.loads((tmp_path / d / "preprocessor_config.json").read_text())
             for d in ("ours", "theirs")]  # fmt: skip
    assert files[0] == files[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = PoolFormerImageProcessor.from_pretrained(tmp_path / "theirs")
    same(ours(image), theirs.from_pretrained(tmp_path / "ours")(image))
    auto = pytest.importorskip("transformers").AutoImageProcessor
    same(ours(image), auto.from_pretrained(tmp_path / "ours", use_fast=False, backend="pil")(image))


def test_configs_of_feature_extractors_are_read(tmp_path):
    old = {
        "crop_pct": 0.95,
        "do_normalize": True,
        "do_resize_and_center_crop": True,
        "feature_extractor_type": "PoolFormerFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 192,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    processor = PoolFormerImageProcessor.from_pretrained(tmp_path, image_mean=[0.5, 0.5, 0.5])
    assert processor.size == {"shortest_edge": 192} and processor.do_center_crop
    assert processor.crop_size == {"height": 192, "width": 192}
    assert (processor.crop_pct, processor.image_mean) == (0.95, [0.5, 0.5, 0.5])
    file = tmp_path / "preprocessor_config.json"
    assert PoolFormerImageProcessor.from_pretrained(file).image_mean == old["image_mean"]
    file.write_text(json.dumps({**old, "do_flip": True}))
    with pytest.warns(UserWarning, match=r"keys without meaning here: \['do_flip'\]"):
        PoolFormerImageProcessor.from_pretrained(tmp_path)


def test_saving_and_reading_keeps_every_option(tmp_path):
    changed = PoolFormerImageProcessor(
        do_resize=False, size=(3, 4), crop_pct=None, resample=1, do_center_crop=False, crop_size=9,
        rescale_factor=0.5, do_rescale=False, do_normalize=False, image_mean=1.0, image_std=[2.0],
        do_convert_rgb=False,
    )  # fmt: skip
    assert changed.save_pretrained(tmp_path) == [str(tmp_path / "preprocessor_config.json")]
    again = PoolFormerImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == changed.to_dict() and repr(again) == repr(changed)
    kept = changed.to_dict().items() & PoolFormerImageProcessor().to_dict().items()
    assert dict(kept) == {"image_processor_type": "PoolFormerImageProcessor"}


def test_feature_extractor_is_deprecated():
    with pytest.warns(FutureWarning, match="use PoolFormerImageProcessor"):
        old = PoolFormerFeatureExtractor(size=64)
    assert isinstance(old, PoolFormerImageProcessor) and old.size == {"shortest_edge": 64}


def test_attributes_may_be_changed_and_are_checked_on_use():
    processor = PoolFormerImageProcessor()
    processor.size = 50
    processor.crop_size = 40
    assert processor(pattern(60, 80), return_tensors="np").pixel_values.shape == (1, 3, 40, 40)
    processor.crop_pct = 0
    with pytest.raises(ValueError, match="crop_pct is 0"):
        processor(pattern(60, 80))


def test_scaled_floats_warn_and_ambiguous_layouts_warn():
    unit = pattern(30, 30, dtype="float32")
    with pytest.warns(UserWarning, match="pass do_rescale=False"):
        PoolFormerImageProcessor()(unit)
    with pytest.warns(UserWarning, match="both ends of the shape"):
        PoolFormerImageProcessor()(pattern(3, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PoolFormerImageProcessor()(unit, do_rescale=False)
        PoolFormerImageProcessor()(np.zeros((30, 30, 3), "float32"))  # black, in whole numbers
        PoolFormerImageProcessor()(pattern(3, 30), input_data_format="channels_last")
