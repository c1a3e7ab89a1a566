"""The view of a sweep as a reader uses it: in JupyterLab, in Chromium, off the network."""

import json

import pytest

pytestmark = pytest.mark.browser

SWEEP = """
import llama4lab as lab
from llama4lab.widgets.patching import Effects
clean = "When Mary and John went to the store, John gave a drink to"
corrupted = clean.replace(", John", ", Mary")
metric = lab.metrics.logit_diff(" Mary", " John")
sweep = lab.sweep(lab.load(), [clean] * 2, [corrupted] * 2, at="layers.*.self_attn.z",
                  over=["layer", "head", "position"], metric=metric, progress=False)
"""
HOSTILE = """
from dataclasses import replace
evil = "<img src=x onerror=alert(1)>"
prompt = replace(sweep.prompt, tokens=[[evil] * 15] * 2, tokenizer=None)
view = Effects(replace(sweep, prompt=prompt, metric=evil, vocabulary=dict.fromkeys(range(2000), evil)))
view
"""
GRID, DONE = ".l4-grid", "ALL-CELLS-RAN"


def test_controls_and_clicks_reach_python_and_come_back(notebook):
    lab = notebook([SWEEP, "view = Effects(sweep)\nview.part = {'head': 1}\nview"], name="effects")
    lab.locator(".l4-column button:has-text('patched')").click()
    lab.wait_for_python("view.column", "'patched'")
    lab.page.wait_for_selector(".l4-legend:has-text('logit difference when patched')")
    picture = lab.drawn(GRID)
    lab.locator(".l4-part-head .noUi-handle").focus()
    lab.page.keyboard.press("ArrowLeft")
    lab.wait_for_python("view.part", "{'head': 0}")
    lab.wait_for_change(GRID, picture)
    lab.select(".l4-row", "1")
    lab.wait_for_python("view.row", "1")

    lab.click_cell(GRID, 3, 10)
    lab.wait_for_python("view.grid.selected", "[3, 10]")
    assert lab.python("(view.selection['layer'], view.selection['position'])") == "(3, 10)"
    lab.page.wait_for_selector(".l4-cell td")
    lab.wait_for_text(".l4-cell", "position 10, token ·Mary")
    lab.page.keyboard.press("ArrowUp")
    lab.wait_for_python("view.grid.selected", "[4, 10]")

    tip = lab.tooltip(GRID, 7, 14)
    assert tip.startswith("layer 7\ntoken, position ·to 14\nlogit difference when patched: ")
    shown = float(tip.rpartition(" ")[2])
    cells = lab.python("float(view.table.query('layer == 7 and position == 14')['patched'].iloc[0])")
    assert shown == pytest.approx(float(cells), rel=1e-3)

    before = lab.drawn(GRID)
    lab.python("view.set_trait('selection', dict(view.selection, layer=0, position=1))")
    lab.wait_for_change(GRID, before)


def test_a_saved_notebook_shows_the_picture_on_another_machine(notebook):
    lab = notebook([SWEEP, "Effects(sweep)"], name="saved")
    lab.locator(f"{GRID} canvas[data-v]")
    saved = lab.save()
    (output,) = saved["cells"][1]["outputs"]
    assert "<script" not in json.dumps(output["data"]["text/html"])
    # A notebook that comes from elsewhere is not trusted: JupyterLab shows no widgets and runs no scripts of it.
    saved["metadata"]["from"] = "elsewhere"
    copy = notebook(saved=saved, name="copy")
    picture = copy.page.locator(".jp-OutputArea-output img[alt*='normalised effect']")
    picture.wait_for()
    shown = "image => image.complete && image.naturalWidth > 100"
    copy.page.wait_for_function(shown, arg=picture.element_handle())
    assert copy.page.locator("canvas[data-v]").count() == 0


def test_tokens_never_become_html(notebook):
    lab = notebook([SWEEP, HOSTILE], name="hostile")
    asked = []
    lab.page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    lab.click_cell(GRID, 3, 10)
    lab.page.wait_for_selector(".l4-cell td")
    lab.wait_for_text(".l4-cell", "<img·src=x")
    assert "<img·src=x" in lab.tooltip(GRID, 2, 5)
    lab.wait_for_text(".l4-legend", "<img src=x")
    assert lab.page.locator(".jp-OutputArea-output img").count() == 0
    assert asked == []
