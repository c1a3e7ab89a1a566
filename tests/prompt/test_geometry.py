"""The road of a pixel: a bright block of a black image lights up the tokens and patches whose boxes show it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.prompter import Prompter

SIZES = 500
PARTS = 5


def sizes(part: int) -> Iterator[tuple[np.random.Generator, int, int]]:
    """A fifth of the 500 sizes; small and large sides are equally likely."""
    rng = np.random.default_rng(part)
    for _ in range(SIZES // PARTS):
        height, width = np.exp(rng.uniform(0, np.log(700), 2)).round().astype(int)
        yield rng, int(height), int(width)


def lit(tiles: torch.Tensor, grid: int) -> np.ndarray:
    """Which cells of a tile are not all black, in the order of the prompt."""
    bright = (tiles > -1).any(1)
    cell = bright.shape[-1] // grid
    return bright.unflatten(2, (grid, cell)).unflatten(1, (grid, cell)).any(4).any(2).flatten().numpy()


def scales(layout: ImageLayout, tile: np.ndarray) -> np.ndarray:
    """How many pixels of the image one pixel of a tile stands for: across and down, for every cell."""
    size, resized = np.array(layout.size[::-1]), np.array(layout.tiling.resized[::-1])
    is_global = (tile == layout.global_tile) & (layout.num_tiles > 1)
    return np.where(is_global[:, None], size / layout.tiling.tile, size / resized)


def check(layout: ImageLayout, grid: int, block: np.ndarray, bright: np.ndarray) -> None:
    """What must be bright is, and nothing else: `block` is left, top, right and bottom."""
    tile = layout.tiling.places(grid)[:, 0].numpy()
    boxes, scale = layout.tiling.boxes(grid).double().numpy(), scales(layout, tile)
    overlap = np.minimum(boxes[:, 2:], block[2:]) - np.maximum(boxes[:, :2], block[:2])
    # A whole pixel of the tile within the block: its centre is in the block, whatever the grid.
    must = (overlap >= scale + 1e-3).all(1)
    # Bilinear resizing reaches one pixel of the image, or of the tile, whichever is larger.
    reach = np.maximum(scale, 1) + 1e-3
    near = (boxes[:, 2:] > block[:2] + 0.5 - reach).all(1) & (boxes[:, :2] < block[2:] - 0.5 + reach).all(1)
    assert bright[must].all()
    assert not bright[~near].any()


def block_of(rng: np.random.Generator, layout: ImageLayout) -> tuple[np.ndarray, int | None]:
    """A block inside what one image token shows, and that token; where that is too small, any block."""
    height, width = layout.size
    tokens = layout.boxes.double().numpy()
    scale = scales(layout, layout.places[:, 0].numpy())
    margin = np.maximum(scale, 1)
    inner = np.concatenate([np.ceil(tokens[:, :2] + margin), np.floor(tokens[:, 2:] - margin)], axis=1)
    roomy = np.flatnonzero((inner[:, 2:] - inner[:, :2] >= np.maximum(2 * scale, 1)).all(1))
    if len(roomy):
        token = int(rng.choice(roomy))
        return inner[token].astype(int), token
    # As large as a pixel of any tile, so that it cannot vanish in the rounding to 256 levels.
    least = np.ceil(2 * scale.max(0)).astype(int).clip(1, (width, height))
    corner = rng.integers(0, np.array([width, height]) - least + 1)
    return np.concatenate([corner, corner + least]), None


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("normalize", ["hf", "meta"])
def test_the_box_of_every_token_and_patch_holds_the_pixels_that_made_it(
    part: int, normalize: str, prompter: Prompter, image_processor
):
    alone = 0
    for rng, height, width in sizes(part):
        black = Image.new("RGB", (width, height))
        layout = prompter("<|image|>", images=black, normalize=normalize).images[0]
        block, token = block_of(rng, layout)
        black.paste((255, 255, 255), tuple(block.tolist()))
        tiles = image_processor(black, return_tensors="pt", normalize=normalize)["pixel_values"]
        for side in (layout.grid[0], layout.patch_grid[0]):
            check(layout, side, block, lit(tiles, side))
        if token is not None:
            tile = layout.places[:, 0].numpy()
            same_kind = (tile == layout.global_tile) == (tile[token] == layout.global_tile)
            assert np.flatnonzero(lit(tiles, layout.grid[0]) & same_kind).tolist() == [token]
            alone += 1
    assert alone > SIZES / PARTS / 4, "enough sizes must have room for the strict check"


def test_all_image_tokens_of_a_size_lie_where_their_pixels_are(prompter: Prompter, image_processor):
    """One block after the other over a picture that is cut off by its canvas at the right and below."""
    layout = prompter("<|image|>", images=Image.new("RGB", (230, 130))).images[0]
    for token, (left, top, right, bottom) in enumerate(layout.boxes.tolist()):
        block = [round(left + 4), round(top + 4), round(right - 4), round(bottom - 4)]
        if block[2] <= block[0] or block[3] <= block[1]:
            continue
        picture = Image.new("RGB", (230, 130))
        picture.paste((255, 255, 255), (block[0], block[1], block[2], block[3]))
        bright = lit(image_processor(picture, return_tensors="pt")["pixel_values"], layout.grid[0])
        check(layout, layout.grid[0], np.array(block), bright)
        assert bright[token]


def test_the_patches_of_an_image_token_are_a_square_that_fills_its_box(prompter: Prompter):
    layout = prompter("<|image|>", images=Image.new("RGB", (130, 60))).images[0]
    for token in range(len(layout.places)):
        own = layout.patch_tokens == token
        tile, row, column = layout.places[token].tolist()
        expected = [[tile, 2 * row + i, 2 * column + j] for i in (0, 1) for j in (0, 1)]
        assert layout.patch_places[own].tolist() == expected
        boxes = layout.patch_boxes[own]
        union = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
        assert torch.equal(union, layout.boxes[token])


def test_canvas_boxes_cut_the_canvas_into_equal_squares_and_leave_out_the_global_tile(prompter: Prompter):
    tiling = prompter("<|image|>", images=Image.new("RGB", (130, 60))).images[0].tiling
    boxes = tiling.canvas_boxes(8)
    of_canvas = tiling.places(8)[:, 0] < tiling.rows * tiling.cols
    assert boxes[~of_canvas].isnan().all()
    own = boxes[of_canvas]
    assert torch.equal(own[:, 2:] - own[:, :2], torch.full((len(own), 2), tiling.tile / 8))
    corners = {tuple(corner) for corner in own[:, :2].tolist()}
    steps = [np.arange(0, side, tiling.tile / 8) for side in tiling.canvas]
    assert corners == {(left, top) for top in steps[0] for left in steps[1]}


def test_one_tile_alone_is_the_whole_canvas(prompter: Prompter):
    tiling = prompter("<|image|>", images=Image.new("RGB", (20, 40))).images[0].tiling
    assert tiling.num_tiles == 1
    assert torch.equal(
        tiling.canvas_boxes(2), torch.tensor([[0.0, 0, 24, 24], [24, 0, 48, 24], [0, 24, 24, 48], [24, 24, 48, 48]])
    )
