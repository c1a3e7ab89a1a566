"""One pass of the text layers over the pair of prompts and many units at once, layer by layer.

A unit joins at the layer of its first patch, with the residual stream of the base run; only the tokens that a patch can
change and the metric can see are computed, and the keys and values before them are those of the base run. Every layer
is called on one packed row, so each of its weights is read once, and an expert sees the tokens of all units together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.packed_layout import PackedLayout, Trunk
from llama4lab.model.text import TextLayer, TextModel
from llama4lab.run.sweep_engine.packing import Block, Packing, blocks_of, carried, packing
from llama4lab.run.sweep_engine.pair_rows import PairRows
from llama4lab.run.sweep_engine.reach import Reach
from llama4lab.run.sweep_engine.values_of_pass import PassValues, Place


@dataclass(frozen=True, eq=False)
class Units:
    """Cells, each in one row of the pair.

    Attributes:
        row: The row of each unit of the sweep.
        entry: The layer in which each begins to differ; the number of layers for one that differs behind them.
        reach: The columns that each has in each layer.
    """

    row: Int[np.ndarray, " unit"]
    entry: Int[np.ndarray, " unit"]
    reach: Reach


@dataclass(frozen=True, eq=False)
class Passed:
    """What leaves the last layer: the residual stream of the pair's tokens, then of the units' last tokens."""

    x: Float[Tensor, "1 token d_model"]
    packing: Packing


@torch.no_grad()
def text_pass(
    text: TextModel,
    pair: PairRows,
    units: Units,
    chosen: Int[np.ndarray, " unit"],
    values: PassValues,
    entering: Callable[[int], list[str]],
    embedded: Callable[[Tensor, Packing], Tensor],
    most: tuple[int, int],
    done: Callable[[], None],
) -> Passed:
    """Runs all layers.

    Args:
        text: The text stack.
        pair: The rows of both runs.
        units: All units of the sweep.
        chosen: Those to run.
        values: What hook points do; its listeners must be set.
        entering: Layer -> hook points whose tensor is the residual stream that enters it.
        embedded: Puts other image features into the residual stream of the first layer.
        most: The most tokens of one call of a layer, and the most units whose attention is computed together.
        done: Called after every layer.
    """
    x, positions = pair.x, pair.positions
    rotations = text.rotary_emb(positions.unsqueeze(0))[0]
    length = pair.base.x.shape[1]
    now = _packing(units, chosen[:0], 0, pair.size)
    for number, layer in enumerate(text.layers):
        new = _packing(units, chosen, number, pair.size)
        index = carried(now, new, length)
        x = x if len(index) == x.shape[1] and bool((index == torch.arange(len(index))).all()) else x[:, index]
        x = embedded(x, new) if number == 0 else x
        x = entered(x, entering(number), values, new)
        _, row, column = new.columns()
        origin = torch.from_numpy(np.concatenate([np.arange(pair.size), row * length + column])).to(positions.device)
        x = _layer(layer, x, rotations, positions, origin, new, pair, values, most)
        last = number == len(text.layers) - 1
        now = _asked(new) if last else new
        values.sources.clear()
        values.routes.clear()
        done()
    final = _packing(units, chosen, len(text.layers), pair.size)
    return Passed(x[:, carried(now, final, length).to(x.device)], final)


def entered(x: Tensor, names: list[str], values: PassValues, packing: Packing) -> Tensor:
    """The residual stream with what is patched between two layers."""
    for name in names:
        values.sources[name] = x[0, values.source_tokens]
        x = values.patched(name, x, packing.start, packing.first, packing.end)
    return x


def _packing(units: Units, chosen: Int[np.ndarray, " unit"], line: int, offset: int) -> Packing:
    """The packing of the units that have begun; before the last layer all their tokens attend."""
    begun = chosen[units.entry[chosen] <= line]
    first, end = units.reach.first[line, begun], units.reach.end[line, begun]
    final = units.reach.first.shape[0] - 1
    asked = units.reach.first[final, begun] if line == final - 1 else first
    return packing(blocks_of(begun, units.row[begun], first, end, asked), len(units.row), offset)


def _asked(packed: Packing) -> Packing:
    """The packing of the tokens that attended."""
    blocks = [Block(b.units, b.rows, b.asked_first, b.end, b.asked_first) for b in packed.blocks]
    return Packing(
        blocks,
        packed.offset,
        packed.asked_start,
        packed.asked_first,
        packed.end,
        packed.asked_start,
        packed.asked_first,
    )


def _layer(
    layer: TextLayer,
    x: Float[Tensor, "1 token d_model"],
    rotations: Float[Tensor, "known pair 2"],
    positions: Int[Tensor, " known"],
    origin: Int[Tensor, " token"],
    packed: Packing,
    pair: PairRows,
    values: PassValues,
    most: tuple[int, int],
) -> Float[Tensor, "1 asking d_model"]:
    """One layer, in calls of bounded size."""
    trunk, outputs = Trunk(), []
    for tokens, asked, blocks in _calls(packed, most):
        parts = pair.parts() if tokens.start == 0 else []
        token, ask = pair.size if parts else 0, pair.size if parts else 0
        queries = [torch.arange(token)]
        for block in blocks:
            parts.append(block.part(pair.base.layout, token, ask))
            count, late = len(block.units), block.length - block.asking
            inside = torch.arange(count)[:, None] * block.length + torch.arange(late, block.length)
            queries.append(token + inside.flatten())
            token, ask = token + count * block.length, ask + count * block.asking
        layout = PackedLayout(positions[origin[tokens]].unsqueeze(0), parts, trunk)
        layout.queries = torch.cat(queries) if ask < token else None
        values.place = Place(packed, tokens, asked, layout, has_source=tokens.start == 0)
        outputs.append(layer(x[:, tokens], rotations[origin[tokens]].unsqueeze(0), layout))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _calls(packed: Packing, most: tuple[int, int]) -> Iterator[tuple[slice, slice, list[Block]]]:
    """The blocks in groups of at most so many tokens: their tokens, those that attend, the blocks."""
    group: list[Block] = []
    start, asked_start, token, asked = 0, 0, packed.offset, packed.offset
    for whole in packed.blocks:
        for block in whole.split(*most):
            size, asking = len(block.units) * block.length, len(block.units) * block.asking
            if token > start and token - start + size > most[0] and (group or start == 0):
                yield slice(start, token), slice(asked_start, asked), group
                group, start, asked_start = [], token, asked
            group.append(block)
            token, asked = token + size, asked + asking
    yield slice(start, token), slice(asked_start, asked), group
