"""Files that do not go together: a wrong index, a shard that is missing or leaves the folder, no weights at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"
Damage = Callable[[Path, Any], object]


def written(data: bytes, name: str) -> Damage:
    return lambda folder, make: (folder / name).write_bytes(data)


def only(name: str) -> Damage:
    """Leaves one file of that name instead of the weights."""

    def damage(folder, make):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(b"weights")

    return damage


def indexed(change: Callable[[dict], object]) -> Damage:
    """Changes the weight map of the index."""

    def damage(folder, make):
        document = json.loads((folder / INDEX).read_text())
        change(document["weight_map"])
        (folder / INDEX).write_text(json.dumps(document))

    return damage


def placed(shard: object) -> Damage:
    """Lets the index place one tensor in that file."""
    return indexed(lambda weight_map: weight_map.update({NORM: shard}))


def linked_out(folder, make):
    target = folder.parent / "elsewhere.safetensors"
    (folder / SECOND).rename(target)
    (folder / SECOND).symlink_to(target)


def stored_twice(folder, make):
    other = next(file for file in sorted(folder.glob("*.safetensors")) if NORM not in load_file(file))
    save_file(load_file(other) | {NORM: torch.ones(16)}, other)


def not_listed(folder, make):
    save_file(load_file(folder / SECOND) | {"stowaway": torch.ones(1)}, folder / SECOND)


IN_SEVERAL_FILES: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda folder, make: (folder / SECOND).unlink(), f"3 files, of which 1 are missing: {SECOND}"),
    "a shard that is a folder": (
        lambda folder, make: ((folder / SECOND).unlink(), (folder / SECOND).mkdir()),
        f"of which 1 are missing: {SECOND}",
    ),
    "truncated shard": (
        lambda folder, make: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1]),
        f"{SECOND} is not a readable",
    ),
    "empty index": (written(b"", INDEX), f"{INDEX} is not valid JSON"),
    "index a list": (written(b"[]", INDEX), f"{INDEX} holds a JSON list"),
    "index without weight_map": (written(b"{}", INDEX), f"{INDEX} has no weight_map"),
    "empty weight_map": (written(b'{"weight_map": {}}', INDEX), f"{INDEX} has no weight_map"),
    "weight_map a list": (written(b'{"weight_map": ["a"]}', INDEX), f"{INDEX} has no weight_map"),
    "index nested deeply": (written(b'{"weight_map":' * 200_000 + b"1" + b"}" * 200_000, INDEX), f"{INDEX} is nested"),
    "huge index": (written(b'{"weight_map": "' + bytes(2**26) + b'"}', INDEX), r"has 67,108,882 bytes"),
    "name twice in the index": (
        written(b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', INDEX),
        f"{INDEX} is not valid JSON: the key 'a' appears twice",
    ),
    "name placed in the wrong shard": (
        indexed(
            lambda weight_map: weight_map.update({NORM: next(s for s in weight_map.values() if s != weight_map[NORM])})
        ),
        rf"{INDEX} places {NORM} in model-0000\d-of-00003\.safetensors; it is in model-0000\d",
    ),
    "name that no shard holds": (
        indexed(lambda weight_map: weight_map.update({"model.norm.wait": weight_map[NORM]})),
        rf"{INDEX} places model\.norm\.wait in .*, which does not hold it\.\nNear misses there: {NORM}",
    ),
    "name that the index does not list": (not_listed, rf"{SECOND} holds tensors that .* does not list: stowaway"),
    "name in two shards": (stored_twice, rf"{NORM} is stored twice: in .*model-0000\d.* and in .*model-0000\d"),
    "shard above the folder": (
        placed("../secret.safetensors"),
        r"names the file '\.\./secret\.safetensors', .* outside",
    ),
    "shard above, hidden": (placed("a/../../b.safetensors"), r"'a/\.\./\.\./b\.safetensors', which is outside"),
    "absolute shard": (placed("/etc/secret.safetensors"), r"'/etc/secret\.safetensors', which is outside"),
    "shard on a drive": (placed("C:secret.safetensors"), r"'C:secret\.safetensors', which is outside"),
    "shard with backslashes": (placed("..\\secret.safetensors"), r"secret\.safetensors', which is outside"),
    "shard with NUL": (placed("a\0.safetensors"), r"which is not the name of a safetensors file"),
    "shard that is a number": (placed(7), r"in 7, which is not the name"),
    "shard that is a pickle": (placed("pytorch_model.bin"), r"'pytorch_model\.bin', which is not the name"),
    "link out of the folder": (linked_out, rf"{SECOND} is a link to .*elsewhere\.safetensors, which is outside"),
}

MISSING_FILES: dict[str, tuple[Damage, str]] = {
    "no config.json": (lambda folder, make: (folder / "config.json").unlink(), r"config\.json does not exist"),
    "no weights": (lambda folder, make: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS} and no {INDEX}"),
    "pickles only": (only("pytorch_model.bin"), r"It holds pytorch_model\.bin, .* not safetensors files: pickles"),
    "Meta's own files only": (only("consolidated.00.pth"), r"It holds consolidated\.00\.pth, .*\n.*save_pretrained"),
    "GGUF only": (only("model-Q4_K_M.gguf"), r"It holds model-Q4_K_M\.gguf"),
}


@pytest.mark.parametrize(("damage", "message"), IN_SEVERAL_FILES.values(), ids=IN_SEVERAL_FILES.keys())
def test_files_that_do_not_go_together_are_refused(make, sharded, damage, message):
    kind = FileNotFoundError if "are missing" in message else ValueError
    make.refuses(sharded, kind, damage, message)


def test_shards_without_an_index_are_not_guessed_at(make, sharded):
    make.refuses(sharded, FileNotFoundError, lambda folder, make: (folder / INDEX).unlink(), r"the index .* is missing")


@pytest.mark.parametrize(("damage", "message"), MISSING_FILES.values(), ids=MISSING_FILES.keys())
def test_missing_files_are_named(make, checkpoint, damage, message):
    make.refuses(checkpoint, FileNotFoundError, damage, message)
