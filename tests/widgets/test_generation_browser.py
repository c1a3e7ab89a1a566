"""A text that is generated as one watches, as a reader uses it: in JupyterLab, in Chromium, off the network."""

import pytest

pytestmark = pytest.mark.browser

MAKE = """
import llama4lab as lab
from llama4lab.run.listening import is_hooked
from llama4lab.widgets.generation import Generation
model = lab.load()
text = "When Mary and John went to the store, John gave a drink to"
view = Generation(model, text, max_new_tokens=400, eos_token_id=None).add_class("made")
view
"""
COUNT = "view.pace.new.shape[1]"


def test_a_text_can_be_run_stopped_and_pointed_at(notebook):
    lab = notebook([MAKE], name="generation")
    lab.page.wait_for_selector(".made .l4-token")
    lab.wait_for_text(".made .l4-state", "ready: 0 of 400 tokens")

    lab.locator(".made .l4-step").click()
    lab.wait_for_python(f"(view.state, {COUNT})", "('resting', 1)")
    lab.page.wait_for_selector(".made .l4-token[data-place='15']:has-text('Mary')")

    lab.locator(".made .l4-run").click()
    lab.page.wait_for_selector(".made .l4-token[data-place='22']", timeout=90_000)
    lab.locator(".made .l4-stop").click()
    lab.wait_for_python("view.state", "'resting'")
    lab.wait_for_python("is_hooked(model)", "False")
    count = int(lab.python(COUNT))
    assert 8 <= count < 400
    lab.page.wait_for_selector(f".made .l4-state:has-text('resting: {count} of 400 tokens')")
    assert int(lab.python(COUNT)) == count

    token = ".made .l4-token[data-place='16']"
    before = lab.locator(token).evaluate("(token) => token.style.background")
    lab.locator(token).click()
    lab.wait_for_python("view.selection", "{'row': 0, 'position': 16}")
    lab.page.wait_for_selector(
        ".made .l4-cell:has-text('position 16'):has-text('NoPE'):has-text('step 1: probability')"
    )
    lab.select(".made .l4-show", "surprisal")
    lab.wait_for_python("view.show", "'surprisal'")
    changed = "([css, before]) => document.querySelector(css)?.style.background !== before"
    lab.page.wait_for_function(changed, arg=[token, before])

    lab.locator(".made .l4-again").click()
    lab.wait_for_python(f"(view.state, {COUNT})", "('ready', 0)")
    assert lab.python("lab.record(model, text).logits.shape[1]") == "15"
