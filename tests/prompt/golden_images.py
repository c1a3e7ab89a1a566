"""Makes the golden values of the image processor from transformers' own class and from Meta's code.

Both need torchvision, which a test run need not have. Where it is installed (with the extra `reference` for Meta's
part), run `python tests/prompt/golden_images.py`; it writes golden/hf.json and golden/meta.json. The tests import the
cases and the images from here.

Images are made by integer arithmetic, so they do not depend on a random generator. A golden value is the start of the
SHA-256 of the bfloat16 values. That is sound for the resize too: torch's uint8 kernel computes in integers and was
found to give the same bytes with AVX-512, with AVX2 and without either; only its float32 kernel differs between them,
and the tests keep to the integer one.
"""

import hashlib
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).parent / "golden"
MODES = ("L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "1")
# Height, width, tile, most tiles, enlarge to the largest canvas.
CASES = (
    *((h, w, 48, 4, False) for h, w in ((1, 1), (1, 200), (200, 1), (2, 3), (48, 48), (47, 49), (96, 48), (48, 97))),
    *((h, w, 48, 4, False) for h, w in ((60, 130), (130, 60), (95, 97), (192, 48), (300, 301), (500, 20), (33, 400))),
    *(
        (h, w, 48, 16, False)
        for h, w in ((60, 130), (144, 145), (400, 90), (90, 400), (257, 255), (193, 191), (768, 48))
    ),
    # Here transformers and Meta's code differ by a pixel in the size on the canvas.
    (366, 1342, 48, 16, False),
    *((h, w, 48, 16, True) for h, w in ((100, 200), (7, 5), (50, 49), (31, 97), (192, 192))),
    *((h, w, 20, 9, True) for h, w in ((100, 200), (63, 61), (1, 61))),
    *((h, w, 336, 16, False) for h, w in ((336, 336), (337, 336), (480, 640), (100, 200))),
    *((h, w, 336, 4, True) for h, w in ((100, 200), (480, 333))),
)


def picture(height: int, width: int, mode: str) -> Image.Image:
    """Gives an image with smooth and rough parts and, where the mode has it, all degrees of transparency."""
    y, x = np.mgrid[0:height, 0:width].astype(np.uint32)
    rough = (x * 73856093) ^ (y * 19349663)
    channels = [x * 3 + y, y * 5 + (x >> 1), rough >> 7, x * 2 + rough % 60]
    values = np.stack(channels, axis=-1).astype(np.uint32) % 256
    pixels = values.astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(((values[..., 0] << 8) | values[..., 2]).astype(np.uint16) % 700)
    if mode == "1":
        return Image.fromarray((pixels[..., 2] > 100).astype(np.uint8) * 255).convert("1", dither=Image.Dither.NONE)
    if mode == "P":
        indexed = Image.frombytes("P", (width, height), pixels[..., 2].tobytes())
        indexed.putpalette([(37 * i + 11 * (i % 3)) % 256 for i in range(768)])
        return indexed
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels[..., :bands]).tobytes())


def digest(values: torch.Tensor | np.ndarray) -> str:
    """Gives the start of the SHA-256 of the bytes of an array."""
    array = values.contiguous().view(torch.int16).numpy() if isinstance(values, torch.Tensor) else values
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def name(case: tuple[int, int, int, int, bool]) -> str:
    """Gives the key of a case in the files."""
    height, width, tile, most, enlarge = case
    return f"{height}x{width} tile {tile} most {most}{' enlarged' if enlarge else ''}"


def hf_values() -> dict:
    """Gives the layout and, for every mode, the digest of the RGB pixels and of the pixel values."""
    from transformers.image_transforms import convert_to_rgb
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    processor, golden = Llama4ImageProcessor(), {}
    for case in CASES:
        height, width, tile, most, enlarge = case
        settings = {"size": {"height": tile, "width": tile}, "max_patches": most, "resize_to_max_canvas": enlarge}
        entry = {}
        for mode in MODES:
            image = picture(height, width, mode)
            made = processor(image, return_tensors="pt", **settings)
            rgb = np.asarray(convert_to_rgb(image, return_numpy=True))
            entry["tiles"] = [*made.aspect_ratios[0].tolist(), len(made.pixel_values)]
            entry[mode] = [digest(rgb), digest(made.pixel_values)]
        golden[name(case)] = entry
    return golden


def meta_values() -> dict:
    """Gives the same by Meta's code, and the size on the canvas with the digest of Pillow's resize to it.

    Pillow's resize is not the same in all versions: by those digests a test sees whether it can expect the rest.
    """
    convert_image_to_rgb = import_module("llama_models.llama4.chat_format").convert_image_to_rgb
    metas = import_module("llama_models.llama4.preprocess")
    golden = {}
    for case in CASES:
        height, width, tile, most, enlarge = case
        transform = metas.VariableSizeImageTransform(tile)
        entry = {}
        for mode in MODES:
            image = convert_image_to_rgb(picture(height, width, mode))
            tiles, ratio = transform(image, most, resize_to_max_canvas=enlarge)
            if len(tiles) > 1:
                tiles = torch.cat([tiles, metas.ResizeNormalizeImageTransform(tile, tile)(image)[None]])
            entry["tiles"] = [*ratio, len(tiles)]
            entry[mode] = [digest(np.asarray(image)), digest(tiles.bfloat16())]
        canvas = (ratio[1] * tile, ratio[0] * tile)
        fitted = transform.resize_without_distortion(image, canvas, None if enlarge else tile)
        entry["resized"] = [fitted.height, fitted.width]
        entry["pillow"] = pillow_digest(case, entry["resized"])
        golden[name(case)] = entry
    return golden


def pillow_digest(case: tuple[int, int, int, int, bool], resized: list[int]) -> str:
    """Gives the digest of Pillow's own resize of a picture to its size on the canvas and to a tile."""
    image = picture(case[0], case[1], "RGB")
    sizes = ((resized[1], resized[0]), (case[2], case[2]))
    return digest(np.concatenate([np.asarray(image.resize(size, Image.Resampling.BILINEAR)).ravel() for size in sizes]))


def write(file: str, golden: dict) -> None:
    """Writes one line for each case."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in golden.items())
    (FOLDER / file).write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    write("hf.json", hf_values())
    write("meta.json", meta_values())
