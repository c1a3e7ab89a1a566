"""Saving packed and offloaded models: a checkpoint that gives the same model again, bit for bit."""

import copy
import json
from collections.abc import Mapping
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

from transformers import Llama4Config, PreTrainedModel

from llama4lab.checkpoint.opening import files_of
from llama4lab.checkpoint.quantization_settings import SECTIONS, copy_settings_files, kept_settings, told_settings
from llama4lab.checkpoint.settings import FILE
from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.spelling import near_misses
from llama4lab.checkpoint.tensor_files import TensorFiles
from llama4lab.checkpoint.written_shards import write_shards
from llama4lab.model.kept_tensors import is_from, kept_entries
from llama4lab.model.packed_weights import packed_of, shape_of, waits_in, weights_of
from llama4lab.model.placement import nbytes_of
from llama4lab.model.plain_tensors import Entries, number_entries
from llama4lab.model.rounded_tensors import is_rounded, rounded_entries

# What transformers does with numbers alone, each with the value that asks for nothing.
FOR_NUMBERS = {"push_to_hub": False, "variant": None, "distributed_checkpoint": False, "token": None}
FOR_THE_HUB = {"commit_message", "commit_description", "repo_id", "create_pr", "private", "revision", "tags"}


def check_options(options: Mapping[str, Any], *, packed: bool) -> None:
    """Refuses options of `save_pretrained` that would be left aside without a word.

    Args:
        options: What was given.
        packed: Whether the model is packed or offloaded.

    Raises:
        TypeError: if there is no such option.
        ValueError: if it asks for what cannot be written.
    """
    known = set(signature(PreTrainedModel.save_pretrained).parameters) - {"self", "save_directory", "kwargs"}
    known |= {"safe_serialization"} | (FOR_THE_HUB if options.get("push_to_hub") else set())
    for name, value in options.items():
        if name not in known:
            near = near_misses(name, known)
            raise TypeError(f"save_pretrained has no option {name!r}" + (f"; near misses: {near}." if near else "."))
        if name == "safe_serialization" and not value:
            raise ValueError(
                "safe_serialization=False asks for pickles; weights are written to safetensors files only."
            )
        if packed and value != FOR_NUMBERS.get(name, value):
            raise ValueError(
                f"{name}={value!r} was given; a packed or offloaded model is saved without it.\n"
                "Save to a folder first; with state_dict=model.state_dict() it is written as plain numbers."
            )


def check_target(model: PreTrainedModel, folder: Path) -> None:
    """Raises ValueError if weights of a model wait in the folder it is to be saved to."""
    if any(folder.resolve() == files.folder.resolve() for files in _on_disk(model)):
        raise ValueError(
            f"{folder} was given to save to, but the model reads weights from there whenever it uses them.\n"
            "Save to another folder."
        )


def write_packed(model: PreTrainedModel, folder: Path, max_shard_size: str | int) -> None:
    """Writes a packed or offloaded model into an empty folder; the config comes last.

    Raises:
        FileNotFoundError: if the checkpoint it was loaded from is needed, and not there any more.
        ValueError: if that holds other weights by now.
    """
    entries, settings = _form(model, folder)
    num_parameters = sum(prod(shape_of(weight)) for weight in weights_of(model)[0].values())
    write_shards(folder, entries, nbytes_of(max_shard_size), num_parameters)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write_config(model, folder, settings)


def write_config(model: PreTrainedModel, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes the config of a model, under the name of the class that other tools know.

    Args:
        model: The model.
        folder: Where to.
        settings: Of quantized weights; those of a part of the model are a mapping themselves.
    """
    config = copy.deepcopy(model.config)
    parts = [config, config.text_config, config.vision_config] if isinstance(config, Llama4Config) else [config]
    for part in parts if settings is not None else []:
        part.dtype = model.dtype  # pyright: ignore[reportAttributeAccessIssue] - the parts are configs
    config.architectures = [model.published_name]  # pyright: ignore[reportAttributeAccessIssue]
    config.save_pretrained(folder)
    if settings:
        document = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for key, value in settings.items():
            if key in SECTIONS:
                document.get(key, document).update(value)
            else:
                document[key] = value
        (folder / FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _form(model: PreTrainedModel, folder: Path) -> tuple[Entries, dict[str, Any]]:
    """What to write, and what the config says of it. Files beside the config that speak of it are copied."""
    source = _source(model)
    if source is not None and is_from(model, source):
        if not isinstance(source, Shards):  # no safetensors checkpoint is packed in the way of other files
            return number_entries(model, model.dtype), {}
        copy_settings_files(source.folder, folder)
        return kept_entries(model, source), kept_settings(source.folder)
    if is_rounded(model):
        made = rounded_entries(model)
        return made.entries, told_settings(made.modules, made.plain)
    origin = model.folder  # pyright: ignore[reportAttributeAccessIssue]
    if source is None:
        raise FileNotFoundError(f"The model was loaded from {origin}, which is not there; its settings are needed.")
    raise ValueError(
        f"The model was loaded from {origin}, which holds other weights by now, or has packed weights from elsewhere.\n"
        "With state_dict=model.state_dict() it is written as plain numbers."
    )


def _source(model: PreTrainedModel) -> TensorFiles | None:
    """The files of the checkpoint that a model was loaded from; None if they are gone."""
    found = _on_disk(model)
    origin: Path | None = model.folder  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    if found or origin is None:
        return found[0] if found else None
    try:
        return files_of(origin)
    except FileNotFoundError:
        return None


def _on_disk(model: PreTrainedModel) -> list[TensorFiles]:
    return [files for weight in packed_of(model) if (files := waits_in(weight)) is not None]
