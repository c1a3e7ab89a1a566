"""One image as a user gives it: a path, a PIL image, a NumPy array or a tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llama4lab.prompt.pixels import rgb_pixels

# One channel with more than 8 bits: Pillow cuts it at 255 when it makes RGB of it, and leaves a white image.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass
class Picture:
    """An image ready for an image processor.

    Attributes:
        values: what the image processor is given.
        original: the same for drawing: RGB, transparency on white.
    """

    values: Image.Image | Tensor
    original: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.original.height, self.original.width

    @classmethod
    def of(cls, source: Any, upright: bool | None = None) -> "Picture":
        """Takes an image in any of the accepted forms.

        Args:
            source: a path, a PIL image, or uint8 values: an array [height, width, channel] or a tensor [channel,
                height, width].
            upright: turn the image as its EXIF orientation says. None does what transformers does: files are turned,
                PIL images are not.

        Raises:
            FileNotFoundError: if there is no file at the path.
            ValueError: if the file is no image, or values are not those of 8-bit pixels.
            TypeError: if it is none of the accepted forms.
        """
        if isinstance(source, (str, Path)):
            image = _opened(source)
            upright = True if upright is None else upright
        elif isinstance(source, (np.ndarray, Tensor)):
            pixels = rgb_pixels(source, channels="last" if isinstance(source, np.ndarray) else "first")
            return cls(pixels, _drawable(pixels))
        elif isinstance(source, Image.Image):
            image = source
        else:
            raise TypeError(
                f"An image cannot be made from a {type(source).__name__}.\n"
                "Give a path, a PIL image, an array [height, width, channel] or a tensor [channel, height, width]."
            )
        if upright:
            image = ImageOps.exif_transpose(image)
        _check_depth(image)
        return cls(image, _drawable(rgb_pixels(image)))


def _opened(source: str | Path) -> Image.Image:
    if str(source).startswith(("http://", "https://")):
        raise ValueError(f"The image {source} is on the web.\nNothing is downloaded here: save it, and give its path.")
    path = Path(source).expanduser()
    if not path.is_file():
        near = sorted(entry.name for entry in path.parent.iterdir())[:5] if path.parent.is_dir() else []
        found = f"The folder has {', '.join(near)}." if near else f"There is no folder {path.parent} with files either."
        raise FileNotFoundError(f"No image at {path}.\n{found}")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read (PNG, JPEG, WebP, ...).") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {path} cannot be read.\nPillow says: {error}") from error


def _check_depth(image: Image.Image) -> None:
    if image.width == 0 or image.height == 0:
        raise ValueError(f"An image needs at least one pixel, this one has {image.height} x {image.width}.")
    if image.mode not in DEEP_MODES:
        return
    low, high = np.asarray(image).min(), np.asarray(image).max()
    if low < 0 or high > 255:
        raise ValueError(
            f"An image of mode {image.mode} with values from {low} to {high} was given.\n"
            "Pillow cuts such values at 255. Scale them to 0..255 and convert the image to mode 'L' first."
        )


def _drawable(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).to(torch.device("cpu")).numpy())
