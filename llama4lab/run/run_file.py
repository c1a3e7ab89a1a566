"""A run (or a sweep) as one safetensors file: the tensors, and in its metadata everything else as JSON."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.prompt import Prompt, Span
from llama4lab.prompt.tiling import Tiling
from llama4lab.run.tensor_file import read_tensors, write_tensors

RUN = "llama4lab.run/1"


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], prompt: Prompt, kind: str = RUN) -> None:
    """Writes a file, which appears under its name only when it is complete.

    Args:
        path: Where to.
        tensors: The recorded tensors.
        header: JSON-able facts about them.
        prompt: What was run.
        kind: What the file says it is.
    """
    prompt_tensors, prompt_facts = _taken_apart(prompt)
    metadata = {"order": json.dumps(list(tensors)), "header": json.dumps(header)}
    metadata["prompt"] = json.dumps(prompt_facts)
    write_tensors(path, kind, {**tensors, **prompt_tensors}, metadata)


def read(path: Path, kind: str = RUN) -> tuple[dict[str, Tensor], dict[str, Any], Prompt]:
    """Gives the tensors, the header and the prompt of a file that `write` made.

    Raises:
        ValueError: if the file is something else.
    """
    tensors, metadata = read_tensors(path, kind)
    prompt = _put_together(tensors, json.loads(metadata["prompt"]))
    return {name: tensors[name] for name in json.loads(metadata["order"])}, json.loads(metadata["header"]), prompt


def _taken_apart(prompt: Prompt) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"prompt.input_ids": prompt.input_ids, "prompt.attention_mask": prompt.attention_mask}
    if prompt.pixel_values is not None:
        tensors["prompt.pixel_values"] = prompt.pixel_values
    images = []
    for number, layout in enumerate(prompt.images):
        tensors[f"prompt.images.{number}.positions"] = layout.positions
        if layout.original is not None:
            tensors[f"prompt.images.{number}.original"] = torch.from_numpy(np.array(layout.original.convert("RGB")))
        images.append(
            {
                "row": layout.row,
                "tiling": asdict(layout.tiling),
                "tiles": [layout.tiles.start, layout.tiles.stop],
                "grid": layout.grid,
                "patch_grid": layout.patch_grid,
            }
        )
    spans = [[asdict(span) for span in row] for row in prompt.spans]
    return tensors, {"tokens": prompt.tokens, "modality": prompt.modality, "spans": spans, "images": images}


def _put_together(tensors: dict[str, Tensor], known: dict[str, Any]) -> Prompt:
    images = []
    for number, image in enumerate(known["images"]):
        original = tensors.get(f"prompt.images.{number}.original")
        images.append(
            ImageLayout(
                row=image["row"],
                tiling=Tiling(**{name: _tuple(value) for name, value in image["tiling"].items()}),
                tiles=slice(*image["tiles"]),
                grid=_tuple(image["grid"]),
                patch_grid=_tuple(image["patch_grid"]),
                positions=tensors[f"prompt.images.{number}.positions"],
                original=None if original is None else Image.fromarray(original.numpy()),
            )
        )
    return Prompt(
        input_ids=tensors["prompt.input_ids"],
        attention_mask=tensors["prompt.attention_mask"],
        pixel_values=tensors.get("prompt.pixel_values"),
        tokens=known["tokens"],
        modality=known["modality"],
        images=images,
        spans=[[Span(**span) for span in row] for row in known["spans"]],
    )


def _tuple(value: Any) -> Any:
    """JSON has lists for tuples."""
    return tuple(value) if isinstance(value, list) else value
