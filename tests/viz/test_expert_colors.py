import numpy as np
import pytest

from llama4lab.viz.expert_colors import BLINDNESS, NUM_COLORS, as_seen, expert_color, expert_colors, faded


def nearest(count: int, blindness: str | None) -> float:
    """The smallest distance between two of the first colours, as a reader sees them."""
    seen = as_seen(expert_colors(np.arange(count)), blindness)
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    return float((distances + 9 * np.eye(count)).min())


@pytest.mark.parametrize("blindness", [None, *BLINDNESS])
@pytest.mark.parametrize(("count", "apart"), [(8, 0.07), (16, 0.07), (128, 0.02)])
def test_colours_stay_apart_for_every_reader(count: int, apart: float, blindness: str | None):
    """0.02 in Oklab is about the least difference that can be seen side by side."""
    assert nearest(count, blindness) > apart


def test_sixteen_colours_differ_in_lightness_too():
    lightness = as_seen(expert_colors(np.arange(16)))[:, 0]
    assert np.ptp(lightness) > 0.4


def test_the_colour_of_an_expert_does_not_depend_on_the_others():
    assert (expert_colors(np.array([[3, 90], [127, 3]]))[1, 1] == expert_color(3)).all()


def test_colours_come_again_after_the_last():
    assert (expert_color(NUM_COLORS + 2) == expert_color(2)).all()


def test_a_gate_of_zero_leaves_a_quarter_of_the_colour():
    color = expert_color(5)
    assert expert_color(5, 0.0) == pytest.approx(1 - 0.25 * (1 - color))
    assert faded(color, 1.0) == pytest.approx(color)


def test_white_and_grey_have_no_colour_in_oklab():
    seen = as_seen(np.array([[1.0, 1, 1], [0.5, 0.5, 0.5]]))
    assert seen[0, 0] == pytest.approx(1, abs=1e-3)
    assert np.abs(seen[:, 1:]).max() < 1e-3
