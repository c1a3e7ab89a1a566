"""Drawn shapes with questions in chat form: colour, shape, number and place."""

import random

from llama4lab.tiny.document import Document, answer
from llama4lab.tiny.domains.chat import dialogue
from llama4lab.tiny.drawing import Scene, draw_scene

COUNTS = ("zero", "one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "shape_at", "colour_at", "place")


def draw(rng: random.Random) -> Document:
    """A scene of one to four things with two questions about it."""
    return questions(draw_scene(rng, rng.choices((1, 2, 3, 4), (5, 5, 3, 2))[0]), rng, 2)


def draw_search(rng: random.Random) -> Document:
    """A scene of two or three things whose questions name a thing and not its place, so that it has to be found."""
    while True:
        scene = draw_scene(rng, rng.choice((2, 2, 3)))
        different = len({thing.shape for thing in scene.things}) == len({thing.colour for thing in scene.things})
        if different and len({thing.shape for thing in scene.things}) == len(scene.things):
            return questions(scene, rng, 2, ("colour", "shape", "place"))


def questions(scene: Scene, rng: random.Random, number: int, kinds: tuple[str, ...] = KINDS) -> Document:
    """The document of a scene with `number` different questions of the given kinds."""
    asked: list[tuple[str, str]] = []
    while len(asked) < number:
        turn = question(scene, rng.choice(kinds), rng)
        if turn is not None and turn not in asked:
            asked.append(turn)
    turns = [(f"<|image|>{asked[0][0]}", asked[0][1]), *asked[1:]]
    key = ("shapes", *((thing.shape, thing.colour, thing.place) for thing in scene.things))
    return Document("shapes", dialogue(turns), key, scene)


def question(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of a kind with its one answer; None where the scene allows no such question."""
    thing = rng.choice(scene.things)
    same_shape = [other for other in scene.things if other.shape == thing.shape]
    same_colour = [other for other in scene.things if other.colour == thing.colour]
    if kind == "count":
        return "How many shapes are there?", answer(COUNTS[len(scene.things)])
    if kind == "colour":
        return (f"What colour is the {thing.shape}?", answer(thing.colour)) if len(same_shape) == 1 else None
    if kind == "shape":
        return (f"Which shape is {thing.colour}?", answer(thing.shape)) if len(same_colour) == 1 else None
    if kind == "shape_at":
        return f"Which shape is at the {thing.place}?", answer(thing.shape)
    if kind == "colour_at":
        return f"What colour is at the {thing.place}?", answer(thing.colour)
    first, _, rest = thing.place.partition(" ")
    where = answer(first) + (answer(f" {rest}") if rest else "")
    return (f"Where is the {thing.shape}?", where) if len(same_shape) == 1 else None
