"""How well estimates follow true patching on the packaged checkpoint, domain by domain."""

import random
from collections.abc import Callable

import pandas as pd
import pytest

import llama4lab as lab
from llama4lab.run.attribution import attribute
from llama4lab.run.metrics import Metric, logit_diff
from llama4lab.run.sweeping import sweep
from llama4lab.tables.attribution import agreement, compare
from llama4lab.tiny.domains.catalogue import example
from llama4lab.tiny.domains.facts import fact
from llama4lab.tiny.domains.indirect_objects import TEMPLATES, sentence
from llama4lab.tiny.drawing import Scene, Thing, picture
from llama4lab.tiny.words import NAMES

PAIRS = 3
Pairs = tuple[lab.Prompt, lab.Prompt, Metric]
ROUTERS = ["layers.*.feed_forward.router.logits", "layers.*.feed_forward.router.gates"]
RESIDUAL = ["layers.[0246].resid_pre", "layers.[1357].resid_mid", "layers.[1357].resid_post"]


def indirect_objects(model, rng) -> Pairs:
    """Who gives, and so who receives, is exchanged."""
    clean, corrupted = [], []
    for _ in range(PAIRS):
        a, b = rng.sample(NAMES, 2)
        for giver, side in ((a, clean), (b, corrupted)):
            side.append(example(sentence(TEMPLATES[2], a, b, giver, "park", "book")))
    return _pairs(model, clean, corrupted)


def facts(model, rng) -> Pairs:
    """Another country."""
    countries = rng.sample(["France", "Spain", "Italy", "Norway", "Egypt", "Japan", "Peru", "Kenya"], 2 * PAIRS)
    sides = [[example(fact(country, "capital", 0)) for country in side] for side in (countries[::2], countries[1::2])]
    return _pairs(model, *sides)


def recall(model, rng) -> Pairs:
    """Another owner is asked about."""
    sides, answers = ([], []), ([], [])
    for _ in range(PAIRS):
        names, things = rng.sample(NAMES, 3), rng.sample(["dog", "book", "lamp", "key", "bird"], 3)
        owners = "".join(f" {name} {thing};" for name, thing in zip(names, things, strict=True))
        for side, answer, index in zip(sides, answers, rng.sample(range(3), 2), strict=True):
            side.append(f"{owners} {names[index]}")
            answer.append(f" {things[index]}")
    return model.prompt(sides[0]), model.prompt(sides[1]), logit_diff(*answers)


def shapes(model, rng) -> Pairs:
    """The same picture with a thing of another colour."""
    sides, answers = ([], []), ([], [])
    for _ in range(PAIRS):
        shape = rng.choice(["circle", "square"])
        for side, answer, colour in zip(sides, answers, rng.sample(["red", "green", "blue"], 2), strict=True):
            image = picture(Scene((Thing(shape, colour, "top left", 12.0, 12.0, 9.0),)))
            content = [{"type": "image", "image": image}, {"type": "text", "text": f"What colour is the {shape}?"}]
            side.append([{"role": "user", "content": content}])
            answer.append(colour)
    clean, corrupted = (model.prompt(side, add_generation_prompt=True) for side in sides)
    return clean, corrupted, logit_diff(*answers)


def lowest(found: pd.DataFrame, beyond: str | None = None) -> float:
    """The smallest correlation of estimates and effects, or how far it is above another one."""
    correlation = found["pearson"].to_numpy(dtype=float)
    return float((correlation if beyond is None else correlation - found[beyond].to_numpy(dtype=float)).min())


def _pairs(model, clean, corrupted) -> Pairs:
    prompts = [model.prompt([own.text for own in side]) for side in (clean, corrupted)]
    return prompts[0], prompts[1], logit_diff([own.answer for own in clean], [own.answer for own in corrupted])


DOMAINS = [indirect_objects, facts, recall, shapes]


def by_row(model, pairs: Pairs, at, steps: int) -> pd.DataFrame:
    """Estimate and effect of every cell in every row."""
    clean, corrupted, metric = pairs
    over = ["component", "layer", "position"]
    own = attribute(model, clean, corrupted, at=at, metric=metric, steps=steps).by_row(over)
    true = sweep(model, clean, corrupted, at=at, over=over, metric=metric, progress=False).by_row
    return own.merge(true[[*over, "row", "effect"]], on=[*over, "row"], validate="one_to_one")


@pytest.mark.parametrize("domain", DOMAINS)
def test_integrated_slopes_follow_patching_of_the_residual_stream(tiny, domain: Callable[..., Pairs]):
    table = by_row(tiny, domain(tiny, random.Random(0)), RESIDUAL, steps=20)
    found = agreement(table)
    assert lowest(found) > 0.9, found


@pytest.mark.parametrize("domain", DOMAINS)
def test_estimates_follow_patching_of_routers(tiny, domain: Callable[..., Pairs]):
    table = by_row(tiny, domain(tiny, random.Random(0)), ROUTERS, steps=2)
    found = agreement(table)
    assert lowest(found) > 0.95, found
    assert lowest(found, "pearson_first_order") > 0, found


@pytest.mark.parametrize("domain", [indirect_objects, facts])
def test_estimates_follow_patching_of_single_experts(tiny, domain: Callable[..., Pairs]):
    at = ["layers.*.feed_forward.experts.out", "layers.*.feed_forward.shared_expert.out"]
    slopes, halfway = (agreement(by_row(tiny, domain(tiny, random.Random(0)), at, steps)) for steps in (1, 2))
    assert lowest(slopes) > 0.8, slopes
    assert lowest(halfway) > 0.9, halfway


def test_without_steps_the_jump_lets_estimates_follow_routers(tiny):
    tables = [by_row(tiny, domain(tiny, random.Random(0)), ROUTERS[0], steps=1) for domain in DOMAINS]
    found = agreement(pd.concat(tables))
    assert lowest(found) > 0.75, found
    assert lowest(found, "pearson_first_order") > 0.05, found


def test_the_softmax_lets_estimates_follow_patching_of_queries_and_keys(tiny):
    for domain in (indirect_objects, recall):
        table = by_row(tiny, domain(tiny, random.Random(0)), ["layers.*.self_attn.q", "layers.*.self_attn.k"], steps=1)
        found = agreement(table)
        assert lowest(found) > 0.8, found
        assert lowest(found, "pearson_first_order") > 0, found


def test_means_over_pairs_follow_even_better(tiny):
    clean, corrupted, metric = indirect_objects(tiny, random.Random(0))
    own = attribute(tiny, clean, corrupted, at=RESIDUAL, metric=metric, steps=10)
    over = ["component", "layer", "position"]
    true = sweep(tiny, clean, corrupted, at=RESIDUAL, over=over, metric=metric, progress=False)
    assert lowest(agreement(compare(own, true))) > 0.95
