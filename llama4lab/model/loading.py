"""Loading: a checkpoint -> a model whose every weight was checked and put where it belongs.

The model is built without memory (on the meta device) and then filled, one tensor after the other in the order of the
files. Nothing but the tensor at hand is held twice, so the peak is the model plus its largest tensor. A weight that
needs no conversion and stays on the CPU is not copied at all: it shares the memory of its file until it is written to.
Every value is looked at once on the way, since a NaN or an infinity would spoil every result without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from accelerate import dispatch_model
from torch import nn
from transformers import GenerationConfig, Llama4Config, Llama4TextConfig

from llama4lab.checkpoint.locating import locate
from llama4lab.checkpoint.opening import files_of, settings_of
from llama4lab.checkpoint.schemes.encoding import Method
from llama4lab.checkpoint.strict_json import read_json
from llama4lab.checkpoint.weights import Weights
from llama4lab.model.expert_store import ExpertStore
from llama4lab.model.experts import Experts
from llama4lab.model.filling import Filling, held_nbytes
from llama4lab.model.llama4 import HookedLlama4, HookedLlama4ForCausalLM
from llama4lab.model.placement import Device, budgets_of, devices_of, on_disk, part_of, placed, spread

HookedModel = HookedLlama4 | HookedLlama4ForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    name: str | Path = "tiny",
    *,
    device_map: Device | Mapping[str, Device] | None = None,
    dtype: torch.dtype | str | None = None,
    experts: str = "resident",
    memory: Mapping[str, str | int] | None = None,
    quantize: str | None = None,
) -> HookedModel:
    """Gives the model of a checkpoint, ready to run: `HookedLlama4`, or `HookedLlama4ForCausalLM` if it is text only.

    Args:
        name: `"tiny"`, the trained checkpoint that comes with the package; a folder; a GGUF file; or an id on the
            Hugging Face hub, `"owner/name"` or `"owner/name/file.gguf"`, and `"@revision"` behind it for a branch, tag
            or commit. With `HF_HUB_OFFLINE=1` only what is in the cache of the hub already is used.
        device_map: One device for the whole model (None is the CPU); `"auto"` to spread it over the GPUs there are,
            the CPU for what does not fit, and, with `memory`, the disk for the rest, experts first; or a dict from the
            names of modules to devices. Matrices of modules on `"disk"` stay in their files, are read when they are
            used (of embeddings the rows), and are kept as `memory` allows.
        dtype: The dtype to compute in; `"auto"` is the one the weights are stored in. None is float32 when the whole
            model is on the CPU, where bfloat16 is slow, and the stored one otherwise.
        experts: `"resident"` to have all routed experts in memory, or `"offload"` to leave them in their files: those
            that tokens are routed to are read, and the last ones kept (`model.store` tells what it did).
        memory: How much each device may take, for example `{"cuda:0": "70GiB", "cpu": "100GiB"}`: with
            `device_map="auto"` for the whole model, otherwise for what is kept of the weights that wait on disk (by
            default half of the RAM that is free).
        quantize: `"int8"`, `"int4"` or `"fp8"` rounds the experts and the dense MLPs of a checkpoint of plain numbers
            while it is loaded, or, what waits on disk, when it is read: one matrix after the other. Weights only:
            activations are computed in `dtype`.

    Raises:
        FileNotFoundError: if the checkpoint, or a file of it, is not there.
        ValueError: if the checkpoint is malformed, quantized in an unknown way or not a Llama 4, if a weight is
            missing, superfluous, of another shape than config.json says, NaN or infinite, if a device or dtype is not
            available, or if what is asked for excludes each other.
        MemoryError: if `"auto"` finds no room for the model.
    """
    folder = locate(name)
    model = empty_model(folder)
    parameters, tied = _parameters(model)
    weights = opened(folder, model)
    _check_choices(experts, quantize, weights)
    alone = set(devices_of(device_map).values()) == {torch.device("cpu")}
    chosen = dtype_of(dtype, weights, model.config, on_cpu=alone)
    limits, places, offload = None if memory is None else budgets_of(memory), device_map, experts == "offload"
    if device_map == "auto" and (torch.cuda.is_available() or limits is not None):
        places, offload = spread(model, chosen, limits, offload=offload)
    devices = devices_of(places)
    waiting = _waiting(model, devices, on_disk(places), offload)
    store = ExpertStore(weights.shards, budgets_of(memory)) if waiting else None

    Filling(weights, chosen, placed(devices, parameters), waiting, store, quantize).fill(model, tied)
    if tied:
        model.tie_weights()
    model.store = store
    if store is not None and limits is not None and device_map == "auto":
        store.leave_room(held_nbytes(model))
    _record(model, name, folder, chosen)
    if len(set(devices.values())) > 1:
        # Moves each module's inputs to its device; modules on the CPU lend their weights to the GPU while they run.
        lent = {key: value for key, value in _tensors(model) if value.device.type == "cpu"}
        dispatch_model(model, dict(devices), state_dict=lent, skip_keys=list(model._skip_keys_device_placement or []))
    return model.eval()


def empty_model(folder: Path) -> HookedModel:
    """Gives the model that a checkpoint's config describes, without memory behind its parameters."""
    config = settings_of(folder)
    try:
        return without_memory(config)
    except RuntimeError as error:
        raise ValueError(f"{folder / 'config.json'} describes a model that cannot be built: {error}") from error


