import matplotlib.pyplot as plt
import numpy as np
import pytest
import traitlets

from llama4lab.viz.expert_colors import expert_colors
from llama4lab.widgets.bars import Bars


@pytest.fixture
def bars() -> Bars:
    view = Bars()
    details = {
        "titles": ("expert", "logit"),
        "marks": ["", "●", ""],
        "mark_names": {"●": "chosen"},
        "line": (0.5, "mean"),
    }
    view.show(np.array([[-1.0, 2.0, -np.inf]]), ["0", "1", "2"], expert_colors(np.arange(3)), "logits", **details)
    return view


def test_what_is_sent_are_the_heights(bars):
    assert bars.heights.tolist() == [[-1.0, 2.0, -np.inf]]
    assert bars.limits[0] == -1
    assert bars.limits[1] > 2  # room for the mark
    assert (bars.line, bars.line_title, bars.version) == (0.5, "mean", 1)


def test_a_bar_stays_selected_where_there_are_as_many(bars):
    bars.selected = 2
    bars.show(np.zeros((1, 3)), ["a", "b", "c"], np.zeros((3, 3)), "others")
    assert (bars.selected, bars.limits, bars.line) == (2, [0.0, 1.0], None)
    bars.show(np.zeros((2, 2)), ["a", "b"], np.zeros((2, 3)), "series", series=["x", "y"])
    assert bars.selected is None
    with pytest.raises(traitlets.TraitError, match="bars 0 to 1"):
        bars.selected = 2


def test_bars_that_lack_something_are_refused(bars):
    with pytest.raises(ValueError, match="3 bars; give one of names, notes for each"):
        bars.show(np.zeros((1, 3)), ["a"], np.zeros((3, 3)), "x", notes=["a"])
    with pytest.raises(ValueError, match="give one of colors"):
        bars.show(np.zeros((1, 3)), ["a", "b", "c"], np.zeros((1, 3)), "x")


def test_the_plain_picture_has_the_bars(bars):
    ax = bars.draw()
    assert [bar.get_height() for bar in ax.patches][:2] == [-1, 2]
    bars._repr_mimebundle_()
    assert plt.get_fignums() == [ax.figure.number]
