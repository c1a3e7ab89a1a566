"""The tensors of a checkpoint under the names that the model has for them."""

from collections import Counter
from collections.abc import Mapping
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.layouts import VISION, Layout, Shape, is_bank
from llama4lab.checkpoint.matrices import Matrix
from llama4lab.checkpoint.quantization import is_for_activations, refuse_unread
from llama4lab.checkpoint.recognition import PLAIN_DTYPES, Recognition
from llama4lab.checkpoint.spelling import listed, near_misses
from llama4lab.checkpoint.tensor_files import TensorFiles


class Weights:
    """Reads the tensors of a model from its shards, whatever the layout.

    Args:
        shards: The files.
        expected: The shape of each tensor the model needs, by its name in the model.
        tied: Names in the model of tensors that are another one once more, so that they need not be stored; each with
            the name of that other.

    Raises:
        ValueError: if the checkpoint is quantized in a way that cannot be read, or lacks a tensor of the model, or has
            one too many, or one of another shape. Nothing is read yet.
    """

    def __init__(self, shards: TensorFiles, expected: Mapping[str, Shape], tied: Mapping[str, str] | None = None):
        self.shards = shards
        self.layout = Layout.of(shards)
        self._shapes = dict(expected)
        self._packed: dict[str, list[list[Matrix]]] = {}
        self._banks = {name for name, shape in expected.items() if is_bank(name, shape)}
        self._stored = {name: self.layout.stored(name, shape) for name, shape in expected.items()}
        for name, other in (tied or {}).items():
            stored = self.layout.stored(name, expected[other])
            if all(on_disk in shards for on_disk in stored):
                self._stored[name] = stored
                self._shapes[name] = expected[other]
        self._recognition = Recognition(shards)
        for name, shape in self._shapes.items():
            if not self._is_plain(name, shape) and (found := self._recognised(name, shape)):
                self._packed[name] = found
                self._stored[name] = {}
        read = self._read_names()
        # A file that says of each tensor how it is packed has no scales that could be missed.
        refuse_unread(shards, read | {name for name in shards if shards.spec(name).scheme is not None})
        self._check_names(read)
        self._check_shapes()

    @property
    def packed(self) -> list[str]:
        """The names in the model of tensors that are quantized, in whole or in part."""
        return [name for name, banks in self._packed.items() if any(not m.is_plain for own in banks for m in own)]

    def matrices(self, name: str) -> list[list[Matrix]]:
        """Gives the matrices of a tensor of the model as they are stored: a list for each expert, or one in all.

        Those of an expert are joined along `out`.
        """
        found = self._packed.get(name) or self._recognised(name, self._shapes[name])
        if found is None:
            raise KeyError(f"{name} is not made of matrices.")
        return found

    def on_disk(self, name: str) -> list[str]:
        """Gives the names on disk of the tensors that one tensor of the model is made of."""
        if name not in self._packed:
            return list(self._stored[name])
        return [part.name for own in self._packed[name] for matrix in own for part in matrix.parts.values()]

    def counts(self) -> dict[str, int]:
        """Gives how many numbers each tensor of the model has."""
        return {name: prod(shape) for name, shape in self._shapes.items()}

    def schemes(self) -> dict[str, int]:
        """Gives how many matrices are stored in each way that is not plain, the commonest first."""
        found = [m.scheme.name for banks in self._packed.values() for own in banks for m in own if not m.is_plain]
        return dict(Counter(found).most_common())

    def in_file_order(self) -> list[str]:
        """Gives the names in the model in the order in which reading them walks through the files once."""

        def place(name: str) -> tuple[str, int]:
            first = next(iter(self.on_disk(name)))
            return str(self.shards.file(first)), self.shards.spec(first).start

        return sorted(self._stored, key=place)

    def dtypes(self) -> dict[torch.dtype, int]:
        """Gives how many bytes are stored as plain numbers in each dtype, the commonest first."""
        nbytes: dict[torch.dtype, int] = {}
        for name in self.shards:
            spec = self.shards.spec(name)
            if spec.dtype in PLAIN_DTYPES:
                nbytes[spec.dtype] = nbytes.get(spec.dtype, 0) + spec.nbytes
        return dict(sorted(nbytes.items(), key=lambda item: -item[1]))

    def read(
        self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "..."]:
        """Gives one tensor of the model, in the dtype it is stored in unless another is asked for.

        On the CPU, without a change of dtype, it shares the memory of the file. What is quantized comes as the numbers
        it stands for, in float32 unless another dtype is asked for.

        Raises:
            ValueError: if a value is NaN or infinite, or becomes so in the dtype that was asked for.
        """
        if name in self._packed:
            return self._unpacked(name, dtype or torch.float32, device)
        stored = list(self._stored[name])
        if name in self._banks and self.layout.experts == "unfused":
            return self._joined(stored, dtype, device)
        return self._part(stored[0], dtype, device)

    def _is_plain(self, name: str, shape: Shape) -> bool:
        """Whether a tensor is there as numbers: in one, or one for each expert."""
        if is_bank(name, shape) and self.layout.experts == "stacked":
            return False
        stored = self._stored[name]
        return all(self._has_numbers(on_disk) for on_disk in stored)

    def _recognised(self, name: str, shape: Shape) -> list[list[Matrix]] | None:
        """The matrices of a tensor; None where one of them is not there in a known form."""
        if len(shape) != 2 and not is_bank(name, shape):
            return None
        found: list[list[Matrix]] = []
        for places in self.layout.matrices(name, shape):
            own = [self._matrix(name, base, inner, index, shape) for base, inner, index in places]
            if any(matrix is None for matrix in own):
                return None
            found.append([matrix for matrix in own if matrix is not None])
        return found

    def _matrix(self, name: str, base: str, inner: tuple[int, int], index: int | None, shape: Shape) -> Matrix | None:
        if is_bank(name, shape) and self.layout.experts == "fused":
            return self._recognition.fused(base, shape, index or 0)
        return self._recognition.linear(base, inner, index, None if index is None else shape[0])

    def _read_names(self) -> set[str]:
        plain = (name for name in self._stored if name not in self._packed)
        read = {on_disk for name in plain for on_disk in self._stored[name] if self._has_numbers(on_disk)}
        return read | {on_disk for name in self._packed for on_disk in self.on_disk(name)}

    def _has_numbers(self, on_disk: str) -> bool:
        return on_disk in self.shards and self.shards.spec(on_disk).dtype in PLAIN_DTYPES

    def _unpacked(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Float[Tensor, "..."]:
        """The numbers of quantized matrices; those of experts stacked, as [expert, in, out]."""

        def joined(own: list[Matrix]) -> Float[Tensor, "d_out d_in"]:
            return torch.cat([matrix.dense(matrix.mapped(self.shards), dtype).to(device) for matrix in own])

        made = [joined(own) for own in self._packed[name]]
        return torch.stack([matrix.T for matrix in made]) if name in self._banks else made[0]

    def _part(self, on_disk: str, dtype: torch.dtype | None, device: torch.device | str) -> Float[Tensor, "..."]:
        source = self.shards[on_disk]
        tensor = source.to(device=device, dtype=dtype or source.dtype)
        if tensor.numel() == 0:
            return tensor
        # A NaN shows in both; there is no temporary copy, unlike with isfinite.
        lowest, highest = self.shards.extremes(on_disk) if tensor is source else torch.aminmax(tensor)
        if not (lowest.isfinite() and highest.isfinite()):
            place = self.shards.place(on_disk)
            if source.isfinite().all():
                raise ValueError(f"{place} holds values too large for {dtype}; load it in another dtype.")
            bad = int(source.numel() - source.isfinite().sum())
            raise ValueError(f"{place} holds {bad:,} values that are NaN or infinite; the file is damaged.")
        return tensor

    def _joined(
        self, parts: list[str], dtype: torch.dtype | None, device: torch.device | str
    ) -> Float[Tensor, "expert d_in d_out"]:
        """Stacks the parts of all experts, each turned from [out, in] to [in, out]."""
        num_experts = len({part.rsplit(".", 3)[1] for part in parts})
        columns = len(parts) // num_experts  # gate and up side by side, or down alone
        spec = self.shards.spec(parts[0])
        d_out, d_in = spec.shape
        joined = torch.empty(num_experts, d_in, columns, d_out, dtype=dtype or spec.dtype, device=device)
        for index, part in enumerate(parts):
            joined[index // columns, :, index % columns] = self._part(part, joined.dtype, device).T
        return joined.flatten(2)

    def _check_names(self, read: set[str]) -> None:
        needed = {on_disk for stored in self._stored.values() for on_disk in stored}
        missing = sorted(needed - set(self.shards))
        known = needed | read
        extra = sorted(name for name in self.shards if name not in known and not is_for_activations(name))
        if not missing and not extra:
            return
        advice = self._advice(missing, extra)
        if missing:
            near = near_misses(missing[0], extra)
            raise ValueError(
                f"{self.shards.folder} lacks {len(missing)} tensors of the model ({self.layout}): {listed(missing)}."
                + (f"\nIt has no use for: {near or listed(extra)}." if extra else "")
                + advice
            )
        raise ValueError(
            f"{self.shards.file(extra[0])} holds {len(extra)} tensors that the model does not have: {listed(extra)}."
            + advice
        )

    def _advice(self, missing: list[str], extra: list[str]) -> str:
        if self.layout.vision and all(name.startswith(VISION) for name in extra) and not missing:
            return '\nThey are vision weights, yet config.json says "llama4_text": it belongs to another checkpoint.'
        if not self.layout.vision and any(name.startswith(VISION) for name in missing):
            return (
                '\nThe vision weights are not there; for text alone put text_config into config.json ("llama4_text").'
            )
        return "\nconfig.json and the weights must belong together."

    def _check_shapes(self) -> None:
        for stored in self._stored.values():
            for name, shape in stored.items():
                found = self.shards.spec(name).shape
                if found != shape:
                    turned = sorted(found) == sorted(shape) and len(shape) > 1
                    raise ValueError(
                        f"{self.shards.place(name)} has shape {list(found)}; "
                        f"by config.json it is {list(shape)}."
                        + ("\nIts axes seem to be in another order." if turned else "")
                    )
