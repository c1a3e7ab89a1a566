"""Pointing scores of maps made by hand."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.tables.vision import pointing


@pytest.fixture
def grid() -> pd.DataFrame:
    """A picture of 4 x 4 pixels in 2 x 2 cells, and one cell of filling below it."""
    lines = [(0, 0, 2, 2, 1.0), (2, 0, 4, 2, 6.0), (0, 2, 2, 4, -3.0), (2, 2, 4, 4, 3.0), (0, 4, 2, 4, 99.0)]
    return pd.DataFrame(lines, columns=["left", "top", "right", "bottom", "effect"])


def test_the_peak_hits_a_box_that_has_its_middle(grid):
    found = pointing(grid, (2, 0, 4, 2), value="effect").iloc[0]
    assert found["hit"]
    assert found[["left", "top", "right", "bottom", "effect"]].tolist() == [2, 0, 4, 2, 6]
    assert not pointing(grid, (3.5, 0, 4, 2), value="effect").iloc[0]["hit"]
    assert not pointing(grid, (0, 0, 2, 2), value="effect").iloc[0]["hit"]


def test_low_peaks_point_where_values_are_most_negative(grid):
    found = pointing(grid, (0, 2, 2, 4), value="effect", peak="low").iloc[0]
    assert found["hit"]
    assert found["effect"] == -3
    assert found["mass"] == 1


def test_mass_counts_cells_by_the_share_that_lies_in_the_box(grid):
    # All of the upper right cell and half of the upper left one; 1, 6 and 3 are above 0.
    found = pointing(grid, (1, 0, 4, 2), value="effect").iloc[0]
    assert found["mass"] == pytest.approx((0.5 * 1 + 6) / 10)


def test_chance_is_what_maps_without_knowledge_reach():
    rng, box = np.random.default_rng(0), (3, 2, 8, 9)
    left, top = (each.flatten() for each in np.meshgrid(np.arange(10), np.arange(10)))
    cells = pd.DataFrame({"left": left, "top": top, "right": left + 1, "bottom": top + 1})
    maps = [pointing(cells.assign(value=rng.random(100)), box, value="value") for _ in range(400)]
    found = pd.concat(maps)
    assert found["hit_by_chance"].unique().tolist() == [35 / 100]
    assert found["mass_by_chance"].iloc[0] == pytest.approx(35 / 100)
    assert found["hit"].mean() == pytest.approx(0.35, abs=0.08)
    assert found["mass"].mean() == pytest.approx(0.35, abs=0.02)


def test_of_several_equal_peaks_all_have_to_hit(grid):
    equal = grid.assign(effect=[6, 6, 0, 0, 99])
    assert not pointing(equal, (2, 0, 4, 2), value="effect").iloc[0]["hit"]
    assert pointing(equal, (0, 0, 4, 2), value="effect").iloc[0]["hit"]


def test_several_maps_are_scored_one_by_one(grid):
    both = pd.concat([grid.assign(layer=3, head=0), grid.assign(layer=5, head=0, effect=-grid["effect"])])
    found = pointing(both, (2, 0, 4, 2), value="effect", by=["layer", "head"])
    assert found[["layer", "head", "hit"]].values.tolist() == [[3, 0, True], [5, 0, False]]


def test_a_map_without_values_of_the_sign_has_no_mass(grid):
    assert np.isnan(pointing(grid.assign(effect=0.0), (0, 0, 2, 2), value="effect").iloc[0]["mass"])


def test_what_is_no_map_or_no_box_is_refused(grid):
    with pytest.raises(KeyError, match="no column 'weight'"):
        pointing(grid, (0, 0, 2, 2), value="weight")
    with pytest.raises(ValueError, match="left < right"):
        pointing(grid, (2, 0, 2, 2), value="effect")
    with pytest.raises(ValueError, match="NaN in 4 of the 4"):
        pointing(grid.assign(effect=np.nan), (0, 0, 2, 2), value="effect")
    with pytest.raises(ValueError, match="0 cells"):
        pointing(grid.iloc[4:], (0, 0, 2, 2), value="effect")
