"""The GGUF files of a checkpoint as a mapping from the model's names to tensors."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from llama4lab.checkpoint.gguf.blocks import GgmlBlocks
from llama4lab.checkpoint.gguf.header import Header, Stored
from llama4lab.checkpoint.gguf.names import ROPE_FACTORS, model_name
from llama4lab.checkpoint.gguf.pieces import read_model, read_vision
from llama4lab.checkpoint.tensor_files import Spec, TensorFiles, no_tensor, read_slice


class GgufFiles(TensorFiles):
    """Every tensor of a GGUF checkpoint, vision tower included, by the name that the model has for it.

    A tensor that a Llama 4 does not have keeps the name of the file, so that it is missed by nobody and refused.

    Args:
        path: The model; of a split one any part.

    Raises:
        FileNotFoundError: if a part is not there.
        ValueError: if a file is malformed or not one of a Llama 4, or a tensor is stored twice.
    """

    def __init__(self, path: Path):
        self.folder = path
        self._place: dict[str, tuple[Path, str]] = {}
        self._specs: dict[str, Spec] = {}
        self._checked: set[str] = set()
        vision = read_vision(path)
        for header in read_model(path):
            self._add(header, vision=False)
        if vision is not None:
            self._add(vision, vision=True)

    def spec(self, name: str) -> Spec:
        if name not in self._specs:
            raise no_tensor(self.folder, name, self._specs)
        return self._specs[name]

    def file(self, name: str) -> Path:
        self.spec(name)
        return self._place[name][0]

    def own_name(self, name: str) -> str:
        """Gives the name that the file itself has for a tensor."""
        self.spec(name)
        return self._place[name][1]

    def read(self, name: str, index: int | None = None) -> Shaped[Tensor, "..."]:
        spec = self.spec(name)
        values = read_slice(spec, self.file(name), self.own_name(name), index)
        if name not in self._checked:
            self._check(name, values)
        return values

    def __getitem__(self, name: str) -> Shaped[Tensor, "..."]:
        values = self._mapped(self.spec(name), self.file(name))
        if name not in self._checked:
            self._check(name, values)
            self._checked.add(name)
        return values

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _add(self, header: Header, *, vision: bool) -> None:
        for own, stored in header.tensors.items():
            if own == ROPE_FACTORS and not vision:
                continue  # the settings are read from it
            found = model_name(own)
            # Text in the file of a vision tower, or the other way round, belongs to nobody.
            name = found if found and _is_of_vision(found) == vision else own
            if name in self._place:
                file, other = self._place[name]
                raise ValueError(f"{header.file}: {own} is stored twice: as {other} in {file} too.")
            self._place[name] = header.file, own
            self._specs[name] = _spec(stored)

    def _check(self, name: str, values: Shaped[Tensor, "..."]) -> None:
        scheme = self._specs[name].scheme
        if isinstance(scheme, GgmlBlocks) and not scheme.is_finite(values):
            file, own = self._place[name]
            raise ValueError(f"{file}: {own} has scales that are NaN or infinite; the file is damaged.")

    def _mapped(self, spec: Spec, file: Path) -> Shaped[Tensor, "..."]:
        # One mapping a tensor, which goes when the tensor goes.
        start = spec.start - spec.start % mmap.ALLOCATIONGRANULARITY
        with file.open("rb") as opened:
            stop = spec.start + spec.nbytes
            pages = mmap.mmap(opened.fileno(), stop - start, access=mmap.ACCESS_COPY, offset=start)
        values = memoryview(pages)[spec.start - start :]
        return torch.frombuffer(values, dtype=spec.dtype).view(spec.shape)


def _spec(stored: Stored) -> Spec:
    kind = stored.kind
    scheme = GgmlBlocks(kind) if kind.is_packed else None
    return Spec(kind.dtype, kind.stored_shape(stored.shape), stored.start, stored.nbytes, scheme)


def _is_of_vision(name: str) -> bool:
    return name.startswith(("vision_model.", "multi_modal_projector."))
