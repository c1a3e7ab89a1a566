"""The vision tower: order of patches and features, class token, pixel shuffle."""

import pytest
import torch
from transformers.models.llama4 import modeling_llama4 as theirs

from llama4lab.model.vision import pixel_shuffled


@pytest.fixture(scope="module")
def tower(new_model):
    return new_model().vision


@torch.no_grad()
def seen(tower, name: str, pixels: torch.Tensor) -> torch.Tensor:
    store = []
    with tower.get_submodule(name).register_forward_hook(lambda module, args, x: store.append(x)):
        tower(pixels)
    return store[0]


@pytest.mark.parametrize("side", [2, 4, 8])
def test_pixel_shuffle_stacks_each_square_of_four_patches_row_by_row(side):
    x = torch.randn(3, side * side, 5)
    grid, out = x.unflatten(1, (side, side)), pixel_shuffled(x, 0.5)
    assert out.shape == (3, side * side // 4, 20)
    for row in range(side // 2):
        for column in range(side // 2):
            square = [grid[:, 2 * row + i, 2 * column + j] for i in (0, 1) for j in (0, 1)]
            assert torch.equal(out[:, row * (side // 2) + column], torch.cat(square, -1))


@pytest.mark.parametrize("side", [2, 4, 24])
def test_pixel_shuffle_equals_that_of_transformers(side):
    x = torch.randn(2, side * side, 8)
    assert torch.equal(pixel_shuffled(x, 0.5), theirs.pixel_shuffle(x, 0.5))


@torch.no_grad()
def test_the_class_token_comes_last(tower):
    embedded = seen(tower, "embed", torch.randn(2, 3, 24, 24))
    last = (tower.class_embedding + tower.positional_embedding_vlm[-1]).expand(2, -1)
    torch.testing.assert_close(embedded[:, -1], last)


@torch.no_grad()
def test_the_class_token_does_not_reach_the_output(tower):
    pixels = torch.randn(2, 3, 24, 24)
    shuffled = seen(tower, "shuffled", pixels)
    normed = seen(tower, "final_norm", pixels)
    assert torch.equal(shuffled, pixel_shuffled(normed[:, :-1], 0.5))


@torch.no_grad()
@pytest.mark.parametrize(("row", "column"), [(0, 3), (3, 0), (1, 2)])
def test_patches_are_numbered_row_by_row_on_an_asymmetric_image(row, column, tower):
    pixels = torch.zeros(1, 3, 24, 24)
    pixels[:, :, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6] = 1.0
    lit = seen(tower, "patch_embed", pixels).abs().sum(-1)[0].nonzero().flatten()
    assert lit.tolist() == [4 * row + column]


@torch.no_grad()
def test_features_of_a_patch_run_channel_row_column(tower):
    pixels = torch.zeros(1, 3, 24, 24)
    pixels[0, 2, 1, 4] = 1.0  # channel 2, row 1, column 4 of the first patch
    feature = seen(tower, "patch_embed", pixels)[0, 0]
    torch.testing.assert_close(feature, tower.patch_embedding.linear.weight[:, 2 * 36 + 1 * 6 + 4])


@torch.no_grad()
def test_rows_and_columns_of_an_image_are_not_exchanged_in_rotation(tower):
    """llama.cpp#13282, vllm-fork#1061: with (y, x) for (x, y) every image is seen transposed.

    The transposed image, with transposed position embeddings, must give other features than the transposed features:
    rotation treats the two directions differently.
    """
    pixels = torch.randn(1, 3, 24, 24)
    grid = torch.arange(16).reshape(4, 4).T.flatten()
    scores = seen(tower, "model.layers.0.self_attn.scores", pixels)[0, 0, :16, :16]
    q, k = (seen(tower, f"model.layers.0.self_attn.{name}", pixels)[0, :16, 0] for name in ("q", "k"))
    frequencies = theirs.Llama4VisionRotaryEmbedding(tower.config).freqs_ci[:16, 0]

    def by_hand(turn: torch.Tensor) -> torch.Tensor:
        one, other = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn for x in (q, k))
        return (one @ other.conj().T).real / 4

    torch.testing.assert_close(scores, by_hand(frequencies), atol=1e-5, rtol=1e-5)
    assert (scores - by_hand(frequencies[grid])).abs().max() > 0.1


@torch.no_grad()
def test_tiles_do_not_see_each_other(tower):
    pixels = torch.randn(3, 3, 24, 24)
    together, alone = tower(pixels), torch.cat([tower(tile[None]) for tile in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_forty_tiles_in_one_pass_are_forty_tiles(tower):
    """D8: Meta's encoder has room for 32."""
    pixels = torch.randn(40, 3, 24, 24)
    torch.testing.assert_close(tower(pixels)[37:], tower(pixels[37:]), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_are_added_inside_the_product_as_in_transformers(dtype, new_model):
    """D5: Meta adds them after a rounding of their own; in bfloat16 that differs by 0.06 behind the tower."""
    attention = new_model(dtype=dtype).vision.model.layers[0].self_attn
    x = torch.randn(2, 17, 32).to(dtype)
    store = []
    with attention.q.register_forward_hook(lambda module, args, y: store.append(y)):
        attention(x, torch.ones(1, 17, 8, 2))
    assert torch.equal(
        store[0].flatten(-2), torch.nn.functional.linear(x, attention.q_proj.weight, attention.q_proj.bias)
    )


@torch.no_grad()
def test_the_eager_tower_equals_the_fused_one(new_model):
    model, pixels = new_model(), torch.randn(3, 3, 24, 24)
    fused = model.vision(pixels)
    model.attn = "eager"
    assert model.vision.config._attn_implementation == "eager"
    torch.testing.assert_close(model.vision(pixels), fused, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3, 24, 12), (3, 24, 24), (1, 1, 24, 24), (1, 3, 336, 336)])
def test_tiles_of_another_shape_are_refused(shape, tower):
    with pytest.raises((ValueError, TypeError), match=str(shape[-1])):
        tower(torch.zeros(shape))
