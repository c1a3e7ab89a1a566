"""Drawn scenes: one to four coloured shapes on a dark ground, as numbers and as a picture."""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 48
SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "white": (240, 240, 240),
}
# The centre of each place and the half size that fits into it, in pixels of a 48 x 48 image.
PLACES = {
    "top left": (12, 12),
    "top right": (36, 12),
    "bottom left": (12, 36),
    "bottom right": (36, 36),
    "centre": (24, 24),
}
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One drawn shape: `x`, `y` and `radius` in pixels, `angle` in radians."""

    shape: str
    colour: str
    place: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """The things of an image and the grey level of its ground."""

    things: tuple[Thing, ...]
    ground: int = 20

    def at(self, place: str) -> Thing | None:
        """The thing at a place, or None."""
        return next((thing for thing in self.things if thing.place == place), None)


def draw_scene(rng: random.Random, count: int) -> Scene:
    """A random scene of `count` things; a single thing may be large and in the centre."""
    if count == 1 and rng.random() < 0.3:
        places, low, high = ["centre"], 12.0, 20.0
    else:
        places, low, high = rng.sample([place for place in PLACES if place != "centre"], count), 8.0, 11.0
    things = []
    for place in places:
        radius = rng.uniform(low, high)
        slack = (24.0 if place == "centre" else 12.0) - radius
        x, y = (centre + rng.uniform(-slack, slack) for centre in PLACES[place])
        things.append(Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), place, x, y, radius, rng.uniform(-0.2, 0.2)))
    return Scene(tuple(things), rng.randrange(0, 60))


def picture(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 48 x 48 pixels."""
    scale = _SUPERSAMPLING
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (scene.ground,) * 3)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        for outline in _outlines(thing):
            canvas.polygon([(x * scale, y * scale) for x, y in outline], fill=COLOURS[thing.colour])
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def pixels(scene: Scene) -> np.ndarray:
    """The scene as uint8 of shape [3, 48, 48]."""
    return np.asarray(picture(scene)).transpose(2, 0, 1)


def _outlines(thing: Thing) -> list[list[tuple[float, float]]]:
    """The polygons of a shape in image coordinates (y grows downwards)."""
    if thing.shape == "circle":
        polar = [[(2 * math.pi * k / 32, 1.0) for k in range(32)]]
    elif thing.shape == "square":
        polar = [[(math.pi / 4 + math.pi / 2 * k, 1.15) for k in range(4)]]
    elif thing.shape == "triangle":
        polar = [[(-math.pi / 2 + 2 * math.pi / 3 * k, 1.15) for k in range(3)]]
    elif thing.shape == "star":
        polar = [[(-math.pi / 2 + math.pi / 5 * k, 1.15 if k % 2 == 0 else 0.45) for k in range(10)]]
    else:  # a cross is two bars
        half = math.atan2(0.3, 1.0)
        polar = [
            [(turn + sign * half + (math.pi if back else 0.0), math.hypot(1.0, 0.3)) for back, sign in _BAR]
            for turn in (0.0, math.pi / 2)
        ]
    return [
        [
            (
                thing.x + thing.radius * length * math.cos(angle + thing.angle),
                thing.y + thing.radius * length * math.sin(angle + thing.angle),
            )
            for angle, length in outline
        ]
        for outline in polar
    ]


# The corners of a bar in drawing order: at the near or far end, above or below its axis.
_BAR = ((False, -1), (False, 1), (True, -1), (True, 1))
