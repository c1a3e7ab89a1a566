"""JSON objects read strictly: what Python's parser lets pass (duplicate keys, NaN) is an error here."""

import json
from pathlib import Path
from typing import Any

LARGEST = 64 * 2**20  # bytes; the index of the largest published Llama 4 is under 1 MB


def read_json(file: Path) -> dict[str, Any]:
    """Gives the JSON object that the file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not one JSON object, repeats a key, holds a number that is not finite, or is larger
            than 64 MB.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; such a file has at most {LARGEST:,}.")
    return parse_json(file.read_bytes(), source=str(file))


def parse_json(text: bytes, *, source: str) -> dict[str, Any]:
    """Gives the JSON object in these bytes; errors name the source."""
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply to be read.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{source} holds a JSON {type(document).__name__}; a JSON object was expected.")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {repeated!r} appears twice")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
