"""Where attention falls on a picture: from a token of the text, and from patch to patch in the vision tower."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.model.facts import chunk_sizes
from llama4lab.run.run import Run
from llama4lab.run.vision.rollouts import checked_place
from llama4lab.tables.token_index import places
from llama4lab.tables.vision.places import chosen_images, patch_places, token_places

PATTERN, QUERIES, KEYS = "self_attn.pattern", "self_attn.q_rot", "self_attn.k_rot"
AT = 'Record at="layers.*.self_attn.pattern", or at="layers.*.self_attn.[qk]_rot", which takes less memory.'
Numbers = int | Sequence[int] | None


def attention(run: Run, position: int, *, layers: Numbers = None, heads: Numbers = None, row: int = 0) -> pd.DataFrame:
    """Gives how a token attends to the image tokens of its row.

    A layer's pattern is read where it was recorded, and made from `q_rot` and `k_rot` elsewhere; edits of scores or
    patterns are then not in it.

    Args:
        run: A run with `layers.*.self_attn.pattern`, or with `q_rot` and `k_rot`: `at="layers.*.self_attn.[qk]_rot"`.
        position: The position of the token that attends; negative ones count from the end.
        layers: A layer or several; all that were recorded by default.
        heads: A head or several; all by default.
        row: The row of the prompt.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, position, left, top, right, bottom: place of the image
            token, as in `tokens`.
        layer: the layer.
        head: the query head.
        weight: attention of the token to the image token. Over all keys, text too, it sums to 1.
        visible: whether the layer lets the token see the image token: it comes later, and in a chunked layer it is in
            the same chunk. Where not, the weight is 0.

    Lines are in the order of the layers, then heads, in each in the order of the prompt. `attrs["position"]` has the
    position.

    Raises:
        KeyError: if a layer was not recorded, or has barred keys and no pattern.
        ValueError: if the row has no image, the position is padding, or keys are missing in a run that was cut.
        IndexError: if the run has no such row, position, layer or head.
    """
    row, position = checked_place(run.prompt, row, position)
    if row not in run.rows or position not in run.positions:
        raise IndexError(f"Row {row}, position {position} was asked for, but the run was cut and does not have it.")
    own = [number for number, layout in enumerate(run.prompt.images) if layout.row == row]
    table = token_places(run.prompt, own)
    sizes, place, parts = chunk_sizes(run.meta), places(run)[row], []
    for layer in _recorded_layers(run, layers):
        size = sizes[layer]
        same_chunk = np.ones(len(place), dtype=bool) if size is None else place // size == place[position] // size
        seen = (place >= 0) & (place <= place[position]) & same_chunk
        weights = _weights(run, layer, (row, position), torch.tensor(seen))
        for head in _numbers(heads, len(weights), f"Layer {layer}", "heads"):
            own_weights = weights[head].numpy()[table["position"]]
            lines = table.assign(layer=layer, head=head, weight=own_weights, visible=seen[table["position"]])
            parts.append(lines)
    joined = pd.concat(parts, ignore_index=True)
    joined.attrs = {"position": position}
    return joined


def vision_attention(
    run: Run, layer: int, patch: int | str, *, image: int = 0, tile: int = 0, heads: Numbers = None
) -> pd.DataFrame:
    """Gives how an image patch, or the class token, attends to the patches of its tile.

    Args:
        run: A run with `vision_model.layers.*.self_attn.pattern`, or with `q_rot` and `k_rot`:
            `at="vision_model.layers.*.self_attn.[qk]_rot"`.
        layer: The layer of the vision tower.
        patch: The number of the patch in its tile, row by row; or "class" for the class token.
        image: The number of the image.
        tile: The tile of the image.
        heads: A head or several; all by default.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, patch, token_row, token_column, position, left, top, right,
            bottom: the patch that is attended to, as in `layout`.
        layer: the layer.
        head: the head.
        weight: attention to the patch.
        class_weight: attention to the class token, which is no patch; the weights of a head and this make 1.

    `attrs["patch"]` has the attending patch.

    Raises:
        KeyError: if the layer was not recorded.
        ValueError: if there is no such image.
        IndexError: if there is no such tile, patch or head.
    """
    (image,) = chosen_images(run.prompt, [image])
    layout = run.prompt.images[image]
    (tile,) = _numbers(tile, layout.num_tiles, f"Image {image}", "tiles")
    patches = patch_places(run.prompt, [image])
    table = patches.loc[patches["tile"] == tile].reset_index(drop=True)
    if isinstance(patch, str) and patch != "class":
        raise ValueError(f'Patch {patch!r} was asked for; give its number, or "class" for the class token.')
    # The class token is the last place.
    query = len(table) if isinstance(patch, str) else _numbers(patch, len(table), f"Tile {tile}", "patches")[0]
    weights = _tower_weights(run, layer, layout.tiles.start + tile, query)
    parts = [
        table.assign(layer=layer, head=head, weight=weights[head, :-1].numpy(), class_weight=float(weights[head, -1]))
        for head in _numbers(heads, len(weights), f"Layer {layer}", "heads")
    ]
    joined = pd.concat(parts, ignore_index=True)
    joined.attrs = {"patch": patch if isinstance(patch, str) else query}
    return joined


def _recorded_layers(run: Run, layers: Numbers) -> list[int]:
    """The layers asked for, of which every one has a pattern or what it is made from."""

    def recorded(layer: int) -> bool:
        names = [{f"layers.{layer}.{PATTERN}"}, {f"layers.{layer}.{part}" for part in (QUERIES, KEYS)}]
        return any(name <= set(run) for name in names)

    count = run.meta["num_layers"]
    asked = _numbers(layers, count, "The model", "layers")
    found = [layer for layer in asked if recorded(layer)]
    if not found or (layers is not None and found != asked):
        lacking = next(layer for layer in asked if layer not in found)
        what = "of any layer" if layers is None else f"of layer {lacking}"
        raise KeyError(f"The attention {what} was asked for and not recorded. {AT}")
    return found


def _weights(run: Run, layer: int, place: tuple[int, int], seen: Bool[Tensor, " key"]) -> Float[Tensor, "head key"]:
    """The attention of one query; its keys are all positions of the prompt."""
    row, position = place
    batch, query = run.rows.index(row), run.positions.index(position)
    if f"layers.{layer}.{PATTERN}" in run:
        return run[f"layers.{layer}.{PATTERN}"][batch, :, query].detach().float().cpu()
    if layer in run.meta.get("barred_layers", []):
        raise KeyError(f"Layer {layer} has barred keys, which only its pattern shows. Record its pattern.")
    missing = sorted(set(torch.nonzero(seen).flatten().tolist()) - set(run.positions))
    if missing:
        raise ValueError(
            f"Attention to position {missing[0]} is needed, but the run was cut and has no key there.\n"
            "Take the run as it was recorded, or record the pattern, whose keys are not cut."
        )
    q = run[f"layers.{layer}.{QUERIES}"][batch, query].detach().float().cpu()
    k = run[f"layers.{layer}.{KEYS}"][batch].detach().float().cpu()
    scores = torch.full((len(q), len(seen)), -torch.inf)
    scores[:, run.positions] = _scores(q, k)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def _tower_weights(run: Run, layer: int, tile: int, query: int) -> Float[Tensor, "head key"]:
    names = [f"vision_model.layers.{layer}.{part}" for part in (PATTERN, QUERIES, KEYS)]
    if names[0] in run:
        return run[names[0]][tile, :, query].detach().float().cpu()
    if not {names[1], names[2]} <= set(run):
        raise KeyError(
            f"The attention of layer {layer} of the vision tower was asked for and not recorded. "
            f'Record at="{names[0]}".'
        )
    q, k = (run[name][tile].detach().float().cpu() for name in names[1:])
    return _scores(q[query], k).softmax(dim=-1)


def _scores(q: Float[Tensor, "head d_head"], k: Float[Tensor, "key kv_head d_head"]) -> Float[Tensor, "head key"]:
    k = k.repeat_interleave(len(q) // k.shape[1], dim=1)
    return einsum(q, k, "head d, key head d -> head key") * q.shape[-1] ** -0.5


def _numbers(asked: Numbers, count: int, owner: str, what: str) -> list[int]:
    """Numbers of heads, layers, tiles or patches; all by default.

    Raises:
        IndexError: if one does not exist, or none is asked for.
    """
    numbers = list(range(count)) if asked is None else [asked] if isinstance(asked, int) else list(asked)
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong or not numbers:
        raise IndexError(
            f"{what} {wrong[0] if wrong else 'none'} was asked for; {owner} has {count} {what}, 0 to {count - 1}."
        )
    return numbers
