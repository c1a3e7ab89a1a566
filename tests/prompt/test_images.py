"""The image processor: settings, kinds of input, and the two ways to normalise."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, Llama4Processor

from llama4lab.prompt import pixels
from llama4lab.prompt.images import ImageProcessor

ROTATED = 6  # EXIF: turn by 90 degrees clockwise to see it upright


def values_of(processor, image, **settings) -> torch.Tensor:
    return processor(image, return_tensors="pt", **settings)["pixel_values"]


def test_settings_are_those_of_published_checkpoints_by_default():
    processor = ImageProcessor()
    assert dict(processor.size) == {"height": 336, "width": 336}
    assert (processor.max_patches, processor.resize_to_max_canvas, processor.normalize) == (16, False, "hf")


def test_tiles_come_in_bfloat16_between_minus_one_and_one_with_the_global_tile_last(noise):
    made = ImageProcessor(size=48, max_patches=4)(noise(60, 130), return_tensors="pt")
    assert made["pixel_values"].shape == (4, 3, 48, 48)
    assert made["pixel_values"].dtype == torch.bfloat16
    assert made["pixel_values"].abs().max() <= 1
    assert made["aspect_ratios"].tolist() == [[1, 3]]


def test_black_fills_the_canvas_right_and_below():
    white = Image.new("RGB", (24, 48), "white")
    tile = values_of(ImageProcessor(size=48), white)[0]
    assert (tile[:, :, :24] == 1).all()
    assert (tile[:, :, 24:] == -1).all()


def test_tiles_run_row_by_row():
    rows = [["red", "lime"], ["blue", "white"]]
    image = Image.new("RGB", (96, 96))
    for row, colours in enumerate(rows):
        for col, colour in enumerate(colours):
            image.paste(colour, (48 * col, 48 * row, 48 * col + 48, 48 * row + 48))
    tiles = values_of(ImageProcessor(size=48, max_patches=4), image)
    seen = [tile[:, 24, 24].tolist() for tile in tiles[:4]]
    assert seen == [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]]


def test_images_of_several_sizes_keep_their_order(noise):
    processor, images = ImageProcessor(size=48), [noise(60, 130), noise(20, 20, seed=1), noise(60, 130, seed=2)]
    together = processor(images, return_tensors="pt")
    alone = [values_of(processor, image) for image in images]
    assert torch.equal(together["pixel_values"], torch.cat(alone))
    assert together["aspect_ratios"].tolist() == [[2, 3], [1, 1], [2, 3]]


def test_without_return_tensors_each_image_has_its_own_tiles(noise):
    made = ImageProcessor(size=48)([noise(60, 130), noise(20, 20)])
    assert [len(tiles) for tiles in made["pixel_values"]] == [7, 1]


def test_arrays_and_tensors_give_what_the_pil_image_gives(noise):
    processor, image = ImageProcessor(size=48), noise(60, 130)
    array = np.array(image)
    expected = values_of(processor, image)
    assert torch.equal(values_of(processor, array), expected)
    assert torch.equal(values_of(processor, torch.from_numpy(array).permute(2, 0, 1)), expected)
    assert torch.equal(values_of(processor, array, input_data_format="channels_last"), expected)


def test_grey_arrays_are_spread_over_the_three_channels(noise):
    grey = noise(60, 50, "L")
    expected = values_of(ImageProcessor(size=48), grey)
    assert torch.equal(values_of(ImageProcessor(size=48), np.array(grey)[..., None]), expected)


def test_what_is_transparent_is_laid_on_white():
    clear = Image.new("RGBA", (48, 48), (255, 0, 0, 0))
    assert (values_of(ImageProcessor(size=48), clear) == 1).all()
    assert (values_of(ImageProcessor(size=48), np.array(clear)) == 1).all()
    marked = Image.new("RGB", (48, 48), "red")
    marked.info["transparency"] = (255, 0, 0)
    assert (values_of(ImageProcessor(size=48), marked) == 1).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_path_is_turned_upright_and_a_pil_image_is_not(noise, tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    path = tmp_path / f"turned.{suffix}"
    noise(40, 90).save(path, exif=exif)
    processor = ImageProcessor(size=48)
    with Image.open(path) as stored:
        as_stored, upright = stored.copy(), ImageOps.exif_transpose(stored)
    assert torch.equal(values_of(processor, str(path)), values_of(processor, upright))
    assert torch.equal(values_of(processor, path), values_of(processor, upright))
    assert processor(as_stored, return_tensors="pt")["aspect_ratios"].tolist() == [[1, 2]]
    assert processor(str(path), return_tensors="pt")["aspect_ratios"].tolist() == [[2, 1]]


def test_a_path_to_a_transparent_image_drops_the_transparency(tmp_path):
    """As transformers does, which opens files as RGB; a PIL image of the same file is laid on white."""
    path = tmp_path / "clear.png"
    Image.new("RGBA", (48, 48), (255, 0, 0, 0)).save(path)
    assert (values_of(ImageProcessor(size=48), str(path))[0, 0] == 1).all()
    assert (values_of(ImageProcessor(size=48), str(path))[0, 1] == -1).all()


def test_the_two_normalisations_differ_by_at_most_one_and_a_half_grey_levels(noise):
    processor, image = ImageProcessor(size=48), noise(100, 130)
    hf, meta = values_of(processor, image), values_of(processor, image, normalize="meta")
    assert meta.dtype == torch.bfloat16
    difference = (hf.float() - meta.float()).abs().max()
    assert 0 < difference <= 1.5 * 2 / 255


def test_meta_values_are_rounded_once():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    meta = values_of(ImageProcessor(size=16, normalize="meta"), levels)
    exact = (levels.float() / 255 - 0.5) / 0.5
    assert torch.equal(meta[0], exact.bfloat16())
    hf = values_of(ImageProcessor(size=16), levels)
    assert (hf[0] != meta[0]).float().mean() > 0.4, "transformers rounds at every step"


def test_resizing_without_the_uint8_kernel_is_off_by_one_level_at_most(noise, monkeypatch):
    processor, image = ImageProcessor(size=48, do_normalize=False, do_rescale=False), noise(211, 97)
    monkeypatch.setattr(pixels, "computes_in_uint8", lambda device: True)
    native = values_of(processor, image).int()
    monkeypatch.setattr(pixels, "computes_in_uint8", lambda device: False)
    through_float = values_of(processor, image).int()
    assert (native - through_float).abs().max() <= 1


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("width", [1, 3])
def test_a_thin_image_keeps_what_changes_along_its_height(monkeypatch, native, width):
    """torch's own resize of it gives one colour everywhere, except on CPUs with AVX in uint8."""
    monkeypatch.setattr(pixels, "computes_in_uint8", lambda device: native)
    ramp = torch.arange(200, dtype=torch.uint8).view(1, 200, 1).repeat(3, 1, width)
    column = pixels.resized(ramp, (50, 1))[0, :, 0].float()
    torch.testing.assert_close(column, torch.arange(50) * 4 + 1.5, atol=1.0, rtol=0)


