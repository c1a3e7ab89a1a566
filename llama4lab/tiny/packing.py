"""Documents -> rows of token ids with loss weights: what one training step reads."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from llama4lab.tiny.architecture import CHUNK
from llama4lab.tiny.document import Document
from llama4lab.tiny.domains.catalogue import sample
from llama4lab.tiny.drawing import COLOURS, PLACES, SHAPES, Scene, pixels
from llama4lab.tiny.vocabulary import token_id

# Expert specialisation is asked for between these groups; a translation's group is its target language.
GROUPS = (
    "induction",
    "indirect_objects",
    "facts",
    "arithmetic",
    "code",
    "english",
    "french",
    "german",
    "spanish",
    "recall",
    "shapes",
    "chat",
)
PATCHES = 16
TEMPLATE_WEIGHT = 0.05
# Nothing predicts the words of a random sequence or who owns what: they would only add noise.
UNPREDICTABLE = {"induction": 0.0, "recall": 0.0}


@dataclass
class Rows:
    """Packed rows.

    Attributes:
        ids: token ids; weights: the loss weight of each token as a target; groups: the index of its document's group
            (-1 for padding).
        scenes: the drawn scenes, in the order of their patch tokens.
        end_of_turn: the id of the token that ends a turn of a chat.
    """

    ids: Int[Tensor, "row seq"]
    weights: Float[Tensor, "row seq"]
    groups: Int[Tensor, "row seq"]
    scenes: list[Scene] = field(default_factory=list)
    end_of_turn: int = -1

    def pixel_values(self) -> Float[Tensor, "tile 3 height width"] | None:
        """The normalised pixels of all scenes, or None without scenes."""
        return scene_pixels(self.scenes) if self.scenes else None


class Packer:
    """Turns documents into rows with the given tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bos = token_id(tokenizer, "<|begin_of_text|>")
        self.pad = token_id(tokenizer, "<|finetune_right_pad|>")
        self.end_of_turn = token_id(tokenizer, "<|eot|>")
        image = f"<|image_start|><|image|>{'<|patch|>' * PATCHES}<|image_end|>"
        self.image = tokenizer.encode(image, add_special_tokens=False).ids

    def tokens(self, document: Document) -> tuple[list[int], list[float]]:
        """Token ids (begin-of-text first, images expanded) and loss weights of a document."""
        template = UNPREDICTABLE.get(document.domain, TEMPLATE_WEIGHT)
        ids, weights = [self.bos], [0.0]
        for text, marked in document.segments:
            before, image, after = text.partition("<|image|>")
            for piece in (before, image, after):
                new = self.image if piece == "<|image|>" else self._encode(piece)
                ids += new
                weights += [0.0 if piece == "<|image|>" else 1.0 if marked else template] * len(new)
        return ids, weights

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def pack(self, mixture: Mapping[str, float], rows: int, length: int, rng: random.Random, split="train") -> Rows:
        """`rows` rows of `length` tokens with documents drawn from a mixture of domains (weights per document).

        No document that fits into a chunk crosses the border of one, so that RoPE layers see it whole.
        """
        domains, shares = list(mixture), list(mixture.values())
        ids = torch.full((rows, length), self.pad)
        weights, groups, scenes = torch.zeros(rows, length), torch.full((rows, length), -1), []
        for row in range(rows):
            place = 0
            while length - place >= 16:
                document = sample(rng.choices(domains, shares)[0], rng, split)
                new, weight = self.tokens(document)
                if len(new) <= CHUNK < place % CHUNK + len(new):
                    place += CHUNK - place % CHUNK
                if place + len(new) > length:
                    break
                span = slice(place, place + len(new))
                ids[row, span], weights[row, span] = torch.tensor(new), torch.tensor(weight)
                groups[row, span] = GROUPS.index(document.domain)
                if document.scene is not None:
                    scenes.append(document.scene)
                place += len(new)
        return Rows(ids, weights, groups, scenes, self.end_of_turn)


def scene_pixels(scenes: list[Scene]) -> Float[Tensor, "tile 3 height width"]:
    """Pixels as the image processor gives them for an image of exactly one tile: mean 0.5, deviation 0.5."""
    stacked = torch.stack([torch.from_numpy(pixels(scene).copy()) for scene in scenes])
    return (stacked.float() / 255 - 0.5) / 0.5


def patch_labels(scenes: list[Scene]) -> Int[Tensor, "tile patch 2"]:
    """For every image token the shape and the colour of the thing in its quarter of the image (0: nothing there)."""
    labels = torch.zeros(len(scenes), PATCHES, 2, dtype=torch.long)
    shapes: list[str] = list(SHAPES)
    colours = list(COLOURS)
    for tile, scene in enumerate(scenes):
        for thing in scene.things:
            x, y = PLACES[thing.place]
            for patch in range(PATCHES):
                column, row = 12 * (patch % 4) + 6, 12 * (patch // 4) + 6
                if thing.place == "centre" or (abs(column - x) < 12 and abs(row - y) < 12):
                    label = (shapes.index(thing.shape) + 1, colours.index(thing.colour) + 1)
                    labels[tile, patch] = torch.tensor(label)
    return labels
