"""Random word sequences that repeat: nothing but copying predicts the second round."""

import random
from collections.abc import Sequence

from llama4lab.tiny.document import Document, answer
from llama4lab.tiny.domains.facts import COUNTRIES
from llama4lab.tiny.drawing import COLOURS, SHAPES
from llama4lab.tiny.words import ANIMALS, COMMON, NAMES, OBJECTS, PLACES

_LISTS = (NAMES, PLACES, OBJECTS, ANIMALS, COUNTRIES, COLOURS, SHAPES, [word for word in COMMON if word.isalpha()])
_CAPITALS = {facts["capital"] for facts in COUNTRIES.values()}
WORDS = tuple(sorted(_CAPITALS.union(*_LISTS)))


def draw(rng: random.Random) -> Document:
    """A sequence of 4 to 20 distinct words, two to four times within 60 tokens."""
    length = rng.randint(4, 20)
    rounds = rng.randint(2, max(2, min(4, 60 // length)))
    return repeated(rng.sample(WORDS, length), rounds)


def draw_long(rng: random.Random) -> Document:
    """A sequence of 40 to 100 words, twice: the first round is farther away than one chunk."""
    return repeated(rng.sample(WORDS, rng.randint(40, 100)), 2)


def repeated(words: Sequence[str], rounds: int) -> Document:
    """The document of a sequence; from the second round on all but the first word are answers."""
    first = "".join(f" {word}" for word in words)
    again = f" {words[0]}" + "".join(answer(f" {word}") for word in words[1:])
    return Document("induction", first + again * (rounds - 1), ("induction", *words))
