"""The logit lens as a reader uses it: in JupyterLab, in Chromium, off the network."""

import pytest

pytestmark = pytest.mark.browser

CELLS = [
    """
import llama4lab as lab
from llama4lab.run.residual_stream import RESIDUAL
from llama4lab.widgets.logits import LogitLens
model = lab.load()
run = lab.record(model, ["When Mary and John went to the store", "The capital of Indonesia is"], at=RESIDUAL)
""",
    "view = LogitLens(model, run)\nview",
]
GRID = ".l4-grid"


def test_controls_and_clicks_reach_python_and_come_back(notebook):
    lab = notebook(CELLS, name="lens")
    picture = lab.drawn(GRID)
    lab.select(".l4-row", "1")
    lab.wait_for_python("view.row", "1")
    picture = lab.wait_for_change(GRID, picture)

    lab.click_cell(GRID, 4, 5)
    lab.wait_for_python("view.selection", "{'hook_point': 'layers.4.resid_post', 'position': 8}")
    lab.page.wait_for_selector(".l4-cell td:has-text('·Jakarta')")
    lab.page.keyboard.press("ArrowDown")
    lab.wait_for_python("view.selection['hook_point']", "'layers.3.resid_post'")
    lab.wait_for_text(".l4-cell", "layers.3.resid_post, position 8, token ·is")

    tip = lab.tooltip(GRID, 7, 5)
    assert "·Jakarta" in tip
    assert "probability of the best token: 0.99" in tip

    picture = lab.drawn(GRID)
    lab.locator(".l4-column button:has-text('divergence')").click()
    lab.wait_for_python("view.column", "'kl'")
    picture = lab.wait_for_change(GRID, picture)
    lab.page.wait_for_selector(".l4-legend:has-text('divergence from the model')")
    lab.locator(".l4-kind button:has-text('all')").click()
    lab.wait_for_python("view.kind", "'all'")
    lab.wait_for_change(GRID, picture)
    assert lab.python("view.selection['hook_point']") == "'layers.3.resid_post'"
