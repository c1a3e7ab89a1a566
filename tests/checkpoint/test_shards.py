import json
import os

import pytest
import torch
from safetensors.torch import load_file

from llama4lab.checkpoint.shards import Shards


def test_one_file_and_several_files_give_the_tensors_that_safetensors_gives(checkpoint, sharded):
    expected = load_file(checkpoint / "model.safetensors")
    for folder in (checkpoint, sharded):
        shards = Shards(folder)
        assert set(shards) == set(expected)
        assert all(torch.equal(shards[name], expected[name]) for name in expected)
        assert all(shards.spec(name).shape == tuple(expected[name].shape) for name in expected)


def test_a_tensor_takes_its_own_bytes_of_memory_and_no_more(checkpoint):
    shards = Shards(checkpoint)
    for name in shards:
        assert shards[name].untyped_storage().nbytes() == shards.spec(name).nbytes


def test_writing_into_a_tensor_leaves_the_file_as_it_was(checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    shards = Shards(checkpoint)
    tensor = shards["lm_head.weight"]
    tensor.zero_()
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert shards["lm_head.weight"].abs().sum() > 0


def test_reading_twice_gives_equal_tensors_that_do_not_share_memory(checkpoint):
    shards = Shards(checkpoint)
    one, other = shards["model.norm.weight"], shards["model.norm.weight"]
    one.zero_()
    assert other.abs().sum() > 0


def test_a_tensor_outlives_the_file_it_came_from(checkpoint):
    tensor = Shards(checkpoint)["model.norm.weight"]
    expected = tensor.clone()
    os.unlink(checkpoint / "model.safetensors")
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64]
)
def test_every_dtype_comes_back_as_it_was_stored(tmp_path, make, text_only, dtype):
    values = torch.arange(6).reshape(2, 3).to(dtype)
    shards = Shards(make.saved(tmp_path / "dtypes", text_only, {"values": values}))
    assert shards["values"].dtype == dtype
    assert torch.equal(shards["values"], values)


def test_a_tensor_that_is_not_aligned_in_the_file_reads_right(tmp_path, make):
    values = torch.tensor([1.5, -2.5])
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "values": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    (tmp_path / "model.safetensors").write_bytes(make.file_bytes(header, b"\7" + values.numpy().tobytes()))
    shards = Shards(tmp_path)
    assert torch.equal(shards["values"], values)
    assert shards["byte"].item() == 7


def test_scalars_and_empty_tensors_keep_their_shapes(tmp_path, make, text_only):
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    shards = Shards(make.saved(tmp_path / "shapes", text_only, tensors))
    assert shards["scalar"].shape == ()
    assert shards["scalar"] == 3.0
    assert shards["empty"].shape == (0, 4)


def test_a_name_that_is_not_there_is_answered_with_near_misses(checkpoint):
    with pytest.raises(KeyError, match=r"model\.norm\.wieght.*near misses: model\.norm\.weight"):
        Shards(checkpoint)["model.norm.wieght"]


def test_links_of_a_hub_cache_are_followed(sharded, tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--owner--name" / "blobs"
    shared = tmp_path / "blobs" / "fe"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        blob = blobs / str(number)
        if number % 2:
            file.rename(shared / str(number))  # the store that all repositories of a cache share
            blob.symlink_to(f"../../blobs/fe/{number}")
        else:
            file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert "model.norm.weight" in Shards(snapshot)


def test_links_inside_the_folder_are_followed(sharded):
    (sharded / "weights").mkdir()
    for file in sorted(sharded.glob("*.safetensors")):
        file.rename(sharded / "weights" / file.name)
        file.symlink_to(sharded / "weights" / file.name)
    assert "model.norm.weight" in Shards(sharded)


def test_shards_in_a_folder_below_are_read(sharded):
    index = sharded / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    (sharded / "weights").mkdir()
    for file in sorted(sharded.glob("*.safetensors")):
        file.rename(sharded / "weights" / file.name)
    document["weight_map"] = {name: f"weights/{shard}" for name, shard in document["weight_map"].items()}
    index.write_text(json.dumps(document))
    assert "model.norm.weight" in Shards(sharded)


def test_an_index_beside_a_single_file_may_name_that_file_only(checkpoint):
    """MLX writes one beside every file."""
    names = dict.fromkeys(Shards(checkpoint), "model.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert set(Shards(checkpoint)) == set(names)
    index.write_text(json.dumps({"weight_map": names | {"lm_head.weight": "other.safetensors"}}))
    with pytest.raises(ValueError, match="holds both"):
        Shards(checkpoint)
    index.write_text(json.dumps({"weight_map": names | {"other": "model.safetensors"}}))
    with pytest.raises(ValueError, match=r"places other in model\.safetensors, which does not hold it"):
        Shards(checkpoint)
