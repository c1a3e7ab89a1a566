"""Regions of images: the places of a box in every part of the model, and patches that change these places alone."""

import numpy as np
import pytest
import torch
from PIL import Image

import llama4lab as lab
from llama4lab.run.vision.boxes import image_region

RESIDUAL = "vision_model.layers.1.resid_post"
EVERY_KIND = [
    *("vision_model.patch_embed", "vision_model.embed", RESIDUAL, "vision_model.layers.0.self_attn.q"),
    *("vision_model.layers.2.mlp.hidden", "vision_model.final_norm", "vision_model.shuffled", "vision_model.adapter"),
    *("image_features", "embed_merged", "layers.0.resid_mid", "layers.3.self_attn.z", "layers.5.resid_post"),
    *("layers.1.feed_forward.experts.out", "layers.1.feed_forward.router.indices", "final_norm"),
]


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def about(model: lab.HookedLlama4, *images: list[Image.Image]) -> lab.Prompt:
    """A row for each list of images, the rows of different lengths and therefore padded."""
    return model.prompt(["<|image|>" * len(own) + " What is it?" for own in images], images=list(images))


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[lab.Prompt, lab.Prompt]:
    """Two rows, the first padded; the second has a picture of one tile and one of several. All pixels differ."""
    sizes = [[(40, 48)], [(48, 30), (70, 100)]]
    first, second = (
        about(tiny, *[[noise(*size, seed + i) for i, size in enumerate(row)] for row in sizes]) for seed in (0, 50)
    )
    return first, second


@pytest.fixture(scope="module")
def runs(tiny, pair) -> tuple[lab.Run, lab.Run]:
    return lab.record(tiny, pair[0], at=EVERY_KIND), lab.record(tiny, pair[1], at=EVERY_KIND)


@pytest.fixture
def region(pair):
    """Part of the large picture, which is in the second row and has several tiles."""
    return image_region(pair[0], (20, 10, 70, 60), image=2)


def mask_of(region, name: str, run: lab.Run) -> torch.Tensor:
    """Where a region lies on the first two axes of a hook point."""
    mask = torch.zeros(run[name].shape[:2], dtype=torch.bool)
    mask[region.places_of(name, run.shapes[name])] = True
    return mask


def test_the_patches_of_a_box_are_those_whose_pixels_change_when_it_is_painted(tiny):
    picture = Image.new("RGB", (96, 96), (90, 90, 90))
    painted = picture.copy()
    painted.paste((255, 255, 255), (18, 30, 54, 42))
    before, after = (about(tiny, [each]).pixel_values for each in (picture, painted))
    assert before is not None
    assert after is not None
    changed = (before != after).any(1).unfold(1, 6, 6).unfold(2, 6, 6).any(-1).any(-1).flatten(1).nonzero().tolist()
    region = image_region(about(tiny, [picture]), (18, 30, 54, 42))
    parts = [[list(place) for place in places if place[0] < 4] for places in (region.patches, changed)]
    assert parts[0] == parts[1]
    # The global tile is resized, which smears the paint over the border of the box.
    assert {tuple(place) for place in changed} >= set(region.patches)


@pytest.mark.parametrize("grain", ["overlap", "inside"])
def test_image_tokens_of_a_region_are_the_groups_of_its_patches(tiny, grain):
    prompt = about(tiny, [noise(70, 100, 0)])
    rng, rule = np.random.default_rng(0), {"overlap": any, "inside": all}[grain]
    for _ in range(20):
        left, top = rng.uniform(0, 50), rng.uniform(0, 30)
        region = image_region(prompt, (left, top, left + 50, top + 40), grain=grain)
        seen = (prompt.images[0].patch_boxes[:, 2:] > prompt.images[0].patch_boxes[:, :2]).all(1)
        groups: dict[int, list[bool]] = {}
        for token, inside, shows in zip(
            prompt.images[0].patch_tokens.tolist(), region.patch_mask.flatten().tolist(), seen.tolist(), strict=True
        ):
            if shows:
                groups.setdefault(token, []).append(inside)
        expected = {token for token, members in groups.items() if rule(members)}
        assert set(region.token_mask.flatten().nonzero()[:, 0].tolist()) == expected


