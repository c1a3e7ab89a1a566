"""Images -> tiles of pixel values, without torchvision.

`ImageProcessor` gives the numbers of transformers' `Llama4ImageProcessor` to the bit and can stand in its place, inside
`Llama4Processor` too. transformers' own class cannot even be imported where torchvision is missing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Num, UInt8
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from llama4lab.prompt.pixels import meta_rgb_pixels, pil_resized, resized, rgb_pixels
from llama4lab.prompt.tiling import Tiling


class ImageProcessorKwargs(ImagesKwargs, total=False):
    """The settings that Llama 4 has beside the usual ones.

    max_patches: most tiles that an image is cut into, the global tile not counted.
    resize_to_max_canvas: enlarge the image to the largest canvas that holds it.
    normalize: "hf" or "meta", whose numbers to give; see `ImageProcessor`.
    """

    max_patches: int
    resize_to_max_canvas: bool
    normalize: str


class ImageProcessor(BaseImageProcessor):
    """Cuts images into tiles and normalises them.

    With `normalize="hf"` (default) the numbers are those of transformers: uint8 resize by torch, rescaled and
    normalised in bfloat16. With `normalize="meta"` they are those of Meta's code: resize by Pillow, float32 arithmetic,
    one cast to bfloat16 at the end. The two differ by up to one and a half grey levels.

    A path is read as transformers does: turned upright by its EXIF orientation, transparency dropped. A PIL image,
    array or tensor is taken as it is (`PIL.ImageOps.exif_transpose` turns it); transparency is laid on white.
    """

    valid_kwargs = ImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    size = SizeDict(height=336, width=336)
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    max_patches = 16
    resize_to_max_canvas = False
    # transformers has an old method of this name, which nothing here calls; the setting takes its place.
    normalize = "hf"  # pyright: ignore[reportAssignmentType]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    def __call__(self, images: Any, *args: Any, **settings: Any) -> BatchFeature:
        """Cuts images into tiles.

        Args:
            images: one image or a list of them: paths, PIL images, uint8 arrays or tensors.
            *args: unused; transformers' classes take them.
            **settings: for this call: `return_tensors="pt"`, and `size`, `max_patches`, `resize_to_max_canvas`,
                `normalize` and the like in place of the processor's own.

        Returns:
            `pixel_values` (the tiles of all images one after the other; without `return_tensors` a list with the tiles
            of each image) and `aspect_ratios` (rows and columns of tiles of each image).
        """
        return super().__call__(images, *args, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Gives the settings under the name of transformers' class, so that transformers reads what we save."""
        settings = super().to_dict() | {"image_processor_type": "Llama4ImageProcessor"}
        # transformers would take the entry for its method `normalize`. It cannot follow "meta", and fails on it.
        if settings.get("normalize") == "hf":
            del settings["normalize"]
        return settings

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens what is given as a path, upright and without transparency; leaves images as they are."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        source = str(image_url_or_urls) if isinstance(image_url_or_urls, Path) else image_url_or_urls
        image: Any = super().fetch_images(source)
        if image is not source:
            # Pillow keeps the note "this colour is transparent" on the RGB image, and `rgb_pixels` would obey it.
            image.info.pop("transparency", None)
        return image

    def process_image(
        self,
        image: Image.Image | np.ndarray | Tensor,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        normalize: str = "hf",
        **kwargs: Any,
    ) -> UInt8[Tensor, "3 height width"]:
        """Gives the RGB pixels of one image. `BaseImageProcessor` calls this for each image before `_preprocess`."""
        _check_settings(normalize=normalize, **kwargs)
        if normalize == "meta" and isinstance(image, Image.Image):
            pixels = meta_rgb_pixels(image)
        else:
            channels = {None: None, "channels_first": "first", "channels_last": "last"}
            layout = ChannelDimension(input_data_format).value if input_data_format else None
            pixels = rgb_pixels(image, channels[layout])
        return pixels if device is None else pixels.to(device)

    def _preprocess(
        self,
        images: list[UInt8[Tensor, "3 _ _"]],
        size: SizeDict,
        max_patches: int,
        resize_to_max_canvas: bool,
        **kwargs: Any,
    ) -> BatchFeature:
        tile, meta = _square(size), kwargs["normalize"] == "meta"
        if max_patches < 1:
            raise ValueError(
                f"max_patches is the most tiles of an image and needs to be at least 1, not {max_patches}."
            )
        resize = pil_resized if meta else resized
        tiles, ratios = [], []
        for image in images:
            tiling = Tiling.of((image.shape[1], image.shape[2]), tile, max_patches, resize_to_max_canvas, meta)
            values = _normalised(_cut(image, tiling, resize), meta, **kwargs)
            tiles.append(values)
            ratios.append(torch.tensor([tiling.rows, tiling.cols], device=image.device))
        wanted = kwargs.get("return_tensors")
        data = {"pixel_values": torch.cat(tiles) if wanted else tiles, "aspect_ratios": ratios}
        return BatchFeature(data=data, tensor_type=wanted)


