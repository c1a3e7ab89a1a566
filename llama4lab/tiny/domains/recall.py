"""Key-value recall: who owns what, asked again after a while, within a chunk or several chunks later."""

import random

from llama4lab.tiny.document import Document, answer
from llama4lab.tiny.words import ANIMALS, NAMES, OBJECTS, PLACES

# Between owner and thing, and after the thing: a list or sentences.
LINKS = (("", ";"), (" has the", "."))
VALUES = tuple(sorted({*ANIMALS, *OBJECTS}))


def draw(rng: random.Random) -> Document:
    """Three to six owners and their things, then the same questions in another order."""
    return owners(rng, rng.randint(3, 6), filler=0)


def draw_far(rng: random.Random, filler: int | None = None) -> Document:
    """Four to eight owners, then `filler` (80 to 150) words about other things, then the questions."""
    return owners(rng, rng.randint(4, 8), rng.randint(80, 150) if filler is None else filler)


def owners(rng: random.Random, pairs: int, filler: int) -> Document:
    """The document of `pairs` owners; `filler` counts the tokens between statements and questions."""
    names, things = rng.sample(NAMES, pairs), rng.sample(VALUES, pairs)
    facts = list(zip(names, things, strict=True))
    link, stop = rng.choice(LINKS)
    stated = "".join(f" {name}{link} {thing}{stop}" for name, thing in facts)
    asked = "".join(f" {name}{link}{answer(' ' + thing)}{stop}" for name, thing in rng.sample(facts, pairs))
    between = "".join(f" The {rng.choice(PLACES)} is open." for _ in range(filler // 5))
    return Document("recall", stated + between + asked, ("recall", *names, *things))
