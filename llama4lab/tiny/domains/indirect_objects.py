"""Indirect objects: of two people the one who does not give is the one who receives."""

import random

from llama4lab.tiny.document import Document, answer
from llama4lab.tiny.words import NAMES, OBJECTS, PLACES

TEMPLATES = (
    "When {a} and {b} went to the {place}, {giver} gave a {thing} to{receiver}.",
    "Then {a} and {b} went to the {place}, and {giver} gave the {thing} to{receiver}.",
    "After {a} and {b} met at the {place}, {giver} handed a {thing} to{receiver}.",
    "{a} and {b} were at the {place}. {giver} passed the {thing} to{receiver}.",
    "While {a} and {b} worked at the {place}, {giver} sold a {thing} to{receiver}.",
    "The {place} was quiet when {a} and {b} came. {giver} showed a {thing} to{receiver}.",
)


def draw(rng: random.Random) -> Document:
    """A sentence of a random template; the pair of names decides the split."""
    a, b = rng.sample(NAMES, 2)
    return sentence(rng.choice(TEMPLATES), a, b, rng.choice((a, b)), rng.choice(PLACES), rng.choice(OBJECTS))


def sentence(template: str, a: str, b: str, giver: str, place: str, thing: str) -> Document:
    """The document of one sentence; `giver` is `a` or `b`, the other one is the answer."""
    receiver = b if giver == a else a
    text = template.format(a=a, b=b, giver=giver, place=place, thing=thing, receiver=answer(f" {receiver}"))
    return Document("indirect_objects", text, ("indirect_objects", *sorted((a, b))))
