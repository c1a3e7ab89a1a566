"""Pixel values against golden ones made by transformers' class and by Meta's code, and against transformers directly.

`golden_images.py` made the golden values and says why their digests are the same on every CPU.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llama4lab.prompt import pixels
from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.pixels import meta_rgb_pixels, rgb_pixels
from llama4lab.prompt.tiling import Tiling

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("golden_images", HERE / "golden_images.py")
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

VALUES = {kind: json.loads((HERE / "golden" / f"{kind}.json").read_text()) for kind in ("hf", "meta")}


def settings_of(case) -> dict:
    return {"size": case[2], "max_patches": case[3], "resize_to_max_canvas": case[4], "return_tensors": "pt"}


@pytest.fixture(autouse=True)
def _integer_kernel(monkeypatch):
    """The golden values were made by the uint8 kernel, which CPUs without AVX2 have too but do not choose."""
    monkeypatch.setattr(pixels, "computes_in_uint8", lambda device: True)


def check(kind: str, case, modes, *, values: bool = True):
    """Compares layout, RGB pixels and (if asked) pixel values with the golden ones."""
    entry = VALUES[kind][golden.name(case)]
    for mode in modes:
        image = golden.picture(case[0], case[1], mode)
        rgb = rgb_pixels(image) if kind == "hf" else meta_rgb_pixels(image)
        made = ImageProcessor(normalize=kind)(image, **settings_of(case))
        assert [*made["aspect_ratios"][0].tolist(), len(made["pixel_values"])] == entry["tiles"]
        # A Pillow that turns a mode into RGB by another rule gives other images to everybody: no fault of the resize.
        assert golden.digest(rgb.permute(1, 2, 0).numpy()) == entry[mode][0], f"the RGB pixels of mode {mode}"
        if values:
            assert golden.digest(made["pixel_values"]) == entry[mode][1], f"the pixel values of mode {mode}"


@pytest.mark.parametrize("case", golden.CASES, ids=golden.name)
def test_every_mode_gives_the_bytes_of_transformers(case):
    check("hf", case, golden.MODES)


@pytest.mark.parametrize("case", golden.CASES, ids=golden.name)
def test_every_mode_gives_the_bytes_of_metas_code(case):
    """The layout on any machine; the values where the installed Pillow resizes as the one that made them."""
    entry = VALUES["meta"][golden.name(case)]
    tiling = Tiling.of(case[:2], case[2], case[3], case[4], as_meta=True)
    assert list(tiling.resized) == entry["resized"]
    same_pillow = golden.pillow_digest(case, entry["resized"]) == entry["pillow"]
    check("meta", case, golden.MODES, values=same_pillow)


@pytest.mark.parametrize("case", golden.CASES, ids=golden.name)
def test_meta_tiles_are_pillows_resize_normalised_in_float32(case):
    """Whatever Pillow is installed."""
    image = golden.picture(case[0], case[1], "RGB")
    made = ImageProcessor(normalize="meta")(image, **settings_of(case))["pixel_values"]
    tiling = Tiling.of(case[:2], case[2], case[3], case[4], as_meta=True)
    canvas = Image.new("RGB", (tiling.canvas[1], tiling.canvas[0]))
    canvas.paste(image.resize(tiling.resized[::-1], Image.Resampling.BILINEAR))
    tiles = [
        canvas.crop((col * case[2], row * case[2], (col + 1) * case[2], (row + 1) * case[2]))
        for row in range(tiling.rows)
        for col in range(tiling.cols)
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((case[2], case[2]), Image.Resampling.BILINEAR))
    values = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles])
    assert torch.equal(made, ((values / 255 - 0.5) / 0.5).bfloat16())


def test_the_two_ways_differ_by_a_pixel_on_the_canvas_for_some_sizes():
    sizes = [Tiling.of((366, 1342), 48, 16, as_meta=as_meta).resized for as_meta in (False, True)]
    assert sizes == [(96, 351), (96, 352)]


def test_the_golden_values_cover_thirty_sizes_and_seven_modes():
    assert len({case[:2] for case in golden.CASES}) >= 30
    assert len(golden.MODES) >= 7
    assert all(VALUES[kind].keys() == {golden.name(case) for case in golden.CASES} for kind in VALUES)


def test_the_digest_sees_a_change_of_one_grey_level():
    image = golden.picture(60, 130, "RGB")
    changed = np.array(image)
    changed[30, 30, 1] ^= 1
    settings = settings_of((60, 130, 48, 16, False))
    digests = [golden.digest(ImageProcessor()(values, **settings)["pixel_values"]) for values in (image, changed)]
    assert digests[0] != digests[1]


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("torchvision")
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    return Llama4ImageProcessor()


def same(made, expected) -> bool:
    return torch.equal(made["pixel_values"], expected["pixel_values"]) and torch.equal(
        made["aspect_ratios"], expected["aspect_ratios"]
    )


def test_random_sizes_modes_and_settings_are_those_of_transformers_to_the_bit(theirs, monkeypatch):
    monkeypatch.undo()
    random = np.random.default_rng(0)
    for _ in range(150):
        height, width = random.integers(20, 500, 2).tolist()
        image = golden.picture(height, width, random.choice(golden.MODES))
        settings = settings_of((height, width, int(random.choice([20, 48, 336])), 4, bool(random.integers(2))))
        assert same(ImageProcessor()(image, **settings), theirs(image, **settings)), (image, settings)


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_arrays_and_tensors_are_those_of_transformers_to_the_bit(theirs, bands, monkeypatch):
    monkeypatch.undo()
    array = np.random.default_rng(bands).integers(0, 256, (70, 90, bands), dtype=np.uint8)
    for image in (array, torch.from_numpy(array).permute(2, 0, 1)):
        settings = settings_of((70, 90, 48, 4, False))
        assert same(ImageProcessor()(image, **settings), theirs(image, **settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_files_of_every_orientation_are_those_of_transformers_to_the_bit(theirs, tmp_path, orientation, suffix):
    image, path = golden.picture(60, 100, "RGB"), tmp_path / f"image.{suffix}"
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    settings = settings_of((60, 100, 48, 4, False))
    assert same(ImageProcessor()(str(path), **settings), theirs(str(path), **settings))
