"""The views of loads, groups and flow in Chromium."""

import pytest

pytestmark = pytest.mark.browser

STATS = """
import llama4lab as lab
from llama4lab.widgets.routing import ExpertLoad, Specialization, Transitions
facts = ["The capital of France is Paris.", "The capital of Indonesia is Jakarta."]
prompts = {"facts": facts, "stories": ["When Mary and John went to the store"]}
stats = lab.routing_stats(lab.load(), prompts, progress=False)
"""
CELLS = [
    STATS,
    "load = ExpertLoad(stats).add_class('load')\nload",
    "groups = Specialization(stats).add_class('groups')\ngroups",
    "flow = Transitions(stats).add_class('flow')\nflow",
]


def test_loads_groups_and_flow_can_be_pointed_at(notebook):
    lab = notebook(CELLS, name="corpus")
    lab.click_cell(".load", 2, 3)
    lab.wait_for_python("load.selection", "{'layer': 5, 'expert': 3}")
    lab.page.wait_for_selector(".load .l4-bars:has-text('layer 5')")
    picture = lab.drawn(".load")
    lab.select(".load .l4-by", "group")
    lab.wait_for_python("load.group", "'facts'")
    lab.wait_for_change(".load", picture)
    lab.select(".load .l4-group", "stories")
    lab.wait_for_python("load.group", "'stories'")
    lab.locator(".load .l4-bars [data-bar='1']").click()
    lab.wait_for_python("load.selection", "{'layer': 5, 'expert': 1}")

    picture = lab.drawn(".groups")
    lab.locator(".groups .l4-measure button:has-text('lift')").click()
    lab.wait_for_python("groups.measure", "'lift'")
    lab.wait_for_change(".groups", picture)
    lab.click_cell(".groups", 1, 2)
    lab.wait_for_python("groups.selection", "{'layer': 1, 'group': 'stories', 'expert': 2}")
    lab.page.wait_for_selector(".groups .l4-bars:has-text('expert 2')")

    assert lab.locator(".flow .l4-picture img").get_attribute("alt").startswith("flow of tokens")
    picture = lab.locator(".flow .l4-picture img").get_attribute("src")
    lab.locator(".flow .l4-layers select").select_option(label=["3", "5"])
    lab.wait_for_python("flow.layers", "(3, 5)")
    changed = "(before) => document.querySelector('.flow .l4-picture img').src !== before"
    lab.page.wait_for_function(changed, arg=picture)
    lab.click_cell(".flow .l4-grid", 0, 1)
    lab.wait_for_python("(flow.selection['from_layer'], flow.selection['to_expert'])", "(3, 1)")
    lab.page.wait_for_selector(".flow .l4-cell:has-text('of expert 0 in layer 3')")
