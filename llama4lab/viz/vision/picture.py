"""The picture that lies beneath the cells."""

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray
DARKEST, LIGHTEST = 0.22, 0.8
GROUND = "0.45"  # a picture's usual grey, behind the scales of cells that let it through
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def in_color(image: Picture) -> np.ndarray:
    """Gives a picture as [height, width, 3] or [height, width], from 0 to 1.

    Raises:
        ValueError: if it is no picture.
    """
    picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (3, 4)):
        raise ValueError(
            f"The picture has the shape {list(picture.shape)}.\n"
            "Pass a PIL image, or an array [height, width], [height, width, 3] or [height, width, 4]."
        )
    scaled = picture / 255 if picture.dtype == np.uint8 else picture.astype(float)
    return scaled[..., :3] if scaled.ndim == 3 else scaled


def in_grey(image: Picture) -> np.ndarray:
    """Gives a picture in grey, [height, width], neither black nor white: cells in front of it stand out everywhere.

    Raises:
        ValueError: if it is no picture.
    """
    picture = in_color(image)
    return DARKEST + (LIGHTEST - DARKEST) * (picture @ LUMINANCE if picture.ndim == 3 else picture)
