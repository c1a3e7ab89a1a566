"""The horizon is what boolean matrices say, and what a changed token changes."""

import random
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.model.token_layout import plain_layout
from llama4lab.run.attention.editing import edited
from llama4lab.run.recording import record
from llama4lab.tables.attention.horizons import horizon

NEVER = 99


@pytest.fixture(scope="module")
def small(new_text_model):
    """Six layers in float64: NoPE in 3 and, by the config, 5."""
    rope = [1, 1, 1, 0, 1, 0]
    return new_text_model(num_hidden_layers=6, no_rope_layers=rope, layer_types=None, dtype=torch.float64)


def spread(table: Any, column: str, length: int) -> np.ndarray:
    """One column as [layer, position]; NEVER where it is missing."""
    found = np.full((table["layer"].max() + 1, length), -1)
    for line in table.itertuples():
        value = getattr(line, column)
        found[line.layer, line.start : line.stop] = NEVER if value is pd.NA else value
    return found


def dense(model, length: int, source: int) -> tuple[np.ndarray, np.ndarray]:
    """Hops and first layer of every position behind every layer, from who sees whom."""
    hops, since = np.full(length, NEVER), np.full(length, NEVER)
    hops[source], lines = 0, []
    layout = plain_layout(1, length, 0, 0, torch.device("cpu"))
    for number, layer in enumerate(model.text.layers):
        visible = layout.visible(layer.self_attn.chunk_size, 0, length)[0].numpy()
        visible[:, [0 if key == "first_token" else key for key in layer.self_attn.barred]] = False
        np.fill_diagonal(visible, False)
        through = np.where(visible, hops, NEVER).min(1) + 1
        new = np.minimum(hops, through)
        since[(hops == NEVER) & (new < NEVER)] = number
        hops = np.minimum(new, NEVER)
        lines.append((hops, since.copy()))
    return np.stack([line[0] for line in lines]), np.stack([line[1] for line in lines])


@pytest.mark.parametrize("seed", range(40))
def test_reach_hops_and_layers_are_those_of_dense_matrices(small, seed):
    rng = random.Random(seed)
    length = rng.randint(1, 30)
    source = rng.randrange(length) if seed % 2 else 0
    with ExitStack() as stack:
        for layer in range(6):
            stack.enter_context(edited(small, layers=layer, chunk=rng.choice([None, 1, 3, 4, 8, 8, 8])))
            if rng.random() < 0.3:
                keys = [rng.randrange(length) for _ in range(3)]
                stack.enter_context(edited(small, layers=layer, bar=[*keys, "first_token", source][seed % 3 :]))
        table: Any = horizon(small, length, source=source)
        hops, since = dense(small, length, source)
    assert np.array_equal(spread(table, "hops", length), hops)
    assert np.array_equal(spread(table, "since", length), since)
    assert np.array_equal(spread(table, "reached", length), hops < NEVER)
    merged = table.groupby("layer").apply(lambda own: (own["stop"].shift()[1:] == own["start"][1:]).all())
    assert merged.all()


@pytest.mark.parametrize("barred", [(), (3,), (3, 5)], ids=str)
@pytest.mark.parametrize("source", [0, 10])
def test_another_token_changes_exactly_the_positions_within_the_horizon(small, random_ids, barred, source):
    ids = random_ids(1, 30)
    other = ids.clone()
    other[0, source] = ids[0, source] % 100 + 1
    with ExitStack() as stack:
        if barred:
            stack.enter_context(edited(small, layers=barred, bar="earlier"))
        runs = [record(small, each, at="layers.*.resid_post") for each in (ids, other)]
    changed = [(runs[0][name] - runs[1][name]).abs().amax(-1)[0] > 1e-10 for name in runs[0]]
    reached = spread(horizon(small, 30, source=source, barred=barred), "reached", 30)
    assert np.array_equal(torch.stack(changed).numpy(), reached.astype(bool))


def test_gradients_come_from_the_source_exactly_within_the_horizon(small, random_ids):
    run = record(small, random_ids(1, 20), at=["embed", "layers.*.resid_post"], grad=True)
    reached = spread(horizon(small, 20, source=2), "reached", 20)
    for layer in range(6):
        for position in (1, 2, 6, 7, 8, 19):
            (slope,) = torch.autograd.grad(
                run[f"layers.{layer}.resid_post"][0, position].sum(), run["embed"], retain_graph=True
            )
            assert bool(slope[0, 2].abs().sum() > 0) == reached[layer, position]


def test_a_long_text_takes_few_lines(small):
    table: Any = horizon(small, 10_000_000)
    assert len(table) < 30
    last = table[table["layer"] == 5]
    assert last["reached"].all()
    assert last["stop"].max() == 10_000_000
    ends = table[table["reached"]].groupby("layer")["stop"].max().tolist()
    assert ends == [8, 8, 8, *[10_000_000] * 3]
    barred: Any = horizon(small, 10_000_000, barred=3)
    assert barred[barred["reached"]].groupby("layer")["stop"].max().tolist() == [*[8] * 5, 10_000_000]
    assert barred.loc[barred["layer"] == 3, "chunk_size"].eq(8).all()


def test_the_tiny_checkpoint_crosses_borders_in_layer_3():
    from_start: Any = horizon(load(), 300)
    far = from_start[(from_start["start"] <= 299) & (from_start["stop"] > 299)]
    assert far["since"].dropna().unique().tolist() == [3]
    assert from_start.loc[from_start["kind"] == "nope", "layer"].unique().tolist() == [3, 7]


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ({"source": 9}, IndexError, "positions 0 to 8"),
        ({"barred": 0}, ValueError, "never sees"),
        ({"barred": [7]}, IndexError, "layers 0 to 5"),
    ],
)
def test_wrong_wishes_are_refused(small, asked, kind, message):
    with pytest.raises(kind, match=message):
        horizon(small, 9, **asked)


def test_a_model_without_chunks_has_nothing_to_bar(new_text_model):
    model = new_text_model(attention_chunk_size=None)
    assert horizon(model, 50)["reached"].to_numpy().all()
    with pytest.raises(ValueError, match="has no chunks"):
        horizon(model, 50, barred=3)
