"""The views that run the model, in Chromium."""

import pytest

pytestmark = pytest.mark.browser

MODEL = """
import llama4lab as lab
from llama4lab.widgets.routing import Counterfactual, ExpertCard, GateCurve
model, text = lab.load(), "When Mary and John went to the store"
"""
CELLS = [
    MODEL,
    "others = Counterfactual(model, text).add_class('others')\nothers",
    "gates = GateCurve(model, text).add_class('gates')\ngates",
    "stats = lab.routing_stats(model, [text], vocabulary=True, progress=False)",
    "card = ExpertCard(model, stats).add_class('card')\ncard",
]


def test_counterfactuals_gates_and_cards_can_be_pointed_at(notebook):
    lab = notebook(CELLS, name="experts")
    picture = lab.drawn(".others")
    lab.click_cell(".others .l4-grid", 1, 3)
    lab.wait_for_python("others.selection", "{'row': 0, 'layer': 3, 'position': 3}")
    lab.wait_for_change(".others", picture)
    lab.page.wait_for_selector(".others .l4-bars:has-text('position 3, token ·and')")
    other = int(lab.python("int(others.table[~others.table.chosen].expert.iloc[0])"))
    lab.locator(f".others .l4-bars [data-bar='{other}']").click()
    lab.wait_for_python("others.expert", str(other))
    lab.page.wait_for_selector(f".others .l4-cell th:has-text('expert {other}')")
    lab.locator(".others .l4-gate button:has-text('original')").click()
    lab.wait_for_python("others.gate", "'original'")

    curve = lab.locator(".gates .l4-picture img").get_attribute("src")
    lab.click_cell(".gates .l4-grid", 2, 4)
    lab.wait_for_python("gates.selection", "{'row': 0, 'layer': 5, 'position': 4}")
    changed = "(before) => document.querySelector('.gates .l4-picture img').src !== before"
    lab.page.wait_for_function(changed, arg=curve, timeout=90_000)

    lab.click_cell(".card .l4-grid", 1, 1)
    lab.wait_for_python("card.selection", "{'layer': 3, 'expert': 1}")
    lab.page.wait_for_selector(".card .l4-cell:has-text('layer 3, expert 1')")
    lab.select(".card .l4-expert", "2")
    lab.wait_for_python("card.selection", "{'layer': 3, 'expert': 2}")
