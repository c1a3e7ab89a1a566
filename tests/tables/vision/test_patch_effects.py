"""Sweeps over places of an image keep their numbers when they are laid over the picture."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false

import numpy as np
import pytest
from PIL import Image

import llama4lab as lab
from llama4lab.tables.vision import sweep_places

METRIC = lab.metrics.logit_diff(" red", " blue")
LAST = "vision_model.layers.3.resid_post"


@pytest.fixture(scope="module")
def tiny() -> lab.HookedLlama4:
    model = lab.load()
    assert isinstance(model, lab.HookedLlama4)
    return model


def about(model: lab.HookedLlama4, *sizes: tuple[int, int], seed: int) -> lab.Prompt:
    """A prompt with pictures of random pixels."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return model.prompt("<|image|>" * len(sizes) + " What is it?", images=pictures)


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[lab.Prompt, lab.Prompt]:
    """A picture of one tile, and a wide one of two tiles and the global one."""
    first, second = (about(tiny, (48, 48), (40, 90), seed=seed) for seed in (0, 1))
    return first, second


def swept(model, pair, at, over) -> lab.Sweep:
    return lab.sweep(model, *pair, at=at, over=over, metric=METRIC, progress=False)


def test_patches_have_the_effects_of_their_cells_and_their_places(tiny, pair):
    sweep = swept(tiny, pair, LAST, {"layer": None, "tile": None, "patch": [0, 9, 63, 64]})
    table = sweep_places(sweep)
    assert len(table) == 4 * 3  # the class token, 64, shows no part of the picture
    cells = sweep.table.set_index(["tile", "patch"])
    for line in table.itertuples():
        tile = line.tile + (0 if line.image == 0 else 1)
        assert line.effect == cells.loc[(tile, line.patch), "effect"]
        assert (line.tile_row * 8 + line.tile_column, line.layer) == (line.patch, 3)
    shown = table.query("image == 1 and tile == 1 and patch == 0").iloc[0]
    assert shown["left"] == 48  # it fits on two tiles as it is
    assert table.query("is_global")["image"].tolist() == [0] * 3 + [1] * 3
    assert list(table)[:6] == ["row", "image", "tile", "is_global", "tile_row", "tile_column"]


def test_image_tokens_and_positions_agree_where_the_same_is_patched(tiny, pair):
    """What is patched at the features of an image token is what enters the text model at its position."""
    tokens = sweep_places(swept(tiny, pair, "image_features", ["tile", "image_token"]))
    positions = sweep_places(swept(tiny, pair, "embed_merged", ["position"]))
    assert len(tokens) == len(positions) == 4 * 16
    joined = tokens.merge(positions, on=["image", "tile", "tile_row", "tile_column", "position", "left", "bottom"])
    assert len(joined) == 4 * 16
    assert joined["effect_x"].to_numpy() == pytest.approx(joined["effect_y"].to_numpy(), abs=1e-3)


def test_one_tile_needs_no_axis_of_tiles(tiny):
    single = about(tiny, (48, 48), seed=0), about(tiny, (48, 48), seed=1)
    with_tile, without = (
        sweep_places(swept(tiny, single, LAST, {**axes, "patch": [3, 8]})) for axes in ({"tile": None}, {})
    )
    columns = ["tile", "patch", "effect"]
    assert with_tile[columns].equals(without[columns])
    assert without.attrs == {"metric": "logit difference", "into": "corrupted"}


def test_layers_and_components_become_columns(tiny, pair):
    at = [f"vision_model.layers.{layer}.{part}" for layer in (0, 2) for part in ("self_attn.z", "mlp.out")]
    table = sweep_places(swept(tiny, pair, at, {"component": None, "layer": None, "tile": [1], "patch": [5]}))
    assert sorted(zip(table["component"], table["layer"], strict=True)) == sorted(
        (f"vision_model.{part}", layer) for layer in (0, 2) for part in ("self_attn.z", "mlp.out")
    )
    assert (table["image"] == 1).all()


def test_sweeps_that_are_no_map_of_a_picture_are_refused(tiny, pair):
    with pytest.raises(ValueError, match="goes over layer, head"):
        sweep_places(swept(tiny, pair, "layers.0.self_attn.z", ["layer", "head"]))
    with pytest.raises(ValueError, match="all 4 tiles at once"):
        sweep_places(swept(tiny, pair, LAST, {"patch": [1]}))
    with pytest.raises(ValueError, match=r"joins the places \(1, 2\)"):
        sweep_places(swept(tiny, pair, LAST, {"tile": [0], "patch": [(1, 2)]}))