def test_what_stands_at_the_positions_of_a_region_are_the_features_of_its_image_tokens(runs, region):
    lead, place = zip(*region.image_tokens, strict=True)
    merged = runs[0]["embed_merged"][region.row, region.positions]
    assert torch.equal(merged, runs[0]["image_features"][list(lead), list(place)])


def test_regions_can_be_joined_cut_and_turned(pair, region):
    other = image_region(pair[0], (50, 40, 100, 70), image=2)
    both = region & other
    assert set(both.patches) == set(region.patches) & set(other.patches)
    assert set((region | other).image_tokens) == set(region.image_tokens) | set(other.image_tokens)
    assert set((region - other).patches) == set(region.patches) - set(other.patches)
    assert len((~region).patches) + len(region.patches) == len(pair[0].images[2].patch_boxes)
    assert not set((~region).positions) & set(region.positions)
    assert bool((region | ~region).patch_mask.all())


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_region_takes_the_values_of_the_other_run_and_nothing_else_changes(tiny, pair, runs, region, name):
    with lab.patched(tiny, region.values_from(runs[1], name)):
        found = lab.record(tiny, pair[0], at=name)
    mask = mask_of(region, name, runs[0])
    assert mask.any()
    assert not mask.all()
    assert torch.equal(found[name][mask], runs[1][name][mask])
    assert torch.equal(found[name][~mask], runs[0][name][~mask])
    torch.testing.assert_close(found.logits[0], runs[0].logits[0], rtol=0, atol=1e-4)


def test_own_values_change_nothing(tiny, pair, runs, region, no_hooks_left):
    patches = region.values_from(runs[0])
    assert list(patches) == runs[0].names
    with lab.patched(tiny, patches):
        assert torch.equal(lab.record(tiny, pair[0]).logits, runs[0].logits)


def test_all_regions_together_are_the_other_picture(tiny, pair, runs):
    """In front of the text model nothing but the image differs between the two prompts."""
    regions = [image_region(pair[0], (0, 0, 5, 5), image=image) for image in range(3)]
    own, rest = (each.values_from(runs[1], "image_features") for each in (regions[0], ~regions[0]))
    with lab.patched(tiny, own), lab.patched(tiny, rest):
        found = lab.record(tiny, pair[0])
    # Not to the bit: the tokens of both rows share the matrices of the experts.
    torch.testing.assert_close(found.logits[0], runs[1].logits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logits[1], runs[0].logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [RESIDUAL, "vision_model.shuffled", "vision_model.adapter", "layers.2.resid_post"])
def test_an_object_can_be_pasted_at_another_place_of_another_picture(tiny, name):
    first, second = (about(tiny, [noise(48, 48, seed)]) for seed in (1, 2))
    source = lab.record(tiny, second, at=name)
    target, origin = image_region(first, (24, 24, 48, 36)), image_region(second, (0, 12, 24, 24))
    with lab.patched(tiny, target.values_from(source, name, region=origin)):
        found = lab.record(tiny, first, at=name)
    # Both boxes are two image tokens wide and one high, so each cell has one counterpart, row by row.
    into, taken = target.places_of(name, source.shapes[name]), origin.places_of(name, source.shapes[name])
    assert torch.equal(found[name][into], source[name][taken])


def test_a_region_of_other_cells_is_no_source_for_pasting(tiny):
    first, second = (about(tiny, [noise(48, 48, seed)]) for seed in (1, 2))
    source = lab.record(tiny, second, at=[RESIDUAL, "image_features"])
    wide, high = image_region(first, (0, 0, 24, 12)), image_region(second, (0, 0, 12, 24))
    with pytest.raises(ValueError, match="arranged as 4 x 2 there and as 2 x 4 here"):
        wide.values_from(source, RESIDUAL, region=high)
    # One patch less, but the same image tokens.
    smaller = image_region(second, (0, 0, 18, 12))
    with pytest.raises(ValueError, match="image patches"):
        wide.values_from(source, RESIDUAL, region=smaller)
    assert wide.values_from(source, "image_features", region=smaller)


def test_zeros_means_and_drawn_values_fill_a_region_alone(tiny, pair, runs, region):
    names = [RESIDUAL, "image_features", "layers.0.resid_mid"]
    for values in (
        lab.ablation.zero(tiny, at=names),
        lab.ablation.mean(tiny, pair[1], at=names),
        lab.ablation.resample(tiny, pair[0], pair[1], at=names),
    ):
        for name in names:
            with lab.patched(tiny, region.filled(tiny, {name: values[name]})):
                found = lab.record(tiny, pair[0], at=name)[name]
            mask = mask_of(region, name, runs[0])
            assert torch.equal(found[mask], values[name].to(found.dtype).expand_as(found)[mask])
            assert torch.equal(found[~mask], runs[0][name][~mask])