def test_switching_normalisation_off_gives_bytes_and_rescaling_alone_gives_fractions(noise):
    raw = values_of(ImageProcessor(size=48), noise(48, 48), do_normalize=False, do_rescale=False)
    scaled = values_of(ImageProcessor(size=48), noise(48, 48), do_normalize=False)
    assert raw.dtype == torch.uint8
    torch.testing.assert_close(scaled, raw / 255)


def test_saved_settings_are_read_back_and_name_the_class_of_transformers(tmp_path):
    ImageProcessor(size=48, max_patches=4, normalize="meta").save_pretrained(tmp_path)
    again = ImageProcessor.from_pretrained(tmp_path)
    assert (dict(again.size), again.max_patches, again.normalize) == ({"height": 48, "width": 48}, 4, "meta")
    ImageProcessor(size=48).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "Llama4ImageProcessor"
    assert "normalize" not in stored, "transformers would take it for its method of that name"


def test_it_serves_inside_the_processor_of_transformers(tiny_folder, image_processor, noise):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    processor: Any = Llama4Processor(image_processor=image_processor, tokenizer=tokenizer, patch_size=6)
    made = processor(text="<|image|>What is this?", images=noise(60, 130), return_tensors="pt")
    assert made["pixel_values"].shape == (4, 3, 48, 48)
    assert (made["input_ids"] == tokenizer.convert_tokens_to_ids("<|patch|>")).sum() == 4 * 16


def test_the_images_given_are_left_as_they_were(noise):
    image = noise(60, 130)
    before = np.array(image)
    tensor = torch.from_numpy(before.copy()).permute(2, 0, 1)
    values_of(ImageProcessor(size=48), image)
    values_of(ImageProcessor(size=48), tensor)
    assert np.array_equal(np.array(image), before)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), before)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"normalize": "none"}, "normalize is 'hf'"),
        ({"max_patches": 0}, "at least 1, not 0"),
        ({"size": {"height": 48, "width": 50}}, "Tiles are square"),
        ({"do_resize": False}, "cannot be turned off"),
        ({"do_convert_rgb": False}, "cannot be turned off"),
        ({"do_rescale": False}, "do_normalize needs do_rescale"),
        ({"normalize": "meta", "do_normalize": False}, "always rescales and normalises"),
        ({"resample": 3}, "bilinear"),
    ],
)
def test_a_setting_that_llama_4_does_not_have_is_an_error(noise, settings, text):
    with pytest.raises(ValueError, match=text):
        ImageProcessor()(noise(20, 20), return_tensors="pt", **settings)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.zeros((20, 20, 3), dtype=np.float32), "uint8 values in 0..255"),
        (torch.zeros(3, 20, 20), "uint8 values in 0..255"),
        (np.zeros((20, 20, 2), dtype=np.uint8), "1, 3 or 4 channels"),
        (torch.zeros(5, 20, 20, dtype=torch.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 20, 3), dtype=np.uint8), "1, 3 or 4 channels"),
    ],
)
def test_values_that_are_no_8_bit_image_are_an_error(image, text):
    with pytest.raises(ValueError, match=text):
        ImageProcessor()(image, return_tensors="pt")
