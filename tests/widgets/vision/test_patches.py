# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pytest
import traitlets
from PIL import Image

import llama4lab as lab
from llama4lab.tables import vision as tables
from llama4lab.widgets.vision import Patches


@pytest.fixture
def view(tiny, recorded) -> Patches:
    return Patches(tiny, recorded)


def numbers(view: Patches) -> np.ndarray:
    return np.frombuffer(view.cells.numbers, "<f4")


def test_cells_lie_where_the_table_says_and_have_its_numbers(view, recorded):
    for layer, at in (("vision 2", "vision_model.layers.2.resid_post"), ("input", "image_features")):
        view.layer = layer
        table = tables.norms(tables.features(recorded, at))
        own = table[(table["image"] == 0) & ~table["is_global"] & (table["right"] > table["left"])]
        assert numbers(view) == pytest.approx(own["norm"].to_numpy(), rel=1e-6)
        boxes = np.frombuffer(view.cells.boxes, "<f4").reshape(-1, 4)
        assert boxes == pytest.approx(own[["left", "top", "right", "bottom"]].to_numpy(dtype=float), abs=1e-4)
        assert view.cells.marked == np.flatnonzero(own["outlier"]).tolist()
    assert view.cells.size == [130, 60]


def test_a_click_selects_a_patch_and_shows_its_words_and_experts(view, recorded, tiny):
    view.layer = "vision 3"
    view.cells.selected = 20
    line = view.table.iloc[20]
    assert view.selection == {name: int(line[name]) for name in ("image", "tile", "patch", "position")}
    below = view.children[-1].value
    assert below.count("<tr>") == 1 + 1 + 8  # a heading, the input and eight layers
    experts = tables.experts(recorded)
    own = experts[(experts["position"] == line["position"]) & (experts["layer"] == 5)].iloc[0]
    assert f"{own['expert']} ({own['gate']:.2f})" in below


def test_a_selected_patch_stays_selected_as_the_token_it_flows_into(view):
    view.layer = "vision 1"
    view.cells.selected = 20
    position = view.selection["position"]
    view.layer = "layer 4"
    assert view.table["position"].iloc[view.cells.selected] == position
    view.tiles = "global"
    assert view.cells.selected is None
    assert view.selection["position"] == position
    view.tiles = "parts"
    assert view.table["position"].iloc[view.cells.selected] == position


def test_the_cosine_is_that_to_the_selected_place(view, recorded):
    view.drawn = "cosine"
    assert np.isnan(numbers(view)).all()
    view.cells.selected = 33
    place = view.table.iloc[33]
    assert numbers(view)[33] == pytest.approx(1, abs=1e-6)
    features = tables.features(recorded, "vision_model.layers.0.resid_post")
    own = {"tile": int(place["tile"]), "row": int(place["tile_row"]), "column": int(place["tile_column"])}
    expected = tables.similarity(features, **own, image=0)
    shown = expected[(expected["image"] == 0) & ~expected["is_global"] & (expected["right"] > expected["left"])]
    assert numbers(view) == pytest.approx(shown["cosine"].to_numpy(), rel=1e-5, abs=1e-6)


def test_what_only_some_layers_have_moves_to_the_nearest_of_them(view):
    view.layer = "layer 4"
    view.drawn = "experts"
    assert view.layer == "layer 3"
    assert view._picker.options == ("layer 1", "layer 3", "layer 5", "layer 7")
    assert np.frombuffer(view.cells.cells, np.uint8).tolist() == view.table["expert"].tolist()
    view.drawn = "norm"
    view.layer = "vision 3"
    view.drawn = "lens"
    assert view.layer == "input"
    assert len(view.cells.texts) == len(view.table)
    with pytest.raises(traitlets.TraitError, match="vision 3"):
        view.layer = "vision 3"


def test_components_are_sent_as_colours(view):
    view.drawn = "pca"
    rgb = np.frombuffer(view.cells.rgb, np.uint8).reshape(-1, 3) / 255
    assert rgb == pytest.approx(view.table[["red", "green", "blue"]].to_numpy(), abs=1 / 255)


def test_another_image_has_its_own_picture(view):
    before = view.cells.picture
    view.image = 1
    assert view.cells.size == [48, 48]
    assert view.cells.picture != before
    assert len(view.cells.labels) == 64
    view.cells.selected = 3
    picked = view.selection
    view.image = 0
    assert view.cells.selected is None
    view.selection = {}
    view.selection = picked
    assert (view.image, view.cells.selected) == (1, 3)


@pytest.mark.parametrize("drawn", ["norm", "cosine", "pca", "experts", "lens"])
def test_each_kind_has_its_static_twin_and_fallback(view, drawn):
    view.drawn = drawn
    data, _ = view._repr_mimebundle_()
    assert view.caption in data["text/html"]
    assert data["image/png"]


def test_a_prompt_is_run_and_what_is_not_there_is_refused(tiny, prompt):
    assert Patches(tiny, prompt).table["image"].unique().tolist() == [0]
    with pytest.raises(ValueError, match="no image"):
        Patches(tiny, tiny.prompt("The capital of"))
    with pytest.raises(ValueError, match="nothing to draw"):
        Patches(tiny, lab.record(tiny, prompt, at="logits"))


def test_wrong_choices_are_refused(view):
    for name, wrong in (("layer", "layer 9"), ("image", 2), ("tiles", "all"), ("selection", {"image": 0, "tile": 9})):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)


def test_a_large_picture_is_sent_small_and_keeps_its_pixels(tiny):
    large = Image.new("RGB", (3000, 1500), (90, 20, 20))
    view = Patches(tiny, tiny.prompt([{"role": "user", "content": [{"type": "image", "image": large}]}]))
    assert view.cells.size == [3000, 1500]
    assert len(view.cells.picture) < 2**20
    assert np.frombuffer(view.cells.boxes, "<f4").max() == 3000
