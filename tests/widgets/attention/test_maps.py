import numpy as np
import pytest
import traitlets
from matplotlib.colors import Normalize

from llama4lab.viz import style
from llama4lab.widgets.attention.maps import MOST_SIDE, Maps, pooled
from llama4lab.widgets.levels import MOST_CELLS, Levels


def levels(values: np.ndarray) -> Levels:
    return Levels.of_numbers(values, Normalize(0, 1), style.SEQUENTIAL, title="share")


def test_pooling_keeps_the_largest_number_of_each_block():
    rng = np.random.default_rng(0)
    values = rng.random((3, 401, 370))
    values[:, 7, 9] = 2.0
    small, step = pooled(values)
    assert step == 3
    assert small.shape == (3, 134, 124)
    assert (small[:, 2, 3] == 2.0).all()
    assert np.isclose(small[1, 133, 123], values[1, 399:, 369:].max())


def test_pooling_leaves_small_maps_alone_and_missing_numbers_out():
    values = np.full((2, 8, 8), np.nan)
    assert pooled(values)[0] is values
    large = np.full((1, 400, 400), np.nan)
    large[0, 0, 0] = 0.5
    small, _ = pooled(large)
    assert np.isfinite(small).sum() == 1
    assert small[0, 0, 0] == 0.5


@pytest.mark.parametrize("heads", [1, 40, 128])
def test_any_number_of_heads_fits_into_a_message(heads):
    small, _ = pooled(np.zeros((heads, 200, 200)))
    assert small.size <= MOST_CELLS
    assert max(small.shape[1:]) <= MOST_SIDE


def test_maps_keep_what_is_selected_while_there_are_as_many():
    maps = Maps(("row", "column"))
    cells = np.linspace(0, 1, 24).reshape(6, 4)
    maps.show(levels(cells), ["a", "b", "c"], ["0", "1"], ["0", "1", "2", "3"], frames=[[0, 0, 1, 2, True]])
    maps.selected = 2
    maps.show(levels(cells), ["d", "e", "f"], ["0", "1"], ["0", "1", "2", "3"])
    assert (maps.selected, maps.frames, maps.shape) == (2, [], [3, 2, 4])
    maps.show(levels(cells), ["a", "b"], ["0", "1", "2"], ["0", "1", "2", "3"])
    assert maps.selected is None
    with pytest.raises(traitlets.TraitError):
        maps.selected = 2
    with pytest.raises(ValueError, match="2 maps of 2 x 4"):
        maps.show(levels(cells), ["a", "b"], ["0", "1"], ["0", "1", "2", "3"])
    assert maps._repr_mimebundle_()[0]["text/html"].count("<img") == 1
