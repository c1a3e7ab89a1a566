"""The views of attention as a reader uses them: in JupyterLab, in Chromium, off the network."""

import pytest

pytestmark = pytest.mark.browser

RUN = """
from dataclasses import replace
import llama4lab as lab
from llama4lab.widgets.attention import ChunkMap, Distances, Horizon, Needle, Patterns
model = lab.load()
text = "When Mary and John went to the store, John gave a drink to Mary.\\n" * 5
names = [f"layers.*.self_attn.{name}" for name in ("pattern", "v", "q_rot", "k_rot")]
run = lab.record(model, text, at=names)
tokens = [list(line) for line in run.prompt.tokens]
tokens[0][3] = "<img src=x onerror=alert(1)>"
run = replace(run, prompt=replace(run.prompt, tokens=tokens))
"""
PATTERNS = [RUN, "view = Patterns(run).add_class('view')\nview"]
SUMS = [
    RUN,
    "chunks = ChunkMap(run).add_class('chunks')\nchunks",
    "far = Distances(run).add_class('far')\nfar",
]
REACH = [
    RUN,
    "reach = Horizon(model, 1000).add_class('reach')\nreach",
    "needle = Needle(model, distances=[5, 20], borders=[-1, 0], n=2).add_class('needle')\nneedle",
]


def test_patterns_can_be_pointed_at(notebook):
    lab = notebook(PATTERNS, name="patterns")
    lab.wait_for_count(".view .l4-maps canvas", 4)
    picture = lab.drawn(".view .l4-grid")
    lab.locator(".view [data-map='2']").click()
    lab.wait_for_python("view.head", "2")
    picture = lab.wait_for_change(".view .l4-grid", picture)
    lab.locator(".view .l4-layer .noUi-handle").focus()
    for layer in "123":
        lab.page.keyboard.press("ArrowRight")
        lab.wait_for_python("view.layer", layer)
    picture = lab.wait_for_change(".view .l4-grid", picture)

    lab.click_cell(".view .l4-grid", 5, 3)
    expected = "{'row': 0, 'layer': 3, 'head': 2, 'query': 5, 'key': 3}"
    lab.wait_for_python("view.selection", expected)
    lab.page.wait_for_selector(".view .l4-cell:has-text('query 5 ·went')")
    lab.page.wait_for_selector(".view .l4-bars:has-text('keys of query 5 ·went')")
    lab.wait_for_count(".view .l4-bars [data-bar]", 6)
    tip = lab.tooltip(".view .l4-grid", 5, 3)
    assert tip.startswith("query ·went 5\nkey <img·src=x")
    assert "attention: " in tip

    lab.locator(".view .l4-bars [data-bar='1']").click()
    lab.wait_for_python("view.selection['key']", "1")
    lab.locator(".view .l4-weighting button:has-text('value-weighted')").click()
    lab.wait_for_python("view.weighting", "'value-weighted'")
    lab.page.wait_for_selector(".view .l4-bars .l4-legend:has-text('value-weighted')")
    assert lab.page.locator(".jp-OutputArea-output img").count() == 0


def test_sums_of_attention_can_be_pointed_at(notebook):
    lab = notebook(SUMS, name="sums")
    picture = lab.drawn(".chunks .l4-grid")
    lab.locator(".chunks [data-map='1']").click()
    lab.wait_for_python("chunks.head", "0")
    lab.wait_for_change(".chunks .l4-grid", picture)
    lab.page.wait_for_selector(".chunks .l4-cell:has-text('layer 3 (NoPE), head 0')")
    assert "queries 64–127, keys 0–63" in lab.tooltip(".chunks .l4-grid", 1, 0)
    lab.click_cell(".chunks .l4-grid", 1, 0)
    lab.wait_for_python("chunks.selection['key_chunk']", "0")
    lab.page.wait_for_selector(".chunks .l4-bars:has-text('attention from chunk 1 to chunk 0')")
    lab.locator(".chunks .l4-bars [data-bar='3']").click()
    lab.wait_for_python("chunks.selection['head']", "3")

    lab.locator(".far .l4-curves [data-line='7'].l4-line-name").click()
    lab.wait_for_python("far.layer", "7")
    lab.page.wait_for_selector(".far .l4-curves:has-text('layer 7 (NoPE), by head')")
    lab.page.wait_for_selector(".far .l4-curves .l4-line.l4-faint[data-line='0']")
    lab.select(".far .l4-head", "2")
    lab.wait_for_python("far.by_head.selected", "2")
    lab.locator(".far .l4-curves circle").hover()
    lab.wait_for_text(".far .l4-tip", "distance from the query back to the key (tokens): 0")


def test_reach_and_needles_answer_to_barred_layers(notebook):
    lab = notebook(REACH, name="reach")
    picture = lab.drawn(".reach .l4-grid")
    lab.locator(".reach .l4-barred button:has-text('3')").click()
    lab.wait_for_python("reach.barred", "(3,)")
    lab.wait_for_change(".reach .l4-grid", picture)
    lab.click_cell(".reach .l4-grid", 7, 50)
    lab.wait_for_python("reach.selection", "{'layer': 7, 'position': 400}")
    lab.page.wait_for_selector(".reach .l4-cell:has-text('reached in 1 step, first by layer 7')")
    source = lab.locator(".reach .l4-source input")
    source.fill("300")
    source.press("Enter")
    lab.wait_for_python("reach.source", "300")
    lab.page.wait_for_selector(".reach .l4-grid:has-text('steps from position 300')")

    lab.locator(".needle .l4-barred button:has-text('7')").click()
    lab.wait_for_python("needle.barred", "(7,)")
    lab.page.wait_for_selector(".needle .l4-curves:has-text('7 barred')", timeout=90_000)
    lab.locator(".needle .l4-line-name:has-text('all layers')").click()
    lab.wait_for_python("needle.barred", "()")
    lab.select(".needle .l4-border", "fact 1 behind a border")
    lab.wait_for_python("needle.border", "0")
    lab.page.wait_for_selector(".needle .l4-curves:has-text('fact 1 behind a border')")
