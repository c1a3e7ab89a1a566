"""Sums and differences of small numbers, in signs and in words."""

import random

from llama4lab.tiny.document import Document, answer

LARGEST = 20


def draw(rng: random.Random) -> Document:
    """A random sum or difference; the unordered pair of operands decides the split."""
    return calculation(rng.choice("+-"), rng.randint(0, LARGEST), rng.randint(0, LARGEST), rng.random() < 0.3)


def calculation(sign: str, a: int, b: int, words: bool = False) -> Document:
    """The document of `a + b`, or of the larger minus the smaller."""
    if sign == "-":
        a, b = max(a, b), min(a, b)
    value = answer(f" {a + b if sign == '+' else a - b}")
    sentence = f"{a} {'plus' if sign == '+' else 'minus'} {b} is{value}."
    text = sentence if words else f"{a} {sign} {b} ={value}"
    return Document("arithmetic", text, ("arithmetic", sign, min(a, b), max(a, b)))
