"""The views of a picture as a reader uses them: in JupyterLab, in Chromium, off the network."""

import pytest

pytestmark = pytest.mark.browser

RUN = """
import random
import llama4lab as lab
from PIL import Image
from llama4lab.tiny import drawing
from llama4lab.widgets.vision import ImageAttention, Patches
model = lab.load()
scene = drawing.draw_scene(random.Random(5), 4)
wide = Image.new("RGB", (130, 60), (20, 20, 20))
wide.paste(drawing.picture(scene), (5, 6))
text = {"type": "text", "text": f"What colour is at the {scene.things[0].place}?"}
prompt = model.prompt([{"role": "user", "content": [{"type": "image", "image": wide}, text]}])
"""
CELLS = [
    RUN,
    "patches = Patches(model, prompt).add_class('patches')\npatches",
    "looks = ImageAttention(model, prompt).add_class('looks')\nlooks",
]


DARK = "() => { void window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}); }"


def place(lab, css: str, x: float, y: float) -> dict[str, float]:
    """Where a pixel of the picture is on the canvas."""
    scale = float(lab.locator(f"{css} canvas[data-v]").get_attribute("data-scale"))
    return {"x": x * scale, "y": y * scale}


def test_patches_can_be_pointed_at(notebook):
    lab = notebook(CELLS[:2], name="patches")
    before = lab.drawn(".patches")
    canvas = lab.locator(".patches canvas[data-v]")
    canvas.hover(position=place(lab, ".patches", 70, 20))
    tip = lab.page.locator(".patches .l4-tip").first.inner_text()
    assert tip.startswith("tile 1, row 2, column 1\npatch 17, flows into position ")
    canvas.click(position=place(lab, ".patches", 70, 20))
    lab.wait_for_python("(patches.selection['tile'], patches.selection['patch'])", "(1, 17)")
    lab.page.wait_for_selector(".patches .l4-cell:has-text('words of the lens')")
    lab.page.locator(".patches button:has-text('cosine')").click()
    lab.wait_for_python("patches.drawn", "'cosine'")
    lab.wait_for_change(".patches", before)
    lab.page.locator(".patches button:has-text('lens')").click()
    lab.wait_for_python("patches.layer", "'input'")
    before = lab.drawn(".patches")
    lab.select(".patches .l4-layer", "layer 5")
    lab.wait_for_python("patches.layer", "'layer 5'")
    lab.wait_for_change(".patches", before)
    lab.locator(".patches canvas[data-v]").focus()
    lab.page.keyboard.press("ArrowRight")
    lab.wait_for_python("(patches.selection['tile'], patches.selection['patch'])", "(1, 18)")
    lab.page.keyboard.press("Escape")
    lab.wait_for_python("patches.selection", "{}")
    lab.page.locator(".patches button:has-text('global')").click()
    lab.wait_for_python("(patches.tiles, len(patches.cells.labels))", "('global', 16)")


def test_attention_follows_the_token_the_head_and_the_patch(notebook):
    lab = notebook([CELLS[0], CELLS[2]], name="image_attention")
    before = lab.drawn(".looks")
    lab.page.locator(".looks .l4-token:has-text('colour')").click()
    lab.wait_for_python("prompt.tokens[0][looks.position]", "' colour'")
    before = lab.wait_for_change(".looks", before)
    lab.page.locator(".looks [data-bar='2']").click()
    lab.wait_for_python("looks.head", "2")
    before = lab.wait_for_change(".looks", before)
    lab.page.locator(".looks button:has-text('image patch')").click()
    lab.wait_for_python("looks.looking", "'image patch'")
    lab.wait_for_change(".looks", before)
    lab.locator(".looks canvas[data-v]").click(position=place(lab, ".looks", 10, 20))
    lab.wait_for_python("(looks.selection['tile'], looks.selection['patch'])", "(0, 17)")
    lab.select(".looks .l4-vision_head", "3")
    lab.wait_for_python("looks.vision_head", "3")


def test_the_dark_theme_keeps_picture_and_selection(notebook):
    lab = notebook(CELLS[:2], name="dark_patches")
    lab.locator(".patches canvas[data-v]").click(position=place(lab, ".patches", 70, 20))
    lab.wait_for_python("patches.selection['patch']", "17")
    picture = lab.drawn(".patches")
    lab.page.evaluate(DARK)
    lab.page.wait_for_selector("body[data-jp-theme-light='false']", state="attached")
    lab.page.wait_for_function(
        "() => getComputedStyle(document.querySelector('.patches .l4-root')).color !== 'rgb(0, 0, 0)'"
    )
    assert lab.drawn(".patches").startswith("data:image/png")
    assert len(lab.drawn(".patches")) > len(picture) // 2
    assert lab.python("patches.selection['patch']") == "17"
