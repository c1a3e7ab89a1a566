"""Attention onto a picture: recorded patterns against queries and keys, and what a layer lets a token see."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace

import pytest
import torch

import llama4lab as lab
from llama4lab.tables.vision import attention, vision_attention
from llama4lab.tables.vision.places import patch_places, token_places

PATTERN, ROTATED = "layers.*.self_attn.pattern", "layers.*.self_attn.[qk]_rot"
TOWER = [f"vision_model.{name}" for name in (PATTERN, ROTATED)]


@pytest.fixture(scope="module")
def run(tiny, two_rows):
    return lab.record(tiny, two_rows, at=[PATTERN, ROTATED, *TOWER])


@pytest.fixture(scope="module")
def small(new_model):
    """Chunks of 8, two query heads for each key, two experts a token."""
    return new_model(num_experts_per_tok=2)


@pytest.fixture(scope="module")
def small_run(small, small_prompt):
    return lab.record(small, small_prompt, at=[PATTERN, ROTATED, *TOWER])


def only(run: lab.Run, part: str) -> lab.Run:
    return replace(run, tensors={name: tensor for name, tensor in run.tensors.items() if part in name})


def test_weights_are_those_of_the_pattern(small_run, small_prompt):
    for row in (0, 1):
        table = attention(small_run, -1, row=row)
        places = token_places(small_prompt).query("row == @row").reset_index(drop=True)
        assert len(table) == len(places) * 5 * 4
        for (layer, head), own in table.groupby(["layer", "head"]):
            recorded = small_run[f"layers.{layer}.self_attn.pattern"][row, head, -1, own["position"].tolist()]
            assert own["weight"].to_numpy() == pytest.approx(recorded.numpy())
            assert own[places.columns.tolist()].reset_index(drop=True).equals(places)


@pytest.mark.parametrize("position", [-1, -2, -6, 12])
def test_queries_and_keys_give_what_the_pattern_has(small_run, position):
    for row in (0, 1):
        one, other = (attention(only(small_run, part), position, row=row) for part in ("pattern", "_rot"))
        assert one["weight"].to_numpy() == pytest.approx(other["weight"].to_numpy(), abs=1e-6)
        assert one.drop(columns="weight").equals(other.drop(columns="weight"))


def test_queries_and_keys_give_what_the_pattern_has_in_the_packaged_checkpoint(run):
    for row in (0, 1):
        one, other = (attention(only(run, part), -1, row=row) for part in ("pattern", "_rot"))
        assert one["weight"].to_numpy() == pytest.approx(other["weight"].to_numpy(), abs=1e-5)


def test_a_layer_shows_only_what_comes_before_in_the_same_chunk(small_run, small_prompt):
    places = small_prompt.attention_mask.cumsum(1) - 1
    for row, position in ((0, -1), (1, -1), (1, 14)):
        table = attention(small_run, position, row=row)
        query = places[row, position]
        for layer, own in table.groupby("layer"):
            keys = places[row, own["position"].tolist()]
            near = torch.ones_like(keys, dtype=torch.bool) if layer == 3 else keys // 8 == query // 8
            assert own["visible"].tolist() == ((keys <= query) & near).tolist()
        assert (table.loc[~table["visible"], "weight"] == 0).all()
        assert (table.loc[table["visible"], "weight"] > 0).all()


def test_changed_chunks_are_those_of_the_run(small, small_prompt):
    with lab.edited(small, layers=0, chunk=None):
        run = lab.record(small, small_prompt, at=ROTATED)
    table = attention(run, -1)
    assert table.query("layer == 0")["visible"].all()
    assert not table.query("layer == 1")["visible"].all()


def test_barred_keys_need_the_pattern(small, small_prompt):
    with lab.edited(small, layers=0, bar="first_token"):
        run = lab.record(small, small_prompt, at=[PATTERN, ROTATED])
    assert len(attention(run, -1, layers=0))
    with pytest.raises(KeyError, match="barred"):
        attention(only(run, "_rot"), -1, layers=0)
    assert len(attention(only(run, "_rot"), -1, layers=1))


def test_layers_and_heads_can_be_chosen(run):
    table = attention(run, -1, layers=[3, 7], heads=[1, 0])
    assert table[["layer", "head"]].drop_duplicates().values.tolist() == [[3, 1], [3, 0], [7, 1], [7, 0]]
    assert table.attrs["position"] == run.prompt.input_ids.shape[1] - 1


def test_a_cut_run_is_read_by_its_pattern_alone(run):
    cut = run.cut(rows=[1], positions=[-1])
    whole = attention(run, -1, row=1)
    assert attention(cut, -1, row=1).equals(whole)
    with pytest.raises(ValueError, match="the run was cut and has no key there"):
        attention(only(cut, "_rot"), -1, row=1)


@pytest.mark.parametrize("patch", [0, 37, "class"])
def test_weights_of_the_tower_are_those_of_its_pattern(run, two_rows, patch):
    layout = two_rows.images[2]
    table = vision_attention(run, 2, patch, image=2, tile=1)
    query = 64 if patch == "class" else patch
    pattern = run["vision_model.layers.2.self_attn.pattern"][layout.tiles.start + 1, :, query]
    places = patch_places(two_rows, [2]).query("tile == 1").reset_index(drop=True)
    for head, own in table.groupby("head"):
        assert own["weight"].to_numpy() == pytest.approx(pattern[head, own["patch"].tolist()].numpy())
        assert own[places.columns.tolist()].reset_index(drop=True).equals(places)
        assert own["weight"].sum() + own["class_weight"].iloc[0] == pytest.approx(1, abs=1e-5)


def test_queries_and_keys_of_the_tower_give_what_its_pattern_has(run, small_run):
    for own, image, tile in ((run, 0, 2), (small_run, 0, 2), (small_run, 2, 0)):
        one, other = (
            vision_attention(only(own, part), 1, 5, image=image, tile=tile, heads=1) for part in ("pattern", "_rot")
        )
        assert one["weight"].to_numpy() == pytest.approx(other["weight"].to_numpy(), abs=1e-6)
        assert set(one["head"]) == {1}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda run: attention(run, 999), IndexError, "Position 999"),
        (lambda run: attention(run, -1, row=2), IndexError, "Row 2"),
        (lambda run: attention(run, -1, layers=8), IndexError, "layers 8 was asked for"),
        (lambda run: attention(run, -1, heads=4), IndexError, "heads 4 was asked for"),
        (lambda run: attention(run, -1, heads=[]), IndexError, "heads none"),
        (lambda run: attention(run, 0, row=int(run.prompt.attention_mask[:, 0].argmin())), ValueError, "padding"),
        (lambda run: attention(run.cut(positions=[5]), -1), IndexError, "the run was cut"),
        (lambda run: attention(only(run, "layers.3."), -1, layers=[2]), KeyError, "of layer 2 was asked for"),
        (lambda run: attention(only(run, "nothing"), -1), KeyError, "of any layer"),
        (lambda run: vision_attention(run, 9, 0), KeyError, "of layer 9 of the vision tower"),
        (lambda run: vision_attention(run, 0, 64), IndexError, "patches 64"),
        (lambda run: vision_attention(run, 0, 0, tile=9), IndexError, "tiles 9"),
        (lambda run: vision_attention(run, 0, 0, image=7), ValueError, "Image 7"),
        (lambda run: vision_attention(run, 0, "cls"), ValueError, '"class" for the class token'),
    ],
)
def test_what_is_not_there_is_refused(run, call, error, message):
    with pytest.raises(error, match=message):
        call(run)


def test_a_row_without_an_image_is_refused(tiny):
    run = lab.record(tiny, "The capital of France is", at=PATTERN)
    with pytest.raises(ValueError, match="row 0 of the prompt has no image"):
        attention(run, -1)
