"""Short Python: arguments, values of variables, signs that belong to a name, loops."""

import random

from llama4lab.tiny.document import Document, answer

VARIABLES = ("x", "y", "z", "a", "b", "c", "n", "m", "k")
VARIABLES += ("value", "total", "size", "left", "right", "first", "last", "start", "stop")
FUNCTIONS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
CLASSES = ("Point", "Circle", "Player", "Node", "Queue", "Table")
FIELDS = ("name", "size", "value", "label", "colour", "length")


def draw(rng: random.Random) -> Document:
    """A snippet of a random kind; its names and numbers decide the split."""
    return rng.choice((_function, _lookup, _class, _loop, _branch))(rng)


def _function(rng: random.Random) -> Document:
    name = rng.choice(list(FUNCTIONS))
    a, b = rng.sample(VARIABLES, 2)
    text = f"def {name}({a}, {b}):\n    return{answer(' ' + a)}{answer(' ' + FUNCTIONS[name])}{answer(' ' + b)}\n"
    return Document("code", text, ("function", name, a, b))


def _lookup(rng: random.Random) -> Document:
    names, values = rng.sample(VARIABLES, 3), rng.sample(range(100), 3)
    pick = rng.randrange(3)
    lines = "".join(f"{name} = {value}\n" for name, value in zip(names, values, strict=True))
    return Document("code", f"{lines}print({names[pick]})\n#{answer(f' {values[pick]}')}\n", ("lookup", *names, pick))


def _class(rng: random.Random) -> Document:
    name, (a, b) = rng.choice(CLASSES), rng.sample(FIELDS, 2)
    text = (
        f"class {name}:\n    def init(self, {a}, {b}):\n"
        f"        self.{a} ={answer(' ' + a)}\n        self.{b} ={answer(' ' + b)}\n"
    )
    return Document("code", text, ("class", name, a, b))


def _loop(rng: random.Random) -> Document:
    item, items = rng.sample(VARIABLES, 2)
    text = f"for {item} in {items}:\n    print({answer(item)})\n"
    return Document("code", text, ("loop", item, items))


def _branch(rng: random.Random) -> Document:
    a, b = rng.sample(VARIABLES, 2)
    larger = rng.random() < 0.5
    name, sign = ("max", ">") if larger else ("min", "<")
    text = (
        f"def {name}({a}, {b}):\n    if {a}{answer(f' {sign}')} {b}:\n"
        f"        return{answer(' ' + a)}\n    return{answer(' ' + b)}\n"
    )
    return Document("code", text, ("branch", name, a, b))
