"""Loading: a checkpoint -> a model whose every weight was checked and put where it belongs.

The model is built without memory (on the meta device) and then filled, one tensor after the other in the order of the
files. Nothing but the tensor at hand is held twice, so the peak is the model plus its largest tensor. A weight that
needs no conversion and stays on the CPU is not copied at all: it shares the memory of its file until it is written to.
Every value is looked at once on the way, since a NaN or an infinity would spoil every result without a word.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import Tensor, nn
from transformers import GenerationConfig, Llama4Config, Llama4TextConfig

from llama4lab.checkpoint.locating import locate
from llama4lab.checkpoint.settings import read_config
from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.spelling import near_misses
from llama4lab.checkpoint.strict_json import read_json
from llama4lab.checkpoint.weights import Weights
from llama4lab.model.llama4 import HookedLlama4, HookedLlama4ForCausalLM

Device = torch.device | str | int
HookedModel = HookedLlama4 | HookedLlama4ForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    name: str | Path = "tiny",
    *,
    device_map: Device | Mapping[str, Device] | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> HookedModel:
    """Gives the model of a checkpoint, ready to run: `HookedLlama4`, or `HookedLlama4ForCausalLM` if it is text only.

    Args:
        name: `"tiny"`, the trained checkpoint that comes with the package; a folder; or an id on the Hugging Face hub.
        device_map: One device for the whole model (None is the CPU); `"auto"` to spread it over the GPUs there are, and
            the CPU for what does not fit; or a dict from the names of modules to devices.
        dtype: The dtype to compute in; `"auto"` is the one the weights are stored in. None is float32 when the whole
            model is on the CPU, where bfloat16 is slow, and the stored one otherwise.
        revision: The branch, tag or commit to take from the hub.
        local_files_only: Whether to use only what is in the cache of the hub already.

    Raises:
        FileNotFoundError: if the checkpoint, or a file of it, is not there.
        ValueError: if the checkpoint is malformed, quantized or not a Llama 4, if a weight is missing, superfluous, of
            another shape than config.json says, NaN or infinite, or if a device or dtype is not available.
        MemoryError: if `"auto"` finds no room for the model.
    """
    folder = locate(name, revision=revision, local_files_only=local_files_only)
    model = empty_model(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = _tied(parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name not in tied}
    weights = Weights(Shards(folder), shapes, tied)

    devices = _devices(device_map)
    chosen = _dtype(dtype, weights, model.config, on_cpu=set(devices.values()) == {torch.device("cpu")})
    if device_map == "auto" and torch.cuda.is_available():
        devices = _spread(model, chosen)
    placed = _placed(devices, parameters)

    _fill(model, weights, tied, chosen, placed)
    _record(model, name, folder, chosen)
    if len(set(devices.values())) > 1:
        # Moves each module's inputs to its device; modules on the CPU lend their weights to the GPU while they run.
        dispatch_model(model, dict(devices), skip_keys=list(model._skip_keys_device_placement or []))
    return model.eval()


def empty_model(folder: Path) -> HookedModel:
    """Gives the model that a checkpoint's config describes, without memory behind its parameters."""
    config = read_config(folder)
    try:
        with torch.device("meta"):
            return HookedLlama4(config) if isinstance(config, Llama4Config) else HookedLlama4ForCausalLM(config)
    except RuntimeError as error:
        raise ValueError(f"{folder / 'config.json'} describes a model that cannot be built: {error}") from error


def _tied(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Gives the parameters that are another one once more, each with the name of that one."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in parameters.items()
        if first.setdefault(id(parameter), name) != name
    }


def _fill(
    model: HookedModel,
    weights: Weights,
    tied: Mapping[str, str],
    dtype: torch.dtype,
    placed: Mapping[str, torch.device],
) -> None:
    """Puts every stored tensor into its place, in the order of the files."""
    # What is tied comes last, when the tensor it has to equal is there.
    for name in sorted(weights.in_file_order(), key=tied.__contains__):
        tensor = weights.read(name, dtype=dtype, device=placed[name])
        if name in tied:
            _check_tied(model, name, tied[name], tensor, weights.shards.folder)
        else:
            _assign(model, name, tensor)
    if tied:
        model.tie_weights()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    empty = module.get_parameter(leaf)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=empty.requires_grad))


def _check_tied(model: nn.Module, name: str, other: str, tensor: Tensor, folder: Path) -> None:
    values = model.get_parameter(other)
    if not torch.equal(values.to(tensor.device), tensor):
        raise ValueError(
            f"{folder / 'config.json'} ties {name} to {other} (tie_word_embeddings), yet both are stored and differ."
        )


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


def _dtype(
    dtype: torch.dtype | str | None, weights: Weights, config: Llama4Config | Llama4TextConfig, *, on_cpu: bool
) -> torch.dtype:
    """Gives the dtype to compute in. Weights stored in several dtypes follow config.json, or else the commonest."""
    if dtype is None and on_cpu:
        return torch.float32
    if dtype in (None, "auto"):
        stored = list(weights.dtypes())
        return config.dtype if isinstance(config.dtype, torch.dtype) and config.dtype in stored else stored[0]
    known = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None or known not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is not one a model can compute in; choose from auto, {', '.join(DTYPES)}.")
    return known


def _devices(device_map: Device | Mapping[str, Device] | None) -> dict[str, torch.device]:
    """Gives the device of each named part of the model; the name "" is the whole. "auto" is the first GPU for now."""
    if device_map is None:
        return {"": torch.device("cpu")}
    if isinstance(device_map, Mapping):
        return {module: _device(device) for module, device in device_map.items()}
    if device_map == "auto":
        return {"": torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")}
    return {"": _device(device_map)}


def _device(device: Device) -> torch.device:
    if device == "disk":
        raise ValueError('A device_map with "disk" is not supported; weights live on the CPU or on a GPU.')
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{device!r} is not a device; write "cpu", "cuda", "cuda:1" or "auto".') from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        chosen = torch.device("cuda", chosen.index or 0)
        if chosen.index >= count:
            raise ValueError(f'{str(device)!r} was asked for; torch finds {count} CUDA devices here. "cpu" works.')
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError('"mps" was asked for, which torch does not find here; "cpu" works.')
    elif chosen.type not in ("cpu", "mps"):
        raise ValueError(f'{str(device)!r} cannot hold a model; write "cpu", "cuda", "cuda:1" or "auto".')
    return chosen


def _spread(model: HookedModel, dtype: torch.dtype) -> dict[str, torch.device]:
    """Gives a device for every module by the memory that is free now: GPUs first, then the CPU."""
    places = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or []), dtype=dtype)
    if "disk" in places.values():
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize / 2**30
        raise MemoryError(f"The model takes {size:,.1f} GiB in {dtype}, more than GPUs and RAM have free together.")
    return {module: torch.device(place) for module, place in places.items()}


def _placed(devices: Mapping[str, torch.device], parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.device]:
    """Gives the device of each parameter: that of the longest named part of its path."""
    placed: dict[str, torch.device] = {}
    used: set[str] = set()
    for name in parameters:
        parts = name.split(".")
        paths = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        module = next((path for path in paths if path in devices), None)
        if module is None:
            raise ValueError(f'device_map places no part of the model that holds {name}; add it, or "" for the rest.')
        placed[name] = devices[module]
        used.add(module)
    for module in devices:
        if module not in used:
            modules = {name.rpartition(".")[0] for name in parameters}
            near = near_misses(module, modules | {path.rpartition(".")[0] for path in modules})
            raise ValueError(
                f"device_map names {module!r}, which holds no weight" + (f"; near: {near}." if near else ".")
            )
    return placed
