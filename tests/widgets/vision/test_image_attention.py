import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.tables import vision as tables
from llama4lab.widgets.vision import ImageAttention


@pytest.fixture
def view(tiny, recorded) -> ImageAttention:
    return ImageAttention(tiny, recorded)


def numbers(view: ImageAttention) -> np.ndarray:
    return np.frombuffer(view.cells.numbers, "<f4")


def seen(table, weight: str = "weight"):
    own = table[(table["image"] == 0) & ~table["is_global"] & (table["right"] > table["left"])]
    return own[weight].to_numpy()


def test_the_last_token_looks_first_with_the_mean_of_all_heads(view, recorded):
    assert view.position == recorded.positions[-1]
    assert view.text.positions[view.text.selected] == view.position
    heads = [tables.attention(recorded, view.position, layers=7, heads=head) for head in range(4)]
    assert numbers(view) == pytest.approx(np.mean([seen(table) for table in heads], axis=0), abs=1e-7)


def test_token_layer_and_head_can_be_picked(view, recorded):
    view.text.selected = len(view.text.tokens) - 3
    view.layer = 3
    view.bars.selected = 2
    assert (view.position, view.head) == (view.text.positions[-3], 2)
    expected = tables.attention(recorded, view.position, layers=3, heads=2)
    assert numbers(view) == pytest.approx(seen(expected), abs=1e-7)
    whole = expected[expected["image"] == 0]["weight"].sum()
    assert np.frombuffer(view.bars.values, "<f4")[2] == pytest.approx(whole, rel=1e-5)
    view.position = view.text.positions[5]
    assert view.text.selected == 5


def test_a_patch_looks_at_its_tile_and_others_can_still_be_picked(view, recorded):
    view.looking = "image patch"
    assert np.isnan(numbers(view)).all()
    view.cells.selected = 20
    assert view.cells.marked == [20]
    view.vision_layer, view.vision_head = 1, 3
    tile, patch = view.selection["tile"], view.selection["patch"]
    expected = tables.vision_attention(recorded, 1, patch, image=0, tile=tile, heads=3)
    own = view.table["tile"].to_numpy() == tile
    assert numbers(view)[own] == pytest.approx(seen(expected), abs=1e-7)
    assert np.isnan(numbers(view)[~own]).all()
    other = int(np.flatnonzero(~own)[0])
    view.cells.selected = other
    assert view.selection["tile"] != tile


def test_both_have_their_static_twin(view):
    assert "attention of position" in view._repr_mimebundle_()[0]["text/html"]
    view.looking = "image patch"
    assert view._repr_mimebundle_()[0]["image/png"]
    view.cells.selected = 3
    assert "attention of patch 3" in view._repr_mimebundle_()[0]["text/html"]


def test_wrong_choices_are_refused(view, tiny, prompt):
    wrong = {"layer": 8, "vision_layer": 4, "head": 4, "vision_head": -2, "position": 10**6, "looking": "tile"}
    for name, value in wrong.items():
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, value)
    with pytest.raises(ValueError, match="not recorded"):
        ImageAttention(tiny, lab.record(tiny, prompt, at="layers.3.self_attn.pattern"))


def test_another_image_is_looked_at_by_the_same_token(view):
    position = view.position
    view.image = 1
    assert view.position == position
    assert view.cells.size == [48, 48]
    assert len(view.cells.labels) == 16
