"""Places of image tokens and image patches: in the prompt, on the canvas, in the picture, and in the model."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import numpy as np
import pytest
import torch
from PIL import Image

import llama4lab as lab
from llama4lab.model.llama4 import HookedLlama4
from llama4lab.prompt.prompt import Prompt
from llama4lab.tables.vision import at_pixel, layout, patch_places, token_places
from llama4lab.tables.vision.places import BOX, CANVAS, PLACE

EDGES = list(BOX)


@pytest.fixture(scope="module")
def tiny() -> HookedLlama4:
    model = lab.load()
    assert isinstance(model, HookedLlama4)
    return model


@pytest.fixture(scope="module")
def asked(tiny) -> Prompt:
    """A long row with a wide picture of three tiles and the global one, and a padded row with two pictures."""

    def noise(height: int, width: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))

    texts = ["<|image|> What is it? " + "And again? " * 40, "one <|image|> two <|image|>"]
    return tiny.prompt(texts, images=[[noise(50, 160)], [noise(25, 20), noise(70, 60)]])


def test_every_table_begins_with_the_place_and_ends_with_the_box(asked):
    middle = ["patch", "token_row", "token_column", "position"]
    assert list(token_places(asked)) == [*PLACE, "position", *BOX]
    assert list(patch_places(asked)) == [*PLACE, *middle, *BOX]
    assert list(layout(asked)) == [*PLACE, *middle, *CANVAS, *BOX]


def test_image_tokens_stand_at_the_positions_that_the_prompt_calls_image(asked):
    found = list(token_places(asked)[["row", "position"]].itertuples(index=False, name=None))
    expected = [
        (row, position) for row, kinds in enumerate(asked.modality) for position, k in enumerate(kinds) if k == "image"
    ]
    assert found == expected
    assert asked.attention_mask[1, 0] == 0, "the second row must be padded"


def test_patches_and_image_tokens_agree_on_position_tile_and_box(asked):
    tokens = token_places(asked).set_index(["row", "position"])
    groups = patch_places(asked).groupby(["row", "position"])
    assert (groups.size() == 4).all()
    assert len(groups) == len(tokens)
    for key, patches in groups:
        token = tokens.loc[key]
        shared = patches[["image", "tile", "is_global", "token_row", "token_column"]].drop_duplicates()
        assert shared.values.tolist() == [token[["image", "tile", "is_global", "tile_row", "tile_column"]].tolist()]
        union = [*patches[["left", "top"]].min(), *patches[["right", "bottom"]].max()]
        assert union == token[EDGES].tolist()


def test_the_canvas_is_the_picture_resized_and_filled_up(asked):
    table = layout(asked)
    assert table.loc[table["image"].eq(0) & table["is_global"], list(CANVAS)].isna().all().all()
    assert table.query("image == 1")["is_global"].all()
    for number, image in enumerate(asked.images):
        own = table.loc[table["image"].eq(number) & table["canvas_left"].notna()]
        resized, size = np.array(image.tiling.resized[::-1] * 2), np.array(image.size[::-1] * 2)
        undone = np.minimum(own[list(CANVAS)].to_numpy() / resized, 1) * size
        assert own[EDGES].to_numpy() == pytest.approx(undone, rel=1e-5)


def test_every_pixel_is_shown_by_one_patch_of_the_tiles_and_one_of_the_global_tile(asked):
    for x, y in [(0, 0), (159, 49), (80, 25), (53, 0), (106.7, 31.2)]:
        lines = at_pixel(asked, x, y)
        assert lines["is_global"].tolist() == [False, True]
        assert (lines["left"] <= int(x) + 0.5).all()
        assert (lines["bottom"] > int(y) + 0.5).all()
    lines = at_pixel(asked, 19, 24, image=1)
    assert lines["is_global"].tolist() == [True], "a picture of one tile has only that"
    assert lines[["image", "row"]].values.tolist() == [[1, 1]]


def test_all_pixels_together_find_every_patch_that_shows_a_picture(asked):
    found = [at_pixel(asked, x, y, image=1)["patch"].item() for x in range(20) for y in range(25)]
    table = layout(asked).query("image == 1 and right > left and bottom > top")
    assert set(found) == set(table["patch"])
    area = (table["right"] - table["left"]) * (table["bottom"] - table["top"])
    counts = table["patch"].map(dict(zip(*np.unique(found, return_counts=True), strict=True)))
    assert (counts - area).abs().max() <= 7, "a patch has as many pixels as its area, up to those cut by its border"


@pytest.mark.parametrize("line", [0, 77, 255, 300, 400, 500])
def test_a_patch_that_is_changed_changes_the_image_token_it_is_said_to_flow_into(tiny, asked, line):
    place = patch_places(asked).iloc[line]
    tile = asked.images[place["image"]].tiles.start + place["tile"]

    def lifted(x: torch.Tensor) -> torch.Tensor:
        changed = x.clone()
        changed[tile, place["patch"]] += 1
        return changed

    before = lab.record(tiny, asked, at="embed_merged")["embed_merged"]
    with lab.patched(tiny, {"vision_model.final_norm": lifted}):
        after = lab.record(tiny, asked, at="embed_merged")["embed_merged"]
    changed = (before != after).any(-1).nonzero().tolist()
    assert changed == [[place["row"], place["position"]]]


def test_images_can_be_chosen_by_number(asked):
    assert token_places(asked, [2])["image"].unique().tolist() == [2]
    assert patch_places(asked, [-1]).equals(patch_places(asked, [2]))
    whole = token_places(asked)
    assert token_places(asked, [1]).equals(whole.query("image == 1").reset_index(drop=True))


def test_the_layout_of_a_run_that_was_saved_is_that_of_its_prompt(tiny, asked, tmp_path):
    run = lab.record(tiny, asked, at="image_features")
    run.save(tmp_path / "run.safetensors")
    back = lab.Run.load(tmp_path / "run.safetensors")
    assert layout(back).equals(layout(asked))
    assert back.prompt.images[0].tiling == asked.images[0].tiling


def test_what_is_not_there_is_refused(tiny, asked):
    with pytest.raises(ValueError, match="no image"):
        token_places(tiny.prompt("only words"))
    with pytest.raises(ValueError, match="Image 3 was asked for, but the prompt has 3: 0 to 2"):
        patch_places(asked, [3])
    with pytest.raises(ValueError, match=r"x=160, y=0 of image 0.*\n.*160 pixels wide and 50 high"):
        at_pixel(asked, 160, 0)
    with pytest.raises(ValueError, match="y=-1"):
        at_pixel(asked, 0, -1)
