"""Rollouts against products of whole matrices, and what must hold of their shares."""

import pytest
import torch

import llama4lab as lab
from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.tiling import Tiling
from llama4lab.run.vision.rollouts import attention_rollout, gradient_rollout, half_itself, itself_and_raising

IMAGE_TOKEN = 127
AT = ["layers.*.self_attn.pattern", "vision_model.layers.*.self_attn.pattern"]


@pytest.fixture(scope="module")
def model(new_model):
    """Chunks of 8, two query heads for each key, two experts a token, dense layers between."""
    return new_model(num_experts_per_tok=2)


@pytest.fixture(scope="module")
def prompt(image_batch) -> lab.Prompt:
    """Row 0 has an image of three tiles, row 1 two of one tile, behind padding."""
    inputs = image_batch([[3], [1, 1]])
    ids = inputs["input_ids"]
    wide, square = Tiling((24, 40), 24, 1, 2, (24, 40)), Tiling((24, 24), 24, 1, 1, (24, 24))
    places = [torch.nonzero(row == IMAGE_TOKEN).flatten().tolist() for row in ids]
    layouts = [
        ImageLayout.of(wide, 2, 0, 0, places[0], None),
        ImageLayout.of(square, 2, 1, 3, places[1][:4], None),
        ImageLayout.of(square, 2, 1, 4, places[1][4:], None),
    ]
    texts = [["" if token == 0 else f"<{token}>" for token in row] for row in ids.tolist()]
    kinds = [["image" if token == IMAGE_TOKEN else "text" for token in row] for row in ids.tolist()]
    return lab.Prompt(ids, inputs["attention_mask"], inputs["pixel_values"], texts, kinds, layouts)


def expected(prompt: lab.Prompt, text: list[torch.Tensor], vision: list[torch.Tensor], row: int, position: int):
    """Text, patch and class shares from whole matrices, image token by image token."""
    product = torch.eye(text[0].shape[-1])
    for matrix in text:
        product = matrix[row] @ product
    of_tokens = product[position].clone()
    patches, classes = {}, {}
    for layout in prompt.images:
        if layout.row != row:
            continue
        side = layout.grid[1] * 2
        for place, (tile, token_row, token_column) in zip(layout.positions, layout.places.tolist(), strict=True):
            tower, number = torch.eye(vision[0].shape[-1]), layout.tiles.start + tile
            for matrix in vision:
                tower = matrix[number] @ tower
            group = [(2 * token_row + i) * side + 2 * token_column + j for i in (0, 1) for j in (0, 1)]
            shares = of_tokens[place] * tower[group].mean(0)
            patches[number] = patches.get(number, 0) + shares[:-1]
            classes[number] = classes.get(number, 0) + shares[-1]
            of_tokens[place] = 0
    total = of_tokens.sum() + sum(own.sum() for own in patches.values()) + sum(classes.values())
    of_patches = torch.stack([patches[tile] for tile in sorted(patches)])
    return of_tokens / total, of_patches / total, torch.stack([classes[tile] for tile in sorted(classes)]) / total


@pytest.mark.parametrize(("row", "position"), [(0, -1), (1, -1), (1, 12)])
def test_a_rollout_is_the_product_of_half_the_pattern_and_half_itself(model, prompt, row, position):
    run = lab.record(model, prompt, at=AT)
    mixed = {name: 0.5 * run[name].mean(1) + 0.5 * torch.eye(run[name].shape[-1]) for name in run}
    text = [own for name, own in mixed.items() if name.startswith("layers")]
    vision = [own for name, own in mixed.items() if name.startswith("vision")]
    found = attention_rollout(model, prompt, row, position)
    for ours, theirs in zip(
        (found.text, found.patches, found.class_tokens), expected(prompt, text, vision, row, position), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("row", [0, 1])
def test_a_gradient_rollout_adds_attention_times_its_positive_slope(model, prompt, row):
    run = lab.record(model, prompt, at=AT, grad=True)
    run.logits[row, -1, 17].backward()
    added = {}
    for name in run:
        gradient = run[name].grad
        assert gradient is not None
        raising = (run[name] * gradient).clamp_min(0).mean(1).detach()
        added[name] = raising + torch.eye(raising.shape[-1])
    text = [own for name, own in added.items() if name.startswith("layers")]
    vision = [own for name, own in added.items() if name.startswith("vision")]
    found = gradient_rollout(model, prompt, row, -1, lambda logits: logits[:, -1, 17])
    for ours, theirs in zip(
        (found.text, found.patches, found.class_tokens), expected(prompt, text, vision, row, -1), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_rows_of_the_matrices_sum_to_one(model, prompt):
    run = lab.record(model, prompt, at=AT)
    for name in run:
        valid = prompt.attention_mask.bool() if name.startswith("layers") else None
        matrix = half_itself(run[name].mean(1), valid)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:2]))
        assert (matrix >= 0).all()


