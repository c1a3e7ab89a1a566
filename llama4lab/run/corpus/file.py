"""Statistics of a corpus as one file: npz, or parquet for other tools. A file appears only when it is complete."""

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llama4lab.run.corpus.arrays import AXES, KINDS, MODALITIES

KIND = "llama4lab.routing_stats/1"
HEADER = "header"
SPARSE = ("vocabulary",)  # nearly all zeros


def check_path(path: str | Path) -> None:
    """Whether a file of this name can be written, before there is anything to write.

    Raises:
        ValueError: if the name has another ending than .npz or .parquet.
        ImportError: if parquet is asked for and pyarrow is not installed.
    """
    suffix = Path(path).suffix
    if suffix not in (".npz", ".parquet"):
        raise ValueError(f"{path} ends in {suffix!r}; routing statistics are saved as .npz or .parquet.")
    if suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError(f"{path} needs pyarrow: pip install llama4lab[parquet]. Or save as .npz.")


def write(path: str | Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file, .npz or .parquet.

    Args:
        path: Where to.
        header: Everything else, as JSON can say it; it has the keys groups and layers, and with a vocabulary words.
        arrays: Those of `arrays.AXES`.

    Raises:
        ValueError: if the name has another ending.
        ImportError: if parquet is asked for and pyarrow is not installed.
    """
    check_path(path)
    path = Path(path)
    writer = _write_npz if path.suffix == ".npz" else _write_parquet
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        writer(unfinished, {"format": KIND, **header}, arrays)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Gives the header and the arrays of a file that `write` made.

    Raises:
        ValueError: if the file is something else.
    """
    check_path(path)
    path = Path(path)
    reader = _read_npz if path.suffix == ".npz" else _read_parquet
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        header, arrays = reader(path)
        found = header.pop("format", None)
    except (ValueError, KeyError, OSError, AttributeError, zipfile.BadZipFile) as problem:
        raise ValueError(f"{path} holds no routing statistics: {problem}") from problem
    if found != KIND:
        raise ValueError(f"{path} holds no routing statistics: it says {found!r}, expected {KIND!r}.")
    return header, arrays


def _write_npz(path: str, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    stored = {HEADER: np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    for name, array in arrays.items():
        if name in SPARSE:
            places = np.flatnonzero(array)
            stored |= {f"{name}.shape": np.array(array.shape), f"{name}.places": places}
            stored[f"{name}.counts"] = array.reshape(-1)[places]
        else:
            stored[name] = array
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **stored)


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(path, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    header = json.loads(stored.pop(HEADER).tobytes())
    arrays = {name: array for name, array in stored.items() if "." not in name}
    for name in SPARSE:
        if f"{name}.shape" in stored:
            array = np.zeros(stored[f"{name}.shape"], stored[f"{name}.counts"].dtype)
            array.reshape(-1)[stored[f"{name}.places"]] = stored[f"{name}.counts"]
            arrays[name] = array
    return header, arrays


def _write_parquet(path: str, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """One line for each count that is not zero: the name of its array, its place on each axis, and the number."""
    shapes = {name: [array.shape, str(array.dtype)] for name, array in arrays.items()}
    parts = [_lines(name, array, _labels(name, header)) for name, array in arrays.items() if array.any()]
    table = pd.concat(parts, ignore_index=True)
    for column in ("counts", "group", "modality", "kind"):
        if column in table:
            table[column] = table[column].astype("category")
    table.attrs = {HEADER: json.dumps({**header, "shapes": shapes})}
    table.to_parquet(path, index=False)


def _read_parquet(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    table = pd.read_parquet(path)
    header = json.loads(table.attrs[HEADER])
    arrays = {}
    for name, (shape, dtype) in header.pop("shapes").items():
        own, labels = table.loc[np.asarray(table["counts"] == name)], _labels(name, header)
        places = []
        for axis in AXES[name]:
            known = {label: place for place, label in enumerate(labels.get(axis, range(0)))}
            places.append(np.array([known.get(label, label) for label in own[axis].tolist()], dtype=np.int64))
        arrays[name] = np.zeros(shape, dtype)
        arrays[name][tuple(places)] = np.asarray(own["value"])
    return header, arrays


def _labels(name: str, header: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What the places on an axis are called, where it is not their number."""
    layers = header["words"] if name == "vocabulary" else header["layers"]
    return {"group": header["groups"], "modality": list(MODALITIES), "kind": list(KINDS), "layer": layers}


def _lines(name: str, array: np.ndarray, labels: dict[str, list[Any]]) -> pd.DataFrame:
    places = np.nonzero(array)
    columns: dict[str, Any] = {"counts": name}
    for axis, place in zip(AXES[name], places, strict=True):
        if axis in labels:
            columns[axis] = np.array(labels[axis], dtype=None if axis == "layer" else object)[place]
        else:
            columns[axis] = place
        if axis not in ("group", "modality", "kind"):
            columns[axis] = pd.array(columns[axis], dtype="Int32")
    return pd.DataFrame({**columns, "value": array[places].astype(np.int64)})
