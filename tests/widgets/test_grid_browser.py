"""The canvas matrix in Chromium: themes, classes, texts, large grids."""

import pytest

pytestmark = pytest.mark.browser

GRIDS = """
import numpy as np
from matplotlib.colors import Normalize
from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.widgets.grid import Grid
from llama4lab.widgets.levels import Levels
ramp = np.linspace(-1, 1, 1_000_000).reshape(1000, 1000)
ramp[5, 5] = np.nan
names = [str(place) for place in range(1000)]
large = Grid(Levels.of_numbers(ramp, Normalize(-1, 1), style.DIVERGING, title="ramp"), names, names).add_class("large")
classes = Levels.of_classes(np.array([[0, 1, -1]]), ["<b>one</b>", "two"], expert_colors(np.arange(2)), title="expert")
texts = [["<i>a</i>", "b", "c"]]
many = np.arange(128)[None]
names = [str(place) for place in range(128)]
crowd = Levels.of_classes(np.hstack([many, many[:, :20]]), names, expert_colors(many[0]), title="expert",
                          strengths=("gate", np.linspace(0, 1, 148)[None]))
crowd = Grid(crowd, ["0"], names + names[:20]).add_class("crowd")
small = Grid(classes, ["0"], ["x", "y", "z"], titles=("layer", "token"), texts=texts, notes=texts).add_class("small")
"""


def test_a_large_grid_scrolls_and_keeps_its_labels(notebook):
    lab = notebook([GRIDS, "large"], name="large")
    before = lab.drawn(".large")
    assert "no value" in lab.tooltip(".large", 5, 5)
    assert "ramp: about -0.99" in lab.tooltip(".large", 4, 5)
    lab.page.evaluate("document.querySelector('.large .l4-scroll').scrollTo(1e6, 1e6)")
    lab.wait_for_change(".large", before)
    lab.page.wait_for_function("JSON.parse(document.querySelector('.large canvas').dataset.layout).y > 1000")
    lab.click_cell(".large", 999, 999)
    lab.wait_for_python("large.selected", "[999, 999]")
    lab.page.keyboard.press("ArrowDown")
    lab.page.keyboard.press("ArrowLeft")
    lab.wait_for_python("large.selected", "[999, 998]")
    lab.page.keyboard.press("Escape")
    lab.wait_for_python("large.selected", "[]")


def test_classes_and_texts_are_named_in_legend_and_tooltip(notebook):
    lab = notebook([GRIDS, "small"], name="small")
    lab.wait_for_text(".small .l4-legend", "<b>one</b>")
    assert lab.tooltip(".small", 0, 0) == "layer 0\ntoken x\n<i>a</i>\nexpert: <b>one</b>\n<i>a</i>"
    assert "expert: no value" in lab.tooltip(".small", 0, 2)
    light = lab.drawn(".small")
    theme = "() => { void window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}); }"
    lab.page.evaluate(theme)
    lab.wait_for_change(".small", light)  # the labels have changed colour


def test_many_classes_have_a_short_legend_and_their_strength(notebook):
    lab = notebook([GRIDS, "crowd"], name="crowd")
    legend = lab.locator(".crowd .l4-legend").inner_text().split()
    assert legend[:17] == ["expert", *map(str, range(16))]
    assert " ".join(legend[17:]) == "+ 112 more gate 1 0.5 0"
    assert "gate: about 0.01" in lab.tooltip(".crowd", 0, 1)
