"""How far what one token says can reach, layer by layer, by the chunks alone.

What is written at a position stays in its residual stream; attention carries it to later tokens that may see it. In a
chunked layer these are the rest of the chunk, so only layers that see everything bring it across a border.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from llama4lab.model.attention import SelfAttention
from llama4lab.model.config_parts import text_part
from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel


def horizon(
    model: HookedPreTrainedModel, length: int, *, source: int = 0, barred: int | Sequence[int] = ()
) -> pd.DataFrame:
    """Gives, for each layer, the positions whose residual stream behind it can hold anything of one earlier token.

    Positions count without padding. Nothing is run: this is what the layers allow, with what `llama4lab.edited` has
    changed around the call; whether heads use it is another matter. Time and lines do not grow with the length.

    Args:
        model: The model.
        length: Of the text, in tokens.
        source: Position of the token.
        barred: Layers that are to see no earlier chunk, out of those without chunks.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        chunk_size: size of its chunks; missing for a layer that sees everything.
        start: first position of a stretch of positions for which the next columns are the same.
        stop: position after its last.
        reached: whether these positions can hold something of the source.
        hops: the fewest attention layers that carry it there from position to position; 0 is the source itself, missing
            where nothing comes.
        since: the layer whose attention brought it first; missing for the source, which has it from the start.

    Raises:
        IndexError: if the text has no such position, or the model no such layer.
        ValueError: if a barred layer sees no earlier chunk anyway, or the model has no chunks.
    """
    if not 0 <= source < length:
        raise IndexError(f"source={source} was asked for; a text of {length} tokens has positions 0 to {length - 1}.")
    sizes = _sizes(model, [barred] if isinstance(barred, int) else list(barred))
    before = [_Stretch(0, source, None, None)] if source else []
    stretches = [_Stretch(source, source + 1, 0, None)]
    if source + 1 < length:
        stretches.append(_Stretch(source + 1, length, None, None))
    lines = []
    for number, layer in enumerate(model.text.layers):
        size = sizes[number]
        stretches = _carried(stretches, number, size, _unseen(layer.self_attn))
        kind = "rope" if layer.self_attn.rope else "nope"
        lines += [
            (number, kind, size, one.start, one.stop, one.hops is not None, one.hops, one.since)
            for one in before + stretches
        ]
    columns = ["layer", "kind", "chunk_size", "start", "stop", "reached", "hops", "since"]
    return pd.DataFrame(lines, columns=columns).astype(dict.fromkeys(["chunk_size", "hops", "since"], "Int64"))


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring positions with the same history; hops is None where nothing came."""

    start: int
    stop: int
    hops: int | None
    since: int | None


def _sizes(model: HookedPreTrainedModel, barred: list[int]) -> list[int | None]:
    """The chunk size of each layer, the barred ones confined to chunks."""
    sizes = model.text.chunk_sizes
    usual = facts(model.config, model.text)["chunk_size"] or text_part(model.config).attention_chunk_size
    whole = [layer for layer, size in enumerate(sizes) if size is None]
    for layer in barred:
        if not 0 <= layer < len(sizes):
            raise IndexError(f"Layer {layer} was to be barred; the model has layers 0 to {len(sizes) - 1}.")
        if layer not in whole:
            raise ValueError(
                f"Layer {layer} was to be barred from earlier chunks, which it never sees.\n"
                f"Layers that do: {', '.join(map(str, whole)) or 'none'}."
            )
        if usual is None:
            raise ValueError("Layers were to be barred from earlier chunks; this model has no chunks.")
    return [usual if layer in barred else size for layer, size in enumerate(sizes)]


def _unseen(attention: SelfAttention) -> list[int]:
    """Positions that only their own queries see."""
    return sorted({0 if place == "first_token" else int(place) for place in attention.barred})


def _carried(stretches: list[_Stretch], layer: int, size: int | None, unseen: list[int]) -> list[_Stretch]:
    """What one layer of attention makes of the stretches.

    In each chunk, every stretch gets what the best stretch before it has, one hop more.
    """
    found: list[_Stretch] = []
    chunk, best = -1, None
    for piece in _pieces(stretches, size):
        own = 0 if size is None else piece.start // size
        chunk, best = own, best if own == chunk else None
        if best is not None and (piece.hops is None or best + 1 < piece.hops):
            new = replace(piece, hops=best + 1, since=layer if piece.since is None else piece.since)
        else:
            new = piece
        if piece.hops is not None and (best is None or piece.hops < best) and _is_seen(piece, unseen):
            best = piece.hops
        if found and (found[-1].hops, found[-1].since) == (new.hops, new.since):
            found[-1] = replace(found[-1], stop=new.stop)
        else:
            found.append(new)
    return found


def _pieces(stretches: list[_Stretch], size: int | None) -> list[_Stretch]:
    """The stretches, cut so that a piece lies in one chunk, or is all that there is in its chunks."""
    if size is None:
        return stretches
    pieces = []
    for one in stretches:
        first = min(-(-one.start // size) * size, one.stop)
        last = one.stop // size * size
        if one.start < first:
            pieces.append(replace(one, stop=first))
        if first < last:
            pieces.append(replace(one, start=first, stop=last))
        if max(first, last) < one.stop:
            pieces.append(replace(one, start=max(first, last)))
    return pieces


def _is_seen(piece: _Stretch, unseen: list[int]) -> bool:
    return sum(piece.start <= place < piece.stop for place in unseen) < piece.stop - piece.start