def without_memory(config: Llama4Config | Llama4TextConfig) -> HookedModel:
    """Gives the model of a config, without memory behind its parameters."""
    with torch.device("meta"):
        return HookedLlama4(config) if isinstance(config, Llama4Config) else HookedLlama4ForCausalLM(config)


def opened(folder: Path, model: HookedModel) -> Weights:
    """Opens the weights of a checkpoint for its empty model.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if the weights are malformed, or not those of the model.
    """
    parameters, tied = _parameters(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name not in tied}
    return Weights(files_of(folder), shapes, tied)


def _check_choices(experts: str, quantize: str | None, weights: Weights) -> None:
    if experts not in ("resident", "offload"):
        raise ValueError(f'experts={experts!r} was asked for; choose "resident" or "offload".')
    check_quantize(quantize, weights, advice="Load it without quantize.")


def check_quantize(quantize: str | None, weights: Weights | None, *, advice: str) -> None:
    """Raises ValueError when a method of quantizing is none, or when weights are quantized already.

    Args:
        quantize: The method; None for none.
        weights: What is stored; None if there is but a config.
        advice: What would work on weights that are quantized.
    """
    if quantize is None:
        return
    if quantize not in get_args(Method):
        raise ValueError(f"quantize={quantize!r} is not a method; choose from {', '.join(get_args(Method))}.")
    if weights is not None and weights.packed:
        raise ValueError(
            f"quantize={quantize!r} was asked for, but {len(weights.packed)} tensors of {weights.shards.folder} are "
            f"quantized already, {weights.packed[0]} among them.\n{advice}"
        )


def _waiting(model: HookedModel, devices: Mapping[str, torch.device], parts: set[str], offload: bool) -> set[str]:
    """Gives the parameters that wait on disk: those of parts that are placed there, and, if asked for, all experts."""
    banks = [f"{path}." for path, module in model.named_modules() if offload and isinstance(module, Experts)]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name for name in names if part_of(name, devices) in parts or name.startswith(tuple(banks))}


def _tensors(model: HookedModel) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _parameters(model: HookedModel) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Gives all parameters, and those that are another one once more, each with the name of that one."""
    parameters, first = dict(model.named_parameters(remove_duplicate=False)), dict[int, str]()
    return parameters, {
        name: first[id(parameter)]
        for name, parameter in parameters.items()
        if first.setdefault(id(parameter), name) != name
    }


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    settings = read_json(file)
    try:
        return GenerationConfig.from_dict(settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not valid: {error}") from error


def _record(model: HookedModel, name: str | Path, folder: Path, dtype: torch.dtype) -> None:
    """Notes on the model where it comes from and how it generates."""
    config = model.config
    parts = [config, config.text_config, config.vision_config] if isinstance(config, Llama4Config) else [config]
    for part in parts:
        part.dtype = dtype  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    config._name_or_path = str(name)
    model.folder = folder
    model.generation_config = _generation_config(folder) or model.generation_config


def dtype_of(
    dtype: torch.dtype | str | None, weights: Weights, config: Llama4Config | Llama4TextConfig, *, on_cpu: bool
) -> torch.dtype:
    """Gives the dtype to compute in. Weights stored in several dtypes follow config.json, or else the commonest."""
    if dtype is None and on_cpu:
        return torch.float32
    if dtype in (None, "auto"):
        stored = list(weights.dtypes())
        if isinstance(config.dtype, torch.dtype) and config.dtype in stored:
            return config.dtype
        return stored[0] if stored else torch.bfloat16
    return named_dtype(dtype)


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Gives the dtype that a name means.

    Raises:
        ValueError: if it is none that a model can compute in.
    """
    known = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None or known not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is not one a model can compute in; choose from auto, {', '.join(DTYPES)}.")
    return known
