"""`Prompt`: what a model is given, with everything that is known about each of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.markup import image_html, row_html
from llama4lab.prompt.spans import Span
from llama4lab.prompt.tokenizer import token_id


@dataclass(eq=False)
class Prompt:
    """A batch of prompts, padded on the left.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 for tokens, 0 for padding.
        pixel_values: the tiles of all images of the batch in order; None without images.
        tokens: the text of every token of every row; "" for padding.
        modality: "pad", "text", "image" (an image token) or "special" (a control token) for every token of every row.
        images: one layout for each image, in order.
        spans: the messages of every row.
        tokenizer: what the prompt was made with, for `token_id`; None for a prompt from ids, or one read from a file.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    pixel_values: Float[Tensor, "tile 3 side side"] | None
    tokens: list[list[str]]
    modality: list[list[str]]
    images: list[ImageLayout] = field(default_factory=list)
    spans: list[list[Span]] = field(default_factory=list)
    tokenizer: PreTrainedTokenizerFast | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    def inputs(self) -> dict[str, Tensor]:
        """Gives the arguments of a model: `model(**prompt.inputs())`."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.pixel_values is None else {**inputs, "pixel_values": self.pixel_values}

    def to(self, device: torch.device | str) -> "Prompt":
        """Gives the same prompt with what the model reads on another device."""
        pixels = None if self.pixel_values is None else self.pixel_values.to(device)
        ids, mask = self.input_ids.to(device), self.attention_mask.to(device)
        return replace(self, input_ids=ids, attention_mask=mask, pixel_values=pixels)

    def row(self, index: int) -> "Prompt":
        """Gives one row as a batch of one. Its padding stays, so that positions mean the same as before."""
        index = self._row_number(index)
        own = [layout for layout in self.images if layout.row == index]
        pixels, images, first = None, [], 0
        if own and self.pixel_values is not None:
            pixels = torch.cat([self.pixel_values[layout.tiles] for layout in own])
        for layout in own:
            images.append(layout.shifted(row=0, first_tile=first))
            first += layout.num_tiles
        return replace(
            self,
            input_ids=self.input_ids[index : index + 1],
            attention_mask=self.attention_mask[index : index + 1],
            pixel_values=pixels,
            tokens=[self.tokens[index]],
            modality=[self.modality[index]],
            images=images,
            spans=self.spans[index : index + 1],
        )

    def position(self, text: str, row: int = 0, occurrence: int | None = None) -> int:
        """Gives the position of the token that reads `text`, a leading space included.

        Args:
            text: the token as in `tokens`.
            row: the row to search.
            occurrence: which one, if there are several: 0 is the first, -1 the last.

        Raises:
            ValueError: if there is no such token, or several and `occurrence` does not say which.
        """
        row = self._row_number(row)
        tokens = self.tokens[row]
        found = [position for position, token in enumerate(tokens) if token == text and text]
        if not found:
            raise ValueError(f"No token of row {row} is {text!r}.\n{_near(text, tokens)}")
        if occurrence is None and len(found) > 1:
            raise ValueError(
                f"{len(found)} tokens of row {row} are {text!r}, at positions {_listed(found)}.\n"
                "Say which by occurrence=0 (the first), 1, ..., -1 (the last)."
            )
        occurrence = 0 if occurrence is None else occurrence
        if not -len(found) <= occurrence < len(found):
            raise ValueError(
                f"occurrence={occurrence} of {text!r} was asked for in row {row}.\nIt has {len(found)}: positions "
                f"{_listed(found)}."
            )
        return found[occurrence]

    def token_id(self, text: str) -> int:
        """Gives the id of the one token that is `text`, for example `" Paris"`."""
        if self.tokenizer is None:
            raise ValueError(f"The id of {text!r} was asked for, but this prompt has no tokenizer. Give the id itself.")
        return token_id(self.tokenizer, text)

    def _row_number(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"Row {row} was asked for, but the prompt has {len(self)} rows.")
        return row % len(self)

    def __repr__(self) -> str:
        batch, seq = self.input_ids.shape
        images = f", {len(self.images)} images" if self.images else ""
        text = "".join(self.tokens[0])
        return f"Prompt({batch} x {seq} tokens{images}: {text[:60] + '...' if len(text) > 60 else text!r})"

    def _repr_html_(self) -> str:
        captions = [
            f"row {layout.row}: {layout.size[0]} x {layout.size[1]} pixels, {layout.num_tiles} tiles"
            for layout in self.images
        ]
        pictures = [image_html(layout.original, text) for layout, text in zip(self.images, captions, strict=True)]
        rows = [row_html(tokens, kinds) for tokens, kinds in zip(self.tokens, self.modality, strict=True)]
        return "".join(pictures) + "<hr>".join(rows)


def shared_tokens(rows: Sequence[Sequence[str]]) -> list[str]:
    """The text of the token at each position, for rows of one length; "" where rows differ."""
    return [column[0] if len(set(column)) == 1 else "" for column in zip(*rows, strict=True)]


def _near(text: str, tokens: list[str]) -> str:
    own = list(dict.fromkeys(token for token in tokens if token))
    bare = text.strip()
    near = [token for token in own if token.strip() == bare and bare]
    near += [token for token in get_close_matches(text, own, n=5, cutoff=0.5) if token not in near]
    if near:
        return f"Near ones are {', '.join(map(repr, near))}."
    return f"Its tokens begin {', '.join(map(repr, own[:8]))}."


def _listed(positions: list[int]) -> str:
    return ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
