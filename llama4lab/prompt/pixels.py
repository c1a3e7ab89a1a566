"""The RGB pixels of an image, and pixels of another size: every rounding as transformers or Meta has it."""

import platform

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

WHITE = (255, 255, 255)


def rgb_pixels(
    image: Image.Image | np.ndarray | Tensor, channels: str | None = None
) -> UInt8[Tensor, "3 height width"]:
    """Gives the pixels of an image as transformers reads them; what is transparent is laid on white.

    Args:
        image: a PIL image of any mode, or uint8 values with 1, 3 or 4 channels.
        channels: "first" or "last", where the channels of an array or tensor are; found from its shape if None.

    Raises:
        ValueError: if values are not uint8, or their shape is not that of one image.
    """
    if isinstance(image, Image.Image):
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer)
        return _pixels_of(image.convert("RGB"))
    values = torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    return _array_pixels(values, channels)


def meta_rgb_pixels(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """Gives the pixels of a PIL image as Meta's code reads them: of all modes only RGBA is laid on white."""
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, WHITE)
        white.paste(image, mask=image.getchannel("A"))
        return _pixels_of(white)
    return _pixels_of(image.convert("RGB"))


def resized(pixels: UInt8[Tensor, "3 height width"], size: tuple[int, int]) -> UInt8[Tensor, "3 new_height new_width"]:
    """Resizes as torchvision does: bilinear with antialiasing, in 8 bits where torchvision has a kernel for that."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    native = computes_in_uint8(pixels.device)
    values = pixels[None] if native else pixels[None].float()
    if size[1] == 1:
        # torch's kernels without AVX repeat the first pixel all down an image that is one pixel wide (seen in 2.13 and
        # 2.14). Two equal columns come out right, and like the AVX kernels do it.
        columns = _interpolated(values, (values.shape[2], 1)).expand(-1, -1, -1, 2)
        values = _interpolated(columns, (size[0], 2))[..., :1]
    else:
        values = _interpolated(values, size)
    return values[0] if native else values[0].round().to(torch.uint8)


def _interpolated(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=True)


def computes_in_uint8(device: torch.device) -> bool:
    """True where torchvision resizes uint8 values as they are; elsewhere it goes through float32 and rounds.

    The two differ by one grey level here and there, so the same choice is part of giving the same numbers.
    """
    if device.type != "cpu":
        return False
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return vectorised or platform.machine() in ("aarch64", "arm64")


def pil_resized(
    pixels: UInt8[Tensor, "3 height width"], size: tuple[int, int]
) -> UInt8[Tensor, "3 new_height new_width"]:
    """Resizes as Pillow does, which is what Meta's code uses."""
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    return _pixels_of(image.resize((size[1], size[0]), Image.Resampling.BILINEAR)).to(pixels.device)


def _pixels_of(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    # The copy matters: Pillow's own buffer is read-only, and torch warns about that.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _array_pixels(values: Tensor, channels: str | None) -> UInt8[Tensor, "3 height width"]:
    shape = tuple(values.shape)
    if values.dtype != torch.uint8:
        raise ValueError(
            f"An image as an array or tensor needs uint8 values in 0..255.\nThis one has {values.dtype}.\n"
            "Convert it first, for example with (image * 255).round() if it lies in 0..1."
        )
    if values.ndim == 2:
        values, channels = values[None], "first"
    if values.ndim == 3 and channels is None:
        channels = "first" if shape[0] in (1, 3, 4) else "last"
    if values.ndim == 3 and channels == "last":
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4) or values.numel() == 0:
        raise ValueError(
            f"An image needs a height, a width and 1, 3 or 4 channels.\nThis one has the shape {shape}.\n"
            "Arrays are [height, width, channel], tensors [channel, height, width]."
        )
    if values.shape[0] == 1:
        return values.repeat(3, 1, 1)
    if values.shape[0] == 4:
        return _on_white(values)
    return values.contiguous()


def _on_white(values: UInt8[Tensor, "4 height width"]) -> UInt8[Tensor, "3 height width"]:
    scaled = values.float() * (1.0 / 255)
    colour, alpha = scaled[:3], scaled[3:]
    # torchvision goes back to 8 bits by cutting at 255.999, not by rounding.
    return ((colour * alpha + (1 - alpha)) * 255.999).to(torch.uint8)
