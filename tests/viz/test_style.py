# matplotlib and pandas declare what they give as wide unions.
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pytest
from matplotlib import pyplot as plt

from llama4lab.viz import style
from llama4lab.viz.expert_colors import as_seen


def test_lightness_of_the_sequential_map_only_falls():
    lightness = as_seen(style.SEQUENTIAL(np.linspace(0, 1, 50))[:, :3])[:, 0]
    assert (np.diff(lightness) < 0).all()


def test_zero_is_white_on_the_diverging_map_whatever_the_range():
    norm = style.centred(np.array([-0.1, 4.0, np.nan]))
    assert style.DIVERGING(norm(0.0)) == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert (norm.vmin, norm.vmax) == (-4, 4)
    assert style.centred(np.array([0.0])).vmax == 1


@pytest.mark.parametrize("blindness", ["protan", "deutan", "tritan"])
def test_both_ends_of_the_diverging_map_stay_apart_for_every_reader(blindness: str):
    ends = as_seen(style.DIVERGING(np.array([0.2, 0.8]))[:, :3], blindness)
    assert np.linalg.norm(ends[0] - ends[1]) > 0.1


def test_ink_can_be_read_on_light_and_dark():
    assert style.ink_on("white") == style.INK
    assert style.ink_on("#0b2447") == "white"


def test_numbers_are_left_out_where_they_would_be_too_small():
    assert style.number_size(20.0, 20.0, 7) == style.number_size(20.0, 20.0, 12) == 8.5
    assert style.number_size(8.0, 20.0, 127) == 0


def test_a_new_figure_stays_within_a_page():
    size = style.axes(None, 500.0, 0.1).figure.get_size_inches()
    assert size.tolist() == [15, 1.8]


def test_sides_of_the_frame_are_kept_as_asked():
    ax = plt.figure().add_subplot()
    style.plain(ax, keep=("left",))
    assert [side for side, spine in ax.spines.items() if spine.get_visible()] == ["left"]