def _cut(image: UInt8[Tensor, "3 height width"], tiling: Tiling, resize: Any) -> UInt8[Tensor, "tile 3 side side"]:
    height, width = tiling.canvas
    canvas = image.new_zeros(3, height, width)
    canvas[:, : tiling.resized[0], : tiling.resized[1]] = resize(image, tiling.resized)
    tiles = canvas.unflatten(2, (tiling.cols, tiling.tile)).unflatten(1, (tiling.rows, tiling.tile))
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if tiling.has_global_tile:
        tiles = torch.cat([tiles, resize(image, (tiling.tile, tiling.tile))[None]])
    return tiles


def _normalised(
    tiles: UInt8[Tensor, "tile 3 side side"],
    meta: bool,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | tuple[float, ...],
    image_std: float | tuple[float, ...],
    **_: Any,
) -> Num[Tensor, "tile 3 side side"]:
    if not do_normalize:
        return tiles * rescale_factor if do_rescale else tiles
    # transformers rounds to bfloat16 before it subtracts and divides; Meta rounds once, at the end.
    dtype = torch.float32 if meta else torch.bfloat16
    values = tiles.to(dtype) / (1 / rescale_factor) if meta else tiles.to(dtype) * rescale_factor
    mean, std = (torch.as_tensor(given, dtype=dtype, device=tiles.device) for given in (image_mean, image_std))
    normalised: BFloat16[Tensor, "tile 3 side side"] = ((values - _per_channel(mean)) / _per_channel(std)).bfloat16()
    return normalised


def _per_channel(given: Tensor) -> Tensor:
    return given.view(-1, 1, 1) if given.ndim == 1 else given


def _square(size: SizeDict | Any) -> int:
    height, width = size.get("height"), size.get("width")
    if height is None or height != width or height < 1:
        raise ValueError(
            f"The size of a tile was given as {dict(size)}.\nTiles are square: give height and width, the same number."
        )
    return height


def _check_settings(
    normalize: str,
    do_resize: bool | None = None,
    do_rescale: bool | None = None,
    do_normalize: bool | None = None,
    do_convert_rgb: bool | None = None,
    resample: int | None = None,
    **_: Any,
) -> None:
    if normalize not in ("hf", "meta"):
        raise ValueError(f"normalize is 'hf' (as transformers) or 'meta' (as Meta's code), not {normalize!r}.")
    if not do_resize or not do_convert_rgb:
        raise ValueError("Llama 4 sees RGB tiles of one size: do_resize and do_convert_rgb cannot be turned off.")
    if do_normalize and not do_rescale:
        raise ValueError("do_normalize needs do_rescale: mean and std are those of values in 0..1, pixels are 0..255.")
    if normalize == "meta" and not do_normalize:
        raise ValueError("normalize='meta' always rescales and normalises: do_normalize cannot be turned off with it.")
    if resample not in (None, PILImageResampling.BILINEAR):
        raise ValueError(
            f"Llama 4 resizes images by bilinear interpolation (resample=2), not by resample={resample!r}."
        )
