# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.expert_colors import as_seen, expert_color
from llama4lab.viz.vision.looks import look_of


def test_the_kind_of_a_column_is_known_by_its_name_or_its_type():
    table = pd.DataFrame({"expert_3": [1, 2], "effect": [1.0, -3.0], "norm": [1.0, 2.0], "token": ["a", "b"]})
    table = table.assign(expert=0, segment=[0, 1], outlier=[True, False])
    kinds = {str(column): look_of(table, str(column)).kind for column in table}
    assert kinds == {
        **{"expert_3": "experts", "expert": "experts", "effect": "effects", "norm": "scale"},
        **{"token": "classes", "segment": "classes", "outlier": "classes"},
    }


def test_effects_are_symmetric_around_zero_and_weights_begin_there():
    table = pd.DataFrame({"effect": [1.0, -3.0], "weight": [0.2, 0.5], "norm": [2.0, 5.0]})
    ranges = {column: look_of(table, column).norm for column in ("effect", "weight", "norm")}
    assert {name: (norm.vmin, norm.vmax) for name, norm in ranges.items() if norm is not None} == {
        "effect": (-3.0, 3.0),
        "weight": (0.0, 0.5),
        "norm": (2.0, 5.0),
    }


def test_nothing_is_not_drawn_and_more_is_less_transparent():
    table = pd.DataFrame({"effect": [1.0, -3.0], "weight": [0.2, 0.5]})
    opacity = look_of(table, "weight").color_map(0.8)(np.linspace(0, 1, 9))[:, 3]
    assert opacity[0] == 0
    assert opacity[-1] == pytest.approx(0.8)
    assert (np.diff(opacity) >= 0).all()
    effects = look_of(table, "effect").color_map(0.8)
    assert effects(0.5)[3] < 0.01
    assert effects(0.0)[3] == effects(1.0)[3] == pytest.approx(0.8)


@pytest.mark.parametrize("blindness", [None, "protan", "deutan", "tritan"])
def test_more_weight_is_brighter_on_a_dark_and_on_a_bright_picture(blindness):
    look = look_of(pd.DataFrame({"weight": [0.0, 1.0]}), "weight")
    colors = look.color_map(0.75)(np.linspace(0.2, 1, 9))
    lightness = as_seen(colors[:, :3], blindness)[:, 0]
    assert (np.diff(lightness) > 0).all()


@pytest.mark.parametrize("blindness", [None, "protan", "deutan", "tritan"])
def test_effects_of_both_signs_are_told_apart_by_everyone(blindness):
    look = look_of(pd.DataFrame({"effect": [-1.0, 1.0]}), "effect")
    low, high = look.color_map(1.0)([0.1, 0.9])[:, :3]
    assert np.linalg.norm(np.diff(as_seen(np.stack([low, high]), blindness), axis=0)) > 0.15


def test_classes_beyond_the_most_frequent_share_a_grey():
    table = pd.DataFrame({"token": [f"t{number}" for number in range(20)] + ["t19"]})
    look = look_of(table, "token")
    assert look.names[0] == "t19"
    assert look.colors(["t19"])[0] == pytest.approx(expert_color(0))
    labels = [patch.get_label() for patch in look.patches(table["token"])]
    assert len(labels) == 16
    assert labels[-1] == "5 others"


def test_what_cannot_be_drawn_is_refused():
    table = pd.DataFrame({"weight": [np.nan], "norm": [1.0]})
    with pytest.raises(KeyError, match="weight"):
        look_of(table, "weigth")
    with pytest.raises(ValueError, match="no number"):
        look_of(table, "weight")
