"""Rows for training: whole documents inside chunks, weights on answers, pixels beside their tokens."""

import random

import pytest
import torch
from tokenizers import Tokenizer

from llama4lab.prompt.images import ImageProcessor
from llama4lab.tiny.architecture import CHUNK, LONG
from llama4lab.tiny.domains.facts import fact
from llama4lab.tiny.drawing import SHAPES, Scene, Thing, draw_scene, picture
from llama4lab.tiny.export import HERE
from llama4lab.tiny.packing import PATCHES, Packer, patch_labels, scene_pixels
from llama4lab.tiny.schedule import ALL, STAGES, STEPS, stage_at


@pytest.fixture(scope="module")
def packer():
    return Packer(Tokenizer.from_file(str(HERE / "tokenizer.json")))


def test_only_the_answer_has_full_weight(packer):
    ids, weights = packer.tokens(fact("France", "capital", 0))
    assert (
        packer.tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight == 1.0])
        == " Paris"
    )
    assert weights[0] == 0.0
    assert all(0.0 < weight < 0.2 for weight in weights[1:6])


def test_short_documents_do_not_cross_a_chunk(packer):
    mixture = {domain: share for domain, share in ALL.items() if "far" not in domain}
    rows = packer.pack(mixture, 6, LONG, random.Random(0))
    begins = rows.ids == packer.bos
    for row in range(6):
        starts = begins[row].nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], LONG], strict=True):
            used = (rows.groups[row, start:stop] >= 0).sum().item()
            assert start // CHUNK == (start + used - 1) // CHUNK


def test_every_scene_has_its_patch_tokens(packer):
    rows = packer.pack({"shapes": 1.0}, 4, LONG, random.Random(0))
    pixels = rows.pixel_values()
    patch = packer.tokenizer.token_to_id("<|patch|>")
    assert pixels is not None
    assert (rows.ids == patch).sum() == PATCHES * pixels.shape[0]


def test_training_sees_the_pixels_that_the_image_processor_gives():
    scene = draw_scene(random.Random(1), 3)
    processed = ImageProcessor.from_pretrained(HERE)([picture(scene)], return_tensors="pt")
    assert torch.allclose(processed["pixel_values"].float(), scene_pixels([scene]), atol=0.01)


def test_patch_labels_mark_the_quarter_of_a_thing():
    labels = patch_labels([Scene((Thing("cross", "red", "top right", 36.0, 12.0, 9.0),))])[0]
    there = (labels[:, 0] == SHAPES.index("cross") + 1).nonzero().flatten().tolist()
    assert there == [2, 3, 6, 7]
    assert labels[:, 1].count_nonzero() == 4


def test_the_schedule_covers_every_step_and_ends():
    assert sum(stage.steps for stage in STAGES) == STEPS
    assert stage_at(0)[1] < stage_at(149)[1]
    assert stage_at(STEPS - 1)[1] < 1e-5
    with pytest.raises(ValueError, match="after the end"):
        stage_at(STEPS)