def test_a_value_that_does_not_fit_is_refused(tiny, pair, region):
    with pytest.raises(ValueError, match="NaN"):
        region.filled(tiny, {RESIDUAL: float("nan")})
    with (
        pytest.raises(ValueError, match="broadcasts"),
        lab.patched(tiny, region.filled(tiny, {RESIDUAL: torch.ones(3)})),
    ):
        lab.record(tiny, pair[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embed", "embed_merged"),
        ("layers.2.self_attn.pattern", "self_attn.z"),
        ("vision_model.layers.0.self_attn.scores", "self_attn.z"),
    ],
)
def test_hook_points_without_places_of_images_are_refused(tiny, region, name, message):
    with pytest.raises(ValueError, match=message):
        region.filled(tiny, {name: 0})


def test_a_cut_run_gives_what_it_has_left(tiny, pair, runs, region):
    name = "layers.5.resid_post"
    cut = runs[1].cut(rows=[1], positions=region.positions)
    with lab.patched(tiny, region.values_from(cut, name)):
        found = lab.record(tiny, pair[0])
    with lab.patched(tiny, region.values_from(runs[1], name)):
        assert torch.equal(found.logits, lab.record(tiny, pair[0]).logits)
    with pytest.raises(ValueError, match="cut from the run"):
        region.values_from(runs[1].cut(rows=[0]), name)
    with pytest.raises(ValueError, match="cut from the run"):
        region.values_from(runs[1].cut(positions=region.positions[1:]), name)


def test_values_that_were_not_recorded_are_refused(runs, region):
    with pytest.raises(ValueError, match=r"taken at 'layers.7.resid_post', but the run has vision_model.patch_embed"):
        region.values_from(runs[1], "layers.7.resid_post")


def test_pictures_that_lie_otherwise_on_their_tiles_are_refused(tiny, runs, region):
    other = about(tiny, [noise(48, 48, 0)], [noise(48, 48, 0), noise(48, 150, 0)])
    with pytest.raises(ValueError, match="tiles"):
        region.on(other)
    with pytest.raises(IndexError, match="has 1 images"):
        region.on(about(tiny, [noise(48, 48, 0)]))
    with pytest.raises(ValueError, match="not of one image"):
        _ = region | image_region(other, (0, 0, 9, 9))


def test_a_step_of_generation_has_no_places_of_the_image_in_the_text_layers(tiny, asked):
    region = image_region(asked, (4, 4, 20, 20))
    with lab.patched(tiny, region.filled(tiny, {RESIDUAL: 0})):
        lab.generate(tiny, asked, max_new_tokens=2)
    with (
        pytest.raises(ValueError, match="as a whole"),
        lab.patched(tiny, region.filled(tiny, {"layers.1.resid_post": 0})),
    ):
        lab.generate(tiny, asked, max_new_tokens=2)


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 10), (10, 0, 5, 10), (0, 0, 101, 10), (-1, 0, 5, 5), (0, 0, 5), (0, 0, 5, float("nan"))]
)
def test_a_box_that_is_none_is_refused(pair, box):
    with pytest.raises(ValueError, match="100 pixels wide and 70 high"):
        image_region(pair[0], box, image=2)


def test_a_box_without_a_whole_patch_has_no_inside(pair):
    assert len(image_region(pair[0], (3, 3, 8, 8)).patches) == 4
    with pytest.raises(ValueError, match="overlap"):
        image_region(pair[0], (3, 3, 8, 8), grain="inside")
    with pytest.raises(IndexError, match="3 images"):
        image_region(pair[0], (0, 0, 8, 8), image=3)


def test_a_region_smaller_than_an_image_token_has_nothing_behind_the_pixel_shuffle(tiny, pair):
    patch = image_region(pair[0], (6, 6, 12, 12), grain="inside")
    assert len(patch.patches) == 1
    assert patch.filled(tiny, {RESIDUAL: 0})
    with pytest.raises(ValueError, match="image_tokens"):
        patch.filled(tiny, {"image_features": 0})
