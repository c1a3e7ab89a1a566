import numpy as np
import pytest
from matplotlib.colors import LogNorm, Normalize

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.widgets.levels import MISSING, MOST_CELLS, Levels


def cells(levels: Levels) -> np.ndarray:
    return np.frombuffer(levels.cells, np.uint8).reshape(levels.shape)


def colors(levels: Levels) -> np.ndarray:
    return np.frombuffer(levels.palette, np.uint8).reshape(256, 3)


def test_levels_go_evenly_from_one_end_of_the_scale_to_the_other():
    values = np.linspace(-2, 2, 255).reshape(5, 51)
    levels = Levels.of_numbers(values, Normalize(-2, 2), style.DIVERGING, title="effect")
    assert cells(levels).ravel().tolist() == list(range(255))
    assert levels.ticks == [(0.0, "-2"), (0.5, "0"), (1.0, "2")]
    assert levels.limits == (-2, 2)


def test_colours_are_those_of_the_map():
    levels = Levels.of_numbers(np.zeros((1, 1)), Normalize(-1, 1), style.DIVERGING, title="effect")
    assert colors(levels)[cells(levels)[0, 0]].tolist() == pytest.approx([255, 255, 255], abs=2)
    for level in (0, 100, 254):
        wanted = 255 * np.array(style.DIVERGING(level / 254)[:3])
        assert np.allclose(colors(levels)[level], wanted, atol=1)


def test_what_lies_outside_the_scale_has_the_colour_of_its_end():
    values = np.array([[-9.0, 9.0, np.inf, -np.inf]])
    assert cells(Levels.of_numbers(values, Normalize(0, 1), style.SEQUENTIAL, title="x")).tolist() == [[0, 254, 254, 0]]


def test_a_cell_without_a_number_is_none_of_the_levels():
    levels = Levels.of_numbers(np.array([[np.nan, 0.0, 1.0]]), Normalize(0, 1), style.SEQUENTIAL, title="x")
    assert cells(levels).tolist() == [[MISSING, 0, 254]]


def test_tooltips_have_the_exact_numbers_of_grids_that_are_not_large():
    values = np.array([[0.123456, np.nan]])
    levels = Levels.of_numbers(values, Normalize(0, 1), style.SEQUENTIAL, title="x")
    assert np.array_equal(np.frombuffer(levels.numbers, "<f4"), values[0].astype("f4"), equal_nan=True)
    large = Levels.of_numbers(np.zeros((1000, 1000)), Normalize(0, 1), style.SEQUENTIAL, title="x")
    assert large.numbers == b""
    assert len(large.cells) <= MOST_CELLS


def test_classes_have_their_own_colours():
    palette = expert_colors(np.arange(128))
    levels = Levels.of_classes(np.array([[0, 127], [-1, 3]]), list(map(str, range(128))), palette, title="expert")
    assert cells(levels).tolist() == [[0, 127], [MISSING, 3]]
    assert np.allclose(colors(levels)[:128], 255 * palette, atol=0.5)
    assert levels.names[127] == "127"


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"2000 x 2000 cells .* 1 to 1,048,576"):
        Levels.of_numbers(np.zeros((2000, 2000)), Normalize(0, 1), style.SEQUENTIAL, title="x")
    with pytest.raises(ValueError, match="0 x 3 cells"):
        Levels.of_numbers(np.zeros((0, 3)), Normalize(0, 1), style.SEQUENTIAL, title="x")
    with pytest.raises(ValueError, match="two ends"):
        Levels.of_numbers(np.zeros((1, 1)), Normalize(), style.SEQUENTIAL, title="x")
    with pytest.raises(ValueError, match="not linear"):
        Levels.of_numbers(np.ones((1, 1)), LogNorm(1, 100), style.SEQUENTIAL, title="x")
    with pytest.raises(ValueError, match="1 names and 1 colours for classes up to 1"):
        Levels.of_classes(np.array([[0, 1]]), ["a"], np.zeros((1, 3)), title="x")


def test_classes_can_be_faint():
    classes, gates = np.array([[0, 1, -1]]), np.array([[0.0, 1.0, np.nan]])
    names, palette = ["0", "1"], expert_colors(np.arange(2))
    levels = Levels.of_classes(classes, names, palette, title="expert", strengths=("gate", gates))
    assert list(levels.strengths) == [0, 255, 0]
    assert levels.strength_title == "gate"
    with pytest.raises(ValueError, match=r"strengths for \(1, 2\) cells and classes for \(1, 3\)"):
        Levels.of_classes(classes, names, palette, title="expert", strengths=("gate", np.zeros((1, 2))))
