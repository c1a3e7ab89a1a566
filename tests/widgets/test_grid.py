import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import traitlets
from matplotlib.colors import Normalize
from PIL import Image

from llama4lab.viz import style
from llama4lab.widgets.grid import Grid
from llama4lab.widgets.levels import Levels

HOSTILE = "<img src=x onerror=alert(1)>"


def levels(rows: int = 2, columns: int = 3, title: str = "effect") -> Levels:
    values = np.linspace(-1, 1, rows * columns).reshape(rows, columns)
    return Levels.of_numbers(values, Normalize(-1, 1), style.DIVERGING, title=title)


@pytest.fixture
def grid() -> Grid:
    return Grid(levels(), ["0", "1"], ["a", "b", "c"], titles=("layer", "token"), upward=True)


def test_what_is_sent_is_the_picture(grid):
    state = grid.get_state()
    assert state["cells"] == levels().cells
    assert state["shape"] == [2, 3]
    assert state["titles"] == ["layer", "token", "effect"]
    assert state["numbers"] == levels().numbers
    assert "export default" in state["_esm"]


def test_another_picture_comes_as_one_message(grid, monkeypatch):
    sent = []
    monkeypatch.setattr(grid, "_send", lambda message, buffers=None: sent.append(message))
    grid.show(levels(4, 1), list("abcd"), ["x"], texts=[["1"], ["2"], ["3"], ["4"]])
    (update,) = (message for message in sent if message["method"] == "update")
    assert {"shape", "rows", "columns", "texts", "version"} <= update["state"].keys()
    assert ["cells"] in update["buffer_paths"]
    assert (grid.version, grid.texts) == (2, ["1", "2", "3", "4"])


def test_a_selected_cell_stays_where_the_new_picture_has_it(grid):
    grid.selected = [1, 2]
    grid.show(levels(2, 3), ["0", "1"], ["a", "b", "c"])
    assert grid.selected == [1, 2]
    grid.show(levels(2, 2), ["0", "1"], ["a", "b"])
    assert grid.selected == []


def test_a_cell_that_is_not_there_cannot_be_selected(grid):
    for wrong in ([2, 0], [0, 3], [-1, 0], [1]):
        with pytest.raises(traitlets.TraitError, match="the grid has 2 x 3"):
            grid.selected = wrong


def test_labels_that_do_not_fit_are_refused(grid):
    with pytest.raises(ValueError, match=r"1 rows and 3 columns have labels; the grid has \(2, 3\)"):
        grid.show(levels(), ["0"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="one for each of"):
        grid.show(levels(), ["0", "1"], ["a", "b", "c"], texts=[["x"] * 3])


def test_a_saved_notebook_has_a_picture_without_a_script(grid):
    bundle, _ = grid._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.width > 100
    assert bundle["image/png"] in bundle["text/html"]
    assert "<script" not in bundle["text/html"]
    assert plt.get_fignums() == []  # else the notebook would show the figure once more


def test_the_picture_is_the_twin_where_there_is_one():
    drawn = []

    def twin():
        drawn.append(plt.subplots()[1])
        return drawn[-1]

    grid = Grid(levels(), ["0", "1"], ["a", "b", "c"], twin=twin)
    grid._repr_mimebundle_()
    assert len(drawn) == 1


def test_the_plain_picture_has_the_colours_of_the_grid(grid):
    ax = grid.draw()
    palette = np.frombuffer(grid.palette, np.uint8).reshape(256, 3)
    shown = np.asarray(ax.images[0].get_array())
    assert np.allclose(shown, palette[np.frombuffer(grid.cells, np.uint8).reshape(2, 3)] / 255)
    assert not ax.yaxis_inverted()
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("token", "layer", "effect")


def test_the_picture_of_a_large_grid_has_labels_that_can_be_read():
    grid = Grid(levels(3, 500), list("abc"), [f"$t{i}$" for i in range(500)])
    assert len(grid.draw().get_xticks()) <= 40
    grid._repr_mimebundle_()


def test_titles_never_become_html():
    grid = Grid(levels(title=HOSTILE), ["0", "1"], [HOSTILE] * 3, titles=(HOSTILE, HOSTILE))
    html = grid._repr_mimebundle_()[0]["text/html"]
    assert html.count("<img") == 1  # the picture
    assert "&lt;img" in html
