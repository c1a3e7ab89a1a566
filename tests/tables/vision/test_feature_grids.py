"""Features by place, against the recorded tensors indexed by hand."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import numpy as np
import pytest
import torch
from PIL import Image

import llama4lab as lab
from llama4lab.tables.vision import Features, features, patch_places, token_places

PATCHES = ("vision_model.patch_embed", "vision_model.embed", "vision_model.layers.1.resid_post")
TOKENS = ("vision_model.shuffled", "vision_model.adapter", "image_features")
TEXT = ("embed_merged", "layers.1.resid_post", "layers.3.feed_forward.router.logits")
OTHERS = ("vision_model.layers.0.self_attn.q", "vision_model.layers.0.self_attn.pattern", "layers.1.self_attn.z")


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def run() -> lab.Run:
    """A row without image, a row with a wide picture of four tiles, and a padded row with two pictures."""
    model = lab.load()
    texts = ["only words", "<|image|> What is it?", "one <|image|> two <|image|>"]
    prompt = model.prompt(texts, images=[[], [noise(50, 160)], [noise(40, 30), noise(30, 40)]])
    at = [*PATCHES, *TOKENS, *TEXT, *OTHERS, "layers.1.feed_forward.router.indices"]
    return lab.record(model, prompt, at=at)


@pytest.mark.parametrize("at", PATCHES)
def test_a_patch_has_the_vector_of_its_tile_and_number(run, at):
    found = features(run, at)
    assert found.values.shape == (sum(layout.num_tiles for layout in run.prompt.images), 8, 8, 96)
    assert found.table.equals(patch_places(run.prompt))
    for line in range(0, len(found.table), 37):
        place = found.table.iloc[line]
        tile = run.prompt.images[place["image"]].tiles.start + place["tile"]
        assert torch.equal(found.rows[line], run[at][tile, place["patch"]])


@pytest.mark.parametrize("at", TOKENS)
def test_an_image_token_of_the_vision_tower_has_the_vector_of_its_tile(run, at):
    found = features(run, at)
    assert found.table.equals(token_places(run.prompt))
    assert torch.equal(found.rows, run[at].flatten(0, 1))


@pytest.mark.parametrize("at", TEXT)
def test_an_image_token_of_the_text_has_the_vector_of_its_position(run, at):
    found = features(run, at)
    assert found.values.shape[:3] == (run["image_features"].shape[0], 4, 4)
    for line, place in found.table.iterrows():
        assert torch.equal(found.rows[line], run[at][place["row"], place["position"]])


def test_features_enter_the_text_in_their_places(run):
    assert torch.equal(features(run, "image_features").values, features(run, "embed_merged").values)


def test_the_class_token_is_kept_apart(run):
    assert features(run, "vision_model.patch_embed").class_token is None
    assert features(run, "image_features").class_token is None
    found = features(run, "vision_model.embed").class_token
    assert found is not None
    assert torch.equal(found, run["vision_model.embed"][:, -1])


def test_heads_follow_one_another(run):
    at = "vision_model.layers.0.self_attn.q"
    assert torch.equal(features(run, at).values[2, 1, 3], run[at][2, 11].flatten())
    assert features(run, "layers.1.self_attn.z").values.shape[-1] == 128


def test_of_a_cut_run_only_the_images_of_its_rows_count(run):
    for at in ("vision_model.layers.1.resid_post", "image_features", "layers.1.resid_post"):
        whole, part = features(run, at), features(run.cut(rows=[2]), at)
        assert part.table["image"].unique().tolist() == [1, 2]
        own = (whole.table["row"] == 2).tolist()
        assert torch.equal(part.rows, whole.rows[own])


def test_image_tokens_that_were_cut_off_are_refused(run):
    cut = run.cut(positions=slice(10, None))
    with pytest.raises(ValueError, match="image tokens are not in the run, the first at position"):
        features(cut, "layers.1.resid_post")
    assert features(cut, "image_features").values.shape[1:3] == (4, 4), "tiles are not cut"


def test_a_hook_point_without_a_vector_for_each_place_is_refused(run):
    for at in ("vision_model.layers.0.self_attn.pattern", "layers.1.feed_forward.router.indices"):
        with pytest.raises(ValueError, match="no vector for each place"):
            features(run, at)
    with pytest.raises(KeyError, match="not recorded"):
        features(run, "vision_model.final_norm")


def test_rows_without_images_are_refused(run):
    with pytest.raises(ValueError, match="rows 0 of the prompt have none"):
        features(run.cut(rows=[0]), "image_features")


def test_patches_average_to_the_image_token_they_flow_into(run):
    patches = features(run, "vision_model.layers.1.resid_post")
    tokens = patches.by_token()
    assert tokens.table.equals(token_places(run.prompt))
    assert torch.equal(tokens.shows_picture, features(run, "image_features").shows_picture)
    for line in range(0, len(tokens.table), 11):
        place = tokens.table.iloc[line]
        own = patches.table.query(f"row == {place['row']} and position == {place['position']}").index.tolist()
        assert len(own) == 4
        assert torch.allclose(tokens.rows[line], patches.rows[own].mean(0), atol=1e-6)
    assert tokens.by_token() is tokens


def test_a_generated_run_has_the_features_of_its_prompt(run):
    model = lab.load()
    out = lab.generate(model, run.prompt, max_new_tokens=2, at=["vision_model.final_norm", "layers.1.resid_post"])
    assert features(out, "vision_model.final_norm").table.equals(patch_places(run.prompt))
    new = features(out, "layers.1.resid_post").values
    torch.testing.assert_close(new, features(run, "layers.1.resid_post").values, atol=1e-4, rtol=0)


def test_features_show_themselves_in_a_line(run):
    assert repr(features(run, "vision_model.embed")).endswith("3 images, 7 tiles of 8 x 8 patches, 96 wide")
    assert isinstance(features(run, "image_features"), Features)
