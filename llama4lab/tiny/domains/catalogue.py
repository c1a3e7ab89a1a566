"""All domains by name, and examples with known answers from any of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from llama4lab.tiny.document import SPLITS, Document, split_of
from llama4lab.tiny.domains import (
    arithmetic,
    chat,
    code,
    facts,
    indirect_objects,
    induction,
    recall,
    shapes,
    translation,
)
from llama4lab.tiny.drawing import picture

DRAWS: dict[str, Callable[[random.Random], Document]] = {
    "induction": induction.draw,
    "indirect_objects": indirect_objects.draw,
    "facts": facts.draw,
    "arithmetic": arithmetic.draw,
    "code": code.draw,
    "translation": translation.draw,
    "recall": recall.draw,
    "far_recall": recall.draw_far,
    "far_induction": induction.draw_long,
    "shapes": shapes.draw,
    "shape_search": shapes.draw_search,
    "chat": chat.draw,
}


@dataclass(frozen=True)
class Example:
    """A prompt with its one right continuation.

    Attributes:
        domain: the domain of the document (translations have the target language as theirs).
        text: the text up to the answer, without the begin-of-text token.
        answer: what follows; its first token is the one to predict.
        image: the picture that `<|image|>` in the text stands for, or None.
        question: the bare question of an image example, else an empty string.
    """

    domain: str
    text: str
    answer: str
    image: Image.Image | None = None
    question: str = ""


def sample(domain: str, rng: random.Random, split: str = "train") -> Document:
    """A random document of a domain and split; ValueError for a name that does not exist."""
    if domain not in DRAWS:
        raise ValueError(f"domain {domain!r} does not exist\nthere are: {', '.join(DRAWS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist\nthere are: {', '.join(SPLITS)}")
    while True:
        document = DRAWS[domain](rng)
        if split_of(document.key) == split:
            return document


def examples(domain: str, n: int, seed: int = 0, split: str = "test") -> list[Example]:
    """`n` examples of a domain, the same for the same seed; by default from the part that training never saw."""
    rng = random.Random(f"{domain} {split} {seed}")
    return [example(sample(domain, rng, split)) for _ in range(n)]


def example(document: Document) -> Example:
    """A document cut before an answer: the first one of an image or code document, else the last one."""
    segments = document.segments
    answers = [index for index, (text, marked) in enumerate(segments) if marked and text != "<|eot|>"]
    cut = answers[0] if document.domain in ("shapes", "code") else answers[-1]
    text = "".join(piece for piece, _ in segments[:cut])
    if document.scene is None:
        return Example(document.domain, text, segments[cut][0])
    question = text.partition("<|image|>")[2].partition("<|eot|>")[0]
    return Example(document.domain, text, segments[cut][0], picture(document.scene), question)
