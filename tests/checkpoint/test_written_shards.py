"""Files written piece by piece: the safetensors library reads them, and would have written the same bytes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4lab.checkpoint.written_shards import Entry, write_shards

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8]


@pytest.fixture
def tensors():
    """Tensors of many dtypes and shapes, a single number and an empty one among them."""
    shapes = [(3, 5), (7,), (), (2, 3, 4), (0, 4), (1, 1), (9, 2)]
    made = {
        f"t.{n}.weight": torch.randn(shape).mul(50).to(d)
        for n, (d, shape) in enumerate(zip(DTYPES, shapes, strict=True))
    }
    return made | {"words": torch.arange(6).reshape(2, 3).to(torch.uint32), '\u00e9"\\': torch.ones(2)}


def test_one_file_has_the_bytes_that_the_library_writes(tensors, tmp_path):
    write_shards(tmp_path, {name: Entry.of(tensor) for name, tensor in tensors.items()}, 10**9, 0)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_several_files_hold_everything_once(tensors, tmp_path):
    write_shards(tmp_path, {name: Entry.of(tensor) for name, tensor in tensors.items()}, 60, 7)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        own = load_file(tmp_path / file)
        assert not own.keys() & found.keys()
        found |= own
        assert sum(tensor.nbytes for tensor in own.values()) <= 60 or len(own) == 1
    assert found.keys() == tensors.keys() == index["weight_map"].keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tolist() == tensor.tolist()
    assert index["metadata"] == {"total_parameters": 7, "total_size": sum(t.nbytes for t in tensors.values())}


def test_pieces_are_asked_for_only_when_they_are_written(tmp_path):
    asked = []

    def pieces():
        for row in range(3):
            asked.append(row)
            yield torch.full((4,), float(row))

    entry = Entry(torch.float32, (3, 4), pieces)
    assert not asked
    write_shards(tmp_path, {"rows": entry}, 10**9, 12)
    assert asked == [0, 1, 2]
    assert load_file(tmp_path / "model.safetensors")["rows"][:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "match"), [(torch.ones(2), "it is 8"), (torch.ones(3, dtype=torch.float16), "its values are")]
)
def test_pieces_that_are_not_what_was_said_are_an_error(given, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        write_shards(tmp_path, {"t": Entry(torch.float32, (3,), lambda: [given])}, 10**9, 3)
