"""Named tensors and their metadata as one safetensors file that says what it is."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, which appears under its name only when it is complete.

    Args:
        path: Where to.
        kind: What the file says it is, for example "llama4lab.run/1".
        tensors: The tensors.
        metadata: Everything else, as text.
    """
    path = Path(path)
    # Views share memory with what they were cut from; a file must hold each tensor once and whole.
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(stored, unfinished, {"format": kind, **metadata})
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Gives the tensors and the metadata of a file that `write_tensors` made.

    Raises:
        ValueError: if the file is something else.
    """
    noun = kind.partition(".")[2].partition("/")[0].replace("_", " ")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                found = metadata.get("format", "no format")
                raise ValueError(f"{path} is not a {noun}: its metadata says {found!r}, expected {kind!r}.")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping
    except SafetensorError as problem:
        raise ValueError(f"{path} is not a {noun}: it is no complete safetensors file ({problem}).") from problem
