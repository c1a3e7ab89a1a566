"""The tokens that stand for an image in the text of a model."""

from dataclasses import dataclass
from typing import Any

from transformers import Llama4Config, Llama4TextConfig, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from llama4lab.prompt.tiling import Tiling

IMAGE = "<|image|>"
NAMES = ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")


@dataclass(frozen=True)
class ImageTokens:
    """How a model with a vision tower sees an image.

    Attributes:
        tile: height and width of a tile in pixels.
        grid: image tokens along one side of a tile.
        patch_id: the id of `<|patch|>`, each of which takes one vector of the image. (transformers calls this one
            `image_token_id` in a config, and in a processor that of `<|image|>`.)
    """

    tile: int
    grid: int
    patch_id: int

    @classmethod
    def of(cls, config: Llama4Config | Llama4TextConfig) -> "ImageTokens | None":
        """Reads them from the config of a model; None for a model of text only."""
        if not isinstance(config, Llama4Config):
            return None
        vision: Any = config.vision_config
        # The pixel shuffle makes one token of 1 / ratio patches along each side.
        grid = round(vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio)
        return cls(vision.image_size, grid, config.image_token_index)

    @property
    def per_tile(self) -> int:
        """Image tokens of one tile."""
        return self.grid**2

    def count(self, tiling: Tiling) -> int:
        """Gives the number of image tokens of an image."""
        return tiling.num_tiles * self.per_tile

    def text(self, tokenizer: PreTrainedTokenizerFast, tiling: Tiling) -> list[int]:
        """Gives the token ids of an image.

        Tiles of a row are joined by `<|tile_x_separator|>`, rows ended by `<|tile_y_separator|>`; `<|image|>` announces
        the global tile (or the only one).
        """
        known = tokenizer.get_added_vocab()
        ids = {name: known[f"<|{name}|>"] for name in NAMES}
        tile = [ids["patch"]] * self.per_tile
        text = [ids["image_start"]]
        if tiling.has_global_tile:
            for _ in range(tiling.rows):
                text += tile + (tiling.cols - 1) * [ids["tile_x_separator"], *tile] + [ids["tile_y_separator"]]
        return [*text, ids["image"], *tile, ids["image_end"]]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises ValueError unless the tokenizer writes images as the model reads them."""
        known = tokenizer.get_added_vocab()
        missing = [f"<|{name}|>" for name in NAMES if f"<|{name}|>" not in known]
        if missing:
            raise ValueError(
                f"An image was given, but the tokenizer has no {missing[0]} token: it is one for text only."
            )
        if known["<|patch|>"] != self.patch_id:
            raise ValueError(
                f"<|patch|> is token {known['<|patch|>']} of the tokenizer, but the model takes images at token "
                f"{self.patch_id}.\nTokenizer and model are of different checkpoints."
            )

    def check_processor(self, processor: BaseImageProcessor) -> None:
        """Raises ValueError unless the image processor makes tiles of the size that the model reads."""
        size: Any = getattr(processor, "size", None)
        made = (size["height"], size["width"])
        if made != (self.tile, self.tile):
            raise ValueError(
                f"The image processor makes tiles of {made[0]} x {made[1]} pixels, the model reads {self.tile} x "
                f"{self.tile}.\nThey are of different checkpoints; or give size={self.tile} to the processor."
            )
