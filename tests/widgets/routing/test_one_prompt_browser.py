"""The views of one prompt's decisions as a reader uses them: in JupyterLab, in Chromium, off the network."""

import pytest

pytestmark = pytest.mark.browser

RUN = """
from dataclasses import replace
import llama4lab as lab
from llama4lab.widgets.routing import Decisions, TokenStrip
texts = ["The capital of France is Paris.\\nWhen Mary and John went to the store", "The capital of Indonesia is"]
run = lab.record(lab.load(), texts, at="layers.*.feed_forward.router.*")
tokens = [list(line) for line in run.prompt.tokens]
tokens[0][3] = "<img src=x onerror=alert(1)>"
run = replace(run, prompt=replace(run.prompt, tokens=tokens))
"""
CELLS = [RUN, "map = Decisions(run).add_class('map')\nmap", "strip = TokenStrip(run).add_class('strip')\nstrip"]


def test_decisions_and_the_text_can_be_pointed_at(notebook):
    lab = notebook(CELLS, name="one_prompt")
    lab.click_cell(".map", 1, 2)
    lab.wait_for_python("map.selection", "{'row': 0, 'layer': 3, 'position': 2}")
    lab.page.wait_for_selector(".map .l4-cell:has-text('token ·capital')")
    lab.wait_for_count(".map .l4-bars [data-bar]", 8)
    tip = lab.tooltip(".map", 1, 3)
    assert tip.startswith("layer 3\ntoken <img·src=x")
    assert "gate: " in tip
    assert "runner-up: " in tip
    picture = lab.drawn(".map")
    lab.select(".map .l4-row", "1")
    lab.wait_for_python("map.row", "1")
    lab.wait_for_change(".map", picture)

    text = lab.locator(".strip .l4-text")
    lab.wait_for_text(".strip .l4-text", "The capital<img src=x")
    lab.wait_for_text(".strip .l4-text", ".↵\nWhen")
    token = lab.locator(".strip .l4-token[data-place='4']")
    before = token.evaluate("(token) => token.style.background")
    lab.locator(".strip .l4-layer .noUi-handle").focus()
    lab.page.keyboard.press("ArrowRight")
    lab.wait_for_python("strip.layer", "3")
    changed = "(before) => document.querySelector('.strip [data-place=\"4\"]').style.background !== before"
    lab.page.wait_for_function(changed, arg=before)
    token.click()
    lab.wait_for_python("strip.selection", "{'row': 0, 'layer': 3, 'position': 4}")
    lab.page.wait_for_selector(".strip .l4-cell:has-text('token ·France')")
    lab.page.keyboard.press("Tab")
    text.focus()
    lab.page.keyboard.press("ArrowRight")
    lab.wait_for_python("strip.selection['position']", "5")
    lab.wait_for_text(".strip .l4-said", "position 5 token ·is expert: ")
    assert lab.page.locator(".jp-OutputArea-output img").count() == 0
