"""The tensors of a checkpoint under the names that the model has for them."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.layouts import UNFUSED, VISION, Layout, Shape
from llama4lab.checkpoint.quantization import refuse_quantized_tensors
from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.spelling import listed, near_misses


class Weights:
    """Reads the tensors of a model from its shards, whatever the layout.

    Args:
        shards: The files.
        expected: The shape of each tensor the model needs, by its name in the model.
        tied: Names in the model of tensors that are another one once more, so that they need not be stored; each with
            the name of that other.

    Raises:
        ValueError: if the checkpoint is quantized, or lacks a tensor of the model, or has one too many, or one of
            another shape. Nothing is read yet.
    """

    def __init__(self, shards: Shards, expected: Mapping[str, Shape], tied: Mapping[str, str] | None = None):
        refuse_quantized_tensors(shards)
        self.shards = shards
        self.layout = Layout.of(shards)
        self._stored = {name: self.layout.stored(name, shape) for name, shape in expected.items()}
        for name, other in (tied or {}).items():
            stored = self.layout.stored(name, expected[other])
            if all(on_disk in shards for on_disk in stored):
                self._stored[name] = stored
        self._check_names()
        self._check_shapes()

    def in_file_order(self) -> list[str]:
        """Gives the names in the model in the order in which reading them walks through the files once."""

        def place(name: str) -> tuple[str, int]:
            first = next(iter(self._stored[name]))
            return str(self.shards.file(first)), self.shards.spec(first).start

        return sorted(self._stored, key=place)

    def dtypes(self) -> dict[torch.dtype, int]:
        """Gives how many bytes are stored in each dtype, the commonest first."""
        nbytes: dict[torch.dtype, int] = {}
        for name in self.shards:
            spec = self.shards.spec(name)
            nbytes[spec.dtype] = nbytes.get(spec.dtype, 0) + spec.nbytes
        return dict(sorted(nbytes.items(), key=lambda item: -item[1]))

    def read(
        self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "..."]:
        """Gives one tensor of the model, in the dtype it is stored in unless another is asked for.

        On the CPU, without a change of dtype, it shares the memory of the file.

        Raises:
            ValueError: if a value is NaN or infinite, or becomes so in the dtype that was asked for.
        """
        stored = list(self._stored[name])
        if UNFUSED.search(stored[0]):
            return self._joined(stored, dtype, device)
        return self._part(stored[0], dtype, device)

    def _part(self, on_disk: str, dtype: torch.dtype | None, device: torch.device | str) -> Float[Tensor, "..."]:
        source = self.shards[on_disk]
        tensor = source.to(device=device, dtype=dtype or source.dtype)
        if tensor.numel() == 0:
            return tensor
        lowest, highest = torch.aminmax(tensor)  # a NaN shows in both; no temporary copy, unlike isfinite
        if not (lowest.isfinite() and highest.isfinite()):
            file = self.shards.file(on_disk)
            if source.isfinite().all():
                raise ValueError(f"{file}: {on_disk} holds values too large for {dtype}; load it in another dtype.")
            bad = int(source.numel() - source.isfinite().sum())
            raise ValueError(f"{file}: {on_disk} holds {bad:,} values that are NaN or infinite; the file is damaged.")
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

    def _check_names(self) -> None:
        needed = {on_disk for stored in self._stored.values() for on_disk in stored}
        missing = sorted(needed - set(self.shards))
        extra = sorted(set(self.shards) - needed)
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
                        f"{self.shards.file(name)}: {name} has shape {list(found)}; "
                        f"by config.json it is {list(shape)}."
                        + ("\nIts axes seem to be in another order." if turned else "")
                    )
