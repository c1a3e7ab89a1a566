# matplotlib and pandas declare what they give as wide unions.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import style
from llama4lab.viz.patching import effects, measure_label, scale, scatter


def table(effect=None, **axes) -> pd.DataFrame:
    """Every combination of the values, as a sweep into the corrupted run; clean is 3, corrupted is -1."""
    lines = pd.MultiIndex.from_product(list(axes.values()), names=list(axes)).to_frame(index=False)
    if "position" in axes:
        lines.insert(list(axes).index("position") + 1, "token", [f" t{position}" for position in lines["position"]])
    effect = np.linspace(-1, 4, len(lines)) if effect is None else np.asarray(effect, dtype=float)
    lines = lines.assign(patched=effect - 1, clean=3.0, corrupted=-1.0, effect=effect, normalised=effect / 4)
    lines = lines.assign(effect_std=0.5, pairs=2)
    lines.attrs = {"metric": "logit difference", "into": "corrupted"}
    return lines


def test_cells_are_coloured_around_no_effect():
    ax = effects(table(layer=range(3), position=range(4)))
    picture = ax.images[0]
    assert np.allclose(np.asarray(picture.get_array()), np.linspace(-1, 4, 12).reshape(3, 4) / 4)
    assert picture.get_clim() == (-1, 1)
    assert picture.cmap(picture.norm(np.array(0.0))) == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert not ax.yaxis_inverted()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("token", "layer")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["·t0", "·t1", "·t2", "·t3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "2"]
    label = picture.colorbar.ax.get_ylabel()
    assert " ".join(label.split()) == "normalised effect on logit difference (0: corrupted, 1: clean)"


def test_the_metric_itself_is_white_where_nothing_was_patched():
    cells = table(layer=range(3), head=range(4))
    norm = effects(cells, column="patched").images[0].norm
    assert (norm.vmin, norm.vmax) == (-5, 3)
    assert style.DIVERGING(norm(np.array(-1.0))) == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert "white: corrupted run" in measure_label(cells, "patched")


def test_maps_can_share_one_scale():
    cells = table(layer=range(3), head=range(4))
    assert effects(cells, column="effect", limit=10).images[0].get_clim() == (-10, 10)
    assert scale(cells, "effect").vmax == 4
    with pytest.raises(ValueError, match="limit=0"):
        effects(cells, limit=0)


def test_heads_of_a_layer_lie_together():
    ax = effects(table(layer=[1, 2], head=range(3), position=range(4)))
    assert ax.get_ylabel() == "layer.head"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2"]
    assert [line.get_ydata()[0] for line in ax.lines] == [2.5]


def test_rows_without_room_are_named_by_their_layer():
    ax = effects(table(layer=range(12), head=range(40), position=range(4)), ax=plt.subplots(figsize=(5, 4))[1])
    assert ax.get_ylabel() == "layer (inside: head upwards)"
    assert [label.get_text() for label in ax.get_yticklabels()] == [str(layer) for layer in range(12)]
    assert ax.get_yticks()[0] == 19.5


def test_a_cell_that_has_not_run_is_marked(written):
    assert written(effects(table([1, 2, np.nan, 4], layer=[0, 1], head=[0, 1]))) == ["×"]


def test_one_axis_has_bars_with_the_spread_over_pairs():
    ax = effects(table([1, -2, 3], layer=range(3)), column="effect")
    spread, bars = ax.containers
    assert [bar.get_height() for bar in bars] == [1, -2, 3]
    assert [end[1] - end[0] for end in (part[:, 1] for part in spread[2][0].get_segments())] == [1, 1, 1]
    assert ax.get_xlabel() == "layer"
    assert " ".join(ax.get_ylabel().split()) == "effect on logit difference"


def test_names_are_beside_lying_bars():
    ax = effects(table([1, -2], hook_point=["layers.0.resid_pre", "layers.1.resid_pre"]))
    assert [bar.get_width() for bar in ax.containers[0]] == [0.25, -0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["layers.0.resid_pre", "layers.1.resid_pre"]
    assert ax.yaxis_inverted()


def test_bars_of_positions_have_tokens():
    ax = effects(table([1, 2, 3], position=range(3)))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["·t0", "·t1", "·t2"]


def test_an_axis_with_one_value_is_the_title():
    assert effects(table(layer=[5], head=[2], position=range(3))).get_title() == "layer 5"


def test_estimates_are_drawn_like_effects():
    cells = table(layer=range(3), head=range(2)).rename(columns={"effect": "estimate"})
    assert "estimated effect" in effects(cells, column="estimate").images[0].colorbar.ax.get_ylabel()


def test_a_column_without_numbers_is_refused():
    with pytest.raises(ValueError, match=r'no number in any cell.\n.*draw column="effect"'):
        effects(table([np.nan] * 4, layer=[0, 1], head=[0, 1]))


def compared(count: int = 40) -> pd.DataFrame:
    effect = np.linspace(-2, 6, count)
    cells = pd.DataFrame({"layer": np.arange(count), "component": ["z", "out"] * (count // 2)})
    cells = cells.assign(effect=effect, estimate=0.5 * effect + np.sin(effect))
    cells.attrs = {"metric": "logit difference", "into": "corrupted"}
    return cells


def test_estimates_stand_against_effects_on_equal_axes(written):
    cells = compared()
    ax = scatter(cells)
    dots = np.concatenate([np.asarray(part.get_offsets()) for part in ax.collections])
    assert {tuple(dot) for dot in dots} == set(zip(cells["effect"], cells["estimate"], strict=True))
    r = np.corrcoef(cells["effect"], cells["estimate"])[0, 1]
    assert written(ax) == [f"r = {r:.3f}"]
    assert ax.get_xlim() == ax.get_ylim()
    diagonal = ax.lines[0]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == list(ax.get_xlim())
    assert ax.get_xlabel() == "effect on logit difference"
    assert ax.get_ylabel() == "estimated effect on logit difference"


def test_components_have_their_own_colour_and_correlation():
    cells = compared()
    ax = scatter(cells)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    own = cells[cells["component"] == "z"]
    assert names[0] == f"z (r = {np.corrcoef(own['effect'], own['estimate'])[0, 1]:.3f})"
    assert len({tuple(part.get_facecolor()[0]) for part in ax.collections}) == 2
    assert scatter(own).get_legend() is None
    assert scatter(cells.drop(columns="component")).get_legend() is None


def test_a_correlation_that_is_not_defined_says_so(written):
    assert written(scatter(compared().assign(estimate=1.0))) == ["r undefined"]


def test_a_scatter_without_its_numbers_is_refused():
    with pytest.raises(ValueError, match="no column 'estimate'"):
        scatter(compared().drop(columns="estimate"))
    cells = compared()
    cells.loc[3, "effect"] = np.nan
    with pytest.raises(ValueError, match="no number for 1 of 40 cells"):
        scatter(cells)
