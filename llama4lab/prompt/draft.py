"""A row of a prompt before its images are written out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama4lab.prompt.chat import render
from llama4lab.prompt.control_tokens import ControlTokens
from llama4lab.prompt.image_set import is_nested, share_out
from llama4lab.prompt.image_tokens import IMAGE


@dataclass
class Draft:
    """A row as text.

    Attributes:
        pieces: stretches of text, control tokens as ids, and None where an image goes.
        images: the images as they were given, in order.
        bare: True if the tokenizer's own beginning (`<|begin_of_text|>`) is still to be added.
    """

    pieces: list[str | int | None]
    images: list[Any]
    bare: bool


def text_drafts(control: ControlTokens, texts: Sequence[str], images: Any, parse_special: bool) -> list[Draft]:
    """Drafts texts. `<|image|>` marks the place of an image; without a mark images come first."""
    rows: list[list[str | int | None]] = []
    for text in texts:
        if not text:
            raise ValueError("A prompt was asked for from an empty text. Give at least one character.")
        rows.append(_marked(control, control.split(text) if parse_special else [text]))
    given = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
    marks = [row.count(None) for row in rows]
    if is_nested(given) and len(given) == len(rows):
        marks = [count or len(own) for count, own in zip(marks, given, strict=True)]
    elif len(rows) == 1 and not marks[0]:
        marks = [len(given)]
    shared = share_out(given, marks)
    begin = control.ids.get(str(control.tokenizer.bos_token))
    drafts = []
    for row, own in zip(rows, shared, strict=True):
        bare = row[:1] != [begin]
        if None not in row:
            first = 0 if bare else 1
            row = [*row[:first], *[None] * len(own), *row[first:]]
        drafts.append(Draft(row, own, bare))
    return drafts


def chat_drafts(
    control: ControlTokens, chats: Sequence[list[dict[str, Any]]], images: Any, parse_special: bool, answer: bool
) -> list[Draft]:
    """Drafts chats. Image parts without an image of their own take those of `images`, in order."""
    rendered = [render(control, chat, parse_special, answer) for chat in chats]
    shared = share_out(images, [sum(image is None for image in chat.images) for chat in rendered])
    drafts = []
    for row, (chat, given) in enumerate(zip(rendered, shared, strict=True)):
        rest = iter(given)
        own = [next(rest) if image is None else image for image in chat.images]
        pieces = _marked(control, chat.pieces)
        if pieces.count(None) != len(own):
            raise ValueError(
                f"The chat template wrote {pieces.count(None)} {IMAGE} for row {row}, whose messages have {len(own)} "
                f"images.\nWith parse_special=True a typed {IMAGE} counts; images are parts of a message's content."
            )
        drafts.append(Draft(pieces, own, bare=False))
    return drafts


def _marked(control: ControlTokens, pieces: list[str | int]) -> list[str | int | None]:
    image = control.ids.get(IMAGE)
    return [None if piece == image and isinstance(piece, int) else piece for piece in pieces]
