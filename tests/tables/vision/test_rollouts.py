"""The table of a rollout: shares at the places of the patches, and where they fall on drawn scenes."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import random

import pytest

import llama4lab as lab
from llama4lab.run.vision.rollouts import attention_rollout, gradient_rollout
from llama4lab.tables.vision import rollout
from llama4lab.tables.vision.places import patch_places
from llama4lab.tiny.domains.catalogue import example, sample


@pytest.mark.parametrize("gradient", [False, True])
def test_the_weights_are_the_shares_of_the_patches_in_order(tiny, two_rows, gradient):
    for row in (0, 1):
        table = rollout(tiny, two_rows, row=row, gradient=gradient)
        places = patch_places(two_rows).query("row == @row").reset_index(drop=True)
        assert table[places.columns.tolist()].equals(places)
        found = (gradient_rollout if gradient else attention_rollout)(tiny, two_rows, row, -1)
        for number, layout in enumerate(layout for layout in two_rows.images if layout.row == row):
            own = table.loc[table["image"] == number + (row == 1)]
            first = 0 if number == 0 else two_rows.images[number + row - 1].num_tiles
            shares = found.patches[first : first + layout.num_tiles]
            where = own["tile"].tolist(), own["patch"].tolist()
            assert own["weight"].tolist() == shares[*where].tolist()
        assert table["weight"].sum() + table.attrs["text"] + table.attrs["class_token"] == pytest.approx(1, abs=1e-5)
        assert table.attrs["position"] == two_rows.input_ids.shape[1] - 1


def test_a_metric_without_gradients_is_refused(tiny, two_rows):
    with pytest.raises(ValueError, match="gradient=True"):
        rollout(tiny, two_rows, metric=lab.metrics.log_prob(" red"))


def test_a_prompt_without_an_image_is_refused(tiny):
    with pytest.raises(ValueError, match="has no image"):
        rollout(tiny, "The capital of France is")


def test_attention_that_raises_the_answer_comes_from_the_shape_asked_for(tiny):
    """Held-out scenes of two or three things; a random patch would be on the one asked for in about 1 of 5."""
    rng, hits = random.Random("rollout"), []
    while len(hits) < 12:
        document = sample("shape_search", rng, "test")
        case = example(document)
        if document.scene is None or "colour" not in case.question:
            continue
        (thing,) = (thing for thing in document.scene.things if thing.shape in case.question)
        prompt = tiny.prompt(case.text, images=[case.image])
        table = rollout(tiny, prompt, gradient=True, metric=lab.metrics.log_prob(case.answer))
        best = table.loc[table["weight"].idxmax()]
        x, y = (best["left"] + best["right"]) / 2, (best["top"] + best["bottom"]) / 2
        hits.append(max(abs(x - thing.x), abs(y - thing.y)) <= 1.15 * thing.radius)
    assert sum(hits) >= 9
