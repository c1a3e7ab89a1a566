"""A training document: text whose answers are marked, the domain it belongs to, and the split it falls into."""

import hashlib
import re
from dataclasses import dataclass

from llama4lab.tiny.drawing import Scene

# Answers stand between these marks; everything else is template text that the loss hardly weighs.
OPEN, CLOSE = "⟦", "⟧"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One document of a domain.

    Attributes:
        domain: the name under which experts and losses are grouped (`french` is a domain of its own).
        text: the text, with every answer between the marks.
        key: what decides the split: two documents of equal keys are never in different splits. An empty key is
            for what can only be known by heart: it is always in the training split.
        scene: the drawn image that the one `<|image|>` of the text stands for.
    """

    domain: str
    text: str
    key: tuple
    scene: Scene | None = None

    @property
    def segments(self) -> list[tuple[str, bool]]:
        """The text in order as (piece, is an answer), without the marks."""
        pieces = re.split(f"{OPEN}(.*?){CLOSE}", self.text, flags=re.DOTALL)
        return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]

    @property
    def plain(self) -> str:
        """The text without marks."""
        return self.text.replace(OPEN, "").replace(CLOSE, "")


def answer(text: str) -> str:
    """The text between answer marks."""
    return f"{OPEN}{text}{CLOSE}"


def split_of(key: tuple) -> str:
    """The split of a key: 10 % "test", 5 % "validation", the rest "train"; the same on every machine."""
    if not key:
        return "train"
    bucket = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big") % 100
    return "test" if bucket < 10 else "validation" if bucket < 15 else "train"
