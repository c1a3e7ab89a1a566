"""What is written as plain numbers: the parameters of a model, and packed weights that only other files can hold."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from llama4lab.checkpoint.layouts import PREFIX, Layout, is_bank
from llama4lab.checkpoint.written_shards import Entry
from llama4lab.model.expert_bank import ExpertBank
from llama4lab.model.packed_weights import Packed, fetched, matrices_of, parameter_in_memory, shape_of, weights_of

Entries = dict[str, Entry]


def number_entries(model: nn.Module, dtype: torch.dtype) -> Entries:
    """Gives what to write for a model as plain numbers: expert after expert, so that few of them are in memory."""
    weights, _ = weights_of(model)
    layout = transformers_layout(weights, unfused=False)
    entries: Entries = {}
    for name, weight in weights.items():
        if isinstance(weight, Packed):
            entries[name] = Entry(dtype, shape_of(weight), _numbers(weight, dtype))
        else:
            entries |= parameter_entries(name, parameter_in_memory(model, name, weight), layout)
    return entries


def parameter_entries(name: str, tensor: Tensor, layout: Layout) -> Entries:
    """Gives what to write for a parameter of the model: a bank of experts as those of the checkpoint are."""
    stored = layout.stored(name, tuple(tensor.shape))
    if layout.experts == "fused" or not is_bank(name, tuple(tensor.shape)):
        return {on_disk: Entry.of(tensor) for on_disk in stored}
    turned = tensor.detach().mT
    if layout.experts == "stacked":
        parts = turned.split([shape[1] for shape in stored.values()], dim=1)
    else:
        each = len(stored) // len(tensor)
        parts = [half for expert in turned for half in expert.chunk(each)]
    return {on_disk: Entry.of(part) for on_disk, part in zip(stored, parts, strict=True)}


def transformers_layout(weights: Mapping[str, Tensor | Packed], *, unfused: bool) -> Layout:
    """Gives the layout of transformers for some weights of a model, with experts together or one by one."""
    prefixed = any(name.startswith(PREFIX) for name in weights)
    return Layout(prefixed=prefixed, experts="unfused" if unfused else "fused", vision=prefixed)


def _numbers(weight: Packed, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
    made = (fetched(weight, number).dense(dtype) for number in range(len(matrices_of(weight))))
    return lambda: (dense.T if isinstance(weight, ExpertBank) else dense for dense in made)