def test_attention_that_lowers_the_metric_does_not_count():
    pattern, gradient = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]]]]), torch.tensor([[[[-4.0, 4.0], [0.0, -2.0]]]])
    assert itself_and_raising(pattern, gradient).tolist() == [[[1.0, 3.0], [0.0, 1.0]]]


def test_all_shares_together_are_one_wherever_the_token_stands(model, prompt):
    for row, position in torch.nonzero(prompt.attention_mask)[::3].tolist():
        found = attention_rollout(model, prompt, row, position)
        total = found.text.sum() + found.patches.sum() + found.class_tokens.sum()
        assert float(total) == pytest.approx(1, abs=1e-5)
        assert min(float(own.min()) for own in (found.text, found.patches, found.class_tokens)) >= 0


@pytest.mark.parametrize("rollout", [attention_rollout, gradient_rollout])
def test_what_stands_before_the_image_has_nothing_of_it(model, prompt, rollout):
    found = rollout(model, prompt, 1, 3)
    assert float(found.patches.sum()) == float(found.class_tokens.sum()) == 0
    assert float(found.text[:4].sum()) == pytest.approx(1)
    assert float(found.text[0]) == 0  # padding


def test_a_row_is_rolled_out_as_if_it_were_alone(model, prompt):
    for number in (0, 1):
        together, alone = (
            attention_rollout(model, own, row, -1) for own, row in ((prompt, number), (prompt.row(number), 0))
        )
        torch.testing.assert_close(together.patches, alone.patches)
        one, other = (gradient_rollout(model, own, row, -1) for own, row in ((prompt, number), (prompt.row(number), 0)))
        torch.testing.assert_close(one.patches, other.patches, rtol=1e-4, atol=1e-8)


def test_attention_that_is_cut_off_from_the_image_carries_nothing(model, prompt):
    def itself(pattern: torch.Tensor) -> torch.Tensor:
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    with lab.patched(model, {"layers.*.self_attn.pattern": itself}):
        found = attention_rollout(model, prompt, 0, -1)
    assert float(found.text[-1]) == pytest.approx(1)


def test_a_tower_without_attention_gives_each_patch_a_quarter_of_its_token(model, prompt):
    def itself(pattern: torch.Tensor) -> torch.Tensor:
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    with lab.patched(model, {"vision_model.layers.*.self_attn.pattern": itself}):
        found = attention_rollout(model, prompt, 0, -1)
    of_patches = found.patches.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(3)  # tile, row, column, patch
    torch.testing.assert_close(of_patches, of_patches.mean(-1, keepdim=True).expand_as(of_patches))
    assert float(found.class_tokens.sum()) == 0


def test_the_size_of_a_batch_is_no_part_of_a_metric_of_rows(model, prompt):
    """A metric of llama4lab and the same as a function of the logits give the same shares."""
    one = gradient_rollout(model, prompt, 1, -1, lab.metrics.logit_diff(3, 4))
    other = gradient_rollout(model, prompt, 1, -1, lambda logits: logits[:, -1, 3] - logits[:, -1, 4])
    torch.testing.assert_close(one.patches, other.patches)


@pytest.mark.parametrize(
    ("row", "position", "error", "message"),
    [
        (2, -1, IndexError, "Row 2 was asked for"),
        (0, 500, IndexError, "Position 500"),
        (1, 0, ValueError, "padding"),
    ],
)
def test_places_that_do_not_exist_are_refused(model, prompt, row, position, error, message):
    for rollout in (attention_rollout, gradient_rollout):
        with pytest.raises(error, match=message):
            rollout(model, prompt, row, position)


def test_a_row_without_an_image_is_refused(tiny):
    with pytest.raises(ValueError, match="has no image"):
        attention_rollout(tiny, tiny.prompt("The capital of France is"), 0, -1)


def test_no_hook_is_left_however_it_ends(tiny, asked, no_hooks_left):
    attention_rollout(tiny, asked, 0, -1)
    gradient_rollout(tiny, asked, 0, -1)
    with pytest.raises(ValueError, match="no derivative"):
        gradient_rollout(tiny, asked, 0, -1, lab.metrics.rank(" red"))
    with pytest.raises(RuntimeError), lab.patched(tiny, {"layers.5.resid_post": lambda x: x.view(-1, 10**9)}):
        attention_rollout(tiny, asked, 0, -1)
