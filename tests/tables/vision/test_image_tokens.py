"""The table of image tokens against layouts and tensors made by hand, and against a model that sees a picture."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false

import numpy as np
import pytest
import torch

from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.tiling import Tiling
from llama4lab.tables.vision import tokens

INDICES = "layers.1.feed_forward.router.indices"


@pytest.fixture
def planted(make_prompt, make_run):
    """Row 0 has one image of one tile (2 x 2 tokens), row 1 one of two tiles and the global one, behind padding."""
    small = ImageLayout.of(Tiling((10, 20), 8, 1, 1, (4, 8)), 2, 0, 0, [1, 2, 3, 4], None)
    wide = ImageLayout.of(
        Tiling((8, 16), 8, 1, 2, (8, 16)), 2, 1, 1, [9, 10, 11, 12, 14, 15, 16, 17, 20, 21, 22, 23], None
    )
    text = "a" + " <p>" * 4 + " b" * 19, "c" + " <p>" * 4 + " x" + " <p>" * 4 + " y z" + " <p>" * 4
    prompt = make_prompt(*text, images=[small, wide])
    features = torch.zeros(4, 4, 3)
    features[..., 0] = torch.arange(16.0).reshape(4, 4)
    indices = torch.arange(2 * 24).reshape(2, 24, 1) % 7
    return make_run(prompt, {"image_features": features, INDICES: indices})


def test_every_image_token_has_its_place_in_prompt_and_picture(planted):
    table = tokens(planted)
    assert len(table) == 16
    assert table["image"].tolist() == [0] * 4 + [1] * 12
    assert table["row"].tolist() == [0] * 4 + [1] * 12
    assert table["position"].tolist()[:6] == [1, 2, 3, 4, 9, 10]
    line = table.query("image == 1 and tile == 1 and tile_row == 0 and tile_column == 1").iloc[0]
    assert line[["left", "top", "right", "bottom"]].tolist() == [12, 0, 16, 4]
    assert table.query("is_global")[["image", "tile"]].drop_duplicates().values.tolist() == [[0, 0], [1, 2]]


def test_a_token_that_shows_only_filling_has_a_box_without_area(planted):
    below = tokens(planted).query("image == 0 and tile_row == 1")
    assert (below["top"] == below["bottom"]).all()
    assert below["top"].tolist() == [10, 10]


def test_norms_are_those_of_the_token_in_its_own_tile(planted):
    assert tokens(planted)["norm"].tolist() == list(range(16))


def test_experts_are_those_at_the_token_s_position(planted):
    table = tokens(planted)
    assert table["expert_1"].tolist() == ((24 * table["row"] + table["position"]) % 7).tolist()


def test_columns_of_what_was_not_recorded_are_absent(planted):
    planted.tensors.clear()
    assert not {"norm", "expert_1"} & set(tokens(planted))


def test_a_cut_run_has_the_image_tokens_that_are_left(planted):
    whole = tokens(planted).set_index(["row", "position"])
    table = tokens(planted.cut(rows=[1], positions=slice(9, 11)))
    assert table["position"].tolist() == [9, 10]
    assert table["image"].tolist() == [1, 1]
    assert table["norm"].tolist() == whole.loc[[(1, 9), (1, 10)], "norm"].tolist()
    assert table["expert_1"].tolist() == whole.loc[[(1, 9), (1, 10)], "expert_1"].tolist()


def test_a_run_without_images_is_refused(planted, make_prompt, make_run):
    with pytest.raises(ValueError, match="no image"):
        tokens(make_run(make_prompt("a b"), {}))


def test_norms_are_those_of_the_features_that_enter_the_text(tiny_run):
    """The features of a picture are what stands at its positions once merged into the text."""
    table = tokens(tiny_run)
    merged = tiny_run["embed_merged"][0, table["position"].tolist()]
    assert table["norm"].tolist() == pytest.approx(np.linalg.norm(merged.float().numpy(), axis=-1).tolist(), rel=1e-3)
