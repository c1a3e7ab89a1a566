"""`MetaFiles`: the tensors of a checkpoint of Meta's under the names of the model, joined from all ranks."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from llama4lab.checkpoint.meta.experts import Shares
from llama4lab.checkpoint.meta.joins import Join, Piece
from llama4lab.checkpoint.meta.names import IGNORED, Bank, Target, bank_of, target_of
from llama4lab.checkpoint.meta.ranks import Pieces, read_ranks, read_scales
from llama4lab.checkpoint.spelling import near_misses
from llama4lab.checkpoint.tensor_files import Spec, TensorFiles, no_tensor, read_extremes


class MetaFiles(TensorFiles):
    """Every tensor by its name in the model. Opening reads headers only; a tensor is joined when it is asked for.

    Experts have a name each, so that one can be read alone: `model.layers.0.feed_forward.experts.3.gate_proj.weight`.
    The file of a tensor, and its place there, are those of its first piece.

    Args:
        folder: Where `params.json` and `consolidated.NN.pth` are.

    Raises:
        FileNotFoundError: if the file of a rank is not there.
        ValueError: if a file is malformed, if ranks do not fit each other, or if a tensor is not one of a Llama 4.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        pieces = read_ranks(folder)
        self.ranks = len(next(iter(pieces.values()), ()))
        method, scales = read_scales(folder, self.ranks)
        self._joins: dict[str, Join] = {}
        self._stored: dict[str, str] = {}
        scale_of = {bank: scales[name] for name in scales if (bank := bank_of(name))}
        if strange := [name for name in scales if bank_of(name) is None]:
            raise _unknown(scales[strange[0]][0], strange[0], scales)
        for name, own in pieces.items():
            if target := target_of(name):
                self._add(name, _joined(name, own, target, pieces))
            elif bank := bank_of(name):
                shares = _shares(name, bank, pieces, scale_of.pop(bank, ()), method)
                self._add(name, shares.joins())
            elif not IGNORED.fullmatch(name):
                raise _unknown(own[0], name, pieces)
        for bank, left in scale_of.items():
            raise ValueError(f"{left[0].file}: layer {bank.layer} has scales for {bank.projection}, and no experts.")

    def spec(self, name: str) -> Spec:
        return self._join(name).spec

    def file(self, name: str) -> Path:
        return self._join(name).pieces[0].file

    def extremes(self, name: str) -> tuple[Shaped[Tensor, ""], Shaped[Tensor, ""]]:
        found = [value for piece in self._join(name).pieces for value in read_extremes(piece.spec, piece.file)]
        return torch.aminmax(torch.stack(found))

    def read(self, name: str, index: int | None = None) -> Shaped[Tensor, "..."]:
        join = self._join(name)
        if index is None:
            return join.read(name)
        if not 0 <= index < join.shape[0]:
            raise IndexError(f"{self.file(name)}: slice {index} of {name} was asked for; it has {join.shape[0]}.")
        return join.read(name)[index].clone() if join.turned else join.row(index).read(name)

    def __getitem__(self, name: str) -> Shaped[Tensor, "..."]:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._joins

    def __iter__(self) -> Iterator[str]:
        return iter(self._joins)

    def __len__(self) -> int:
        return len(self._joins)

    def _join(self, name: str) -> Join:
        if name not in self._joins:
            raise no_tensor(self.folder, name, self._joins)
        return self._joins[name]

    def _add(self, stored: str, joins: Iterator[tuple[str, Join]]) -> None:
        for name, join in joins:
            if name in self._joins:
                raise ValueError(f"{join.pieces[0].file}: {stored} and {self._stored[name]} are both {name}.")
            self._joins[name], self._stored[name] = join, stored


def _joined(name: str, pieces: tuple[Piece, ...], target: Target, among: Pieces) -> Iterator[tuple[str, Join]]:
    """Gives the tensors that a stored one is, each joined from all ranks."""
    axes = len(pieces[0].spec.shape)
    if (target.axis or 0) >= axes or ((target.turned or len(target.names) > 1) and axes != 2):
        raise ValueError(f"{pieces[0].file}: {name} has shape {list(pieces[0].spec.shape)}; it is a matrix.")
    start = 0
    for own, rows in zip(target.names, _rows(name, pieces[0], len(target.names), among), strict=True):
        yield own, Join(tuple(piece.rows(start, start + rows) for piece in pieces), target.axis, target.turned)
        start += rows


def _rows(name: str, piece: Piece, parts: int, among: Pieces) -> list[int]:
    """Gives how many rows of a rank's tensor each of its parts has."""
    rows = piece.spec.shape[0]
    if parts == 3:
        beside = name.replace("wqkv", "wo")
        if beside not in among or len(among[beside][0].spec.shape) != 2:
            raise ValueError(f"{piece.file}: {name} is stored without {beside}, which tells the number of its queries.")
        queries = among[beside][0].spec.shape[1]
        if rows <= queries or (rows - queries) % 2:
            raise ValueError(
                f"{piece.file}: {name} has {rows} rows, which {queries} queries, keys and values do not give."
            )
        return [queries, (rows - queries) // 2, (rows - queries) // 2]
    if rows % parts:
        raise ValueError(f"{piece.file}: {name} has {rows} rows; gate and up have the same number.")
    return [rows // parts] * parts


def _shares(name: str, bank: Bank, pieces: Pieces, scales: tuple[Piece, ...], method: str | None) -> Shares:
    router = pieces.get(f"layers.{bank.layer}.feed_forward.router_DE")
    if router is None or len(router[0].spec.shape) != 2 or not all(router[0].spec.shape):
        raise ValueError(
            f"{pieces[name][0].file}: {name} is stored without the router of its layer, a matrix router_DE."
        )
    d_model, experts = router[0].spec.shape
    return Shares(bank, name, pieces[name], scales, method if scales else None, experts, d_model)


def _unknown(piece: Piece, name: str, names: Pieces) -> ValueError:
    known = [re.sub(r"\.\d+\.", ".N.", other) for other in names if target_of(other) or bank_of(other)]
    near = near_misses(re.sub(r"\.\d+\.", ".N.", name), dict.fromkeys(known))
    return ValueError(f"{piece.file}: {name} is no tensor of a Llama 4" + (f"; near misses: {near}." if near else "."))
