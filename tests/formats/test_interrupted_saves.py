"""Saving that is interrupted, and saving over older files: a folder never loads as something else than was saved."""

import os
import subprocess
import sys

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint import written_shards


@pytest.fixture
def folder(new_text_model, tmp_path):
    """A checkpoint of numbers in several files."""
    new_text_model(dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path / "older", max_shard_size="100KB")
    return tmp_path / "older"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def state_of(folder):
    return lab.load(folder, dtype="auto").state_dict()


@pytest.fixture
def models(new_text_model, tmp_path):
    """One model in each way to hold its weights."""
    new_text_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    ways = {"numbers": {}, "rounded": {"quantize": "int8"}, "offloaded": {"experts": "offload"}}
    return {name: lab.load(tmp_path / "source", **options) for name, options in ways.items()}


@pytest.mark.parametrize("way", ["rounded", "offloaded"])
def test_an_interruption_while_files_are_written_leaves_the_folder_as_it_was(folder, models, way, monkeypatch):
    before, count, write = contents(folder), [], written_shards._bytes

    def interrupted(tensor):
        count.append(tensor)
        if len(count) == 20:
            raise KeyboardInterrupt
        return write(tensor)

    monkeypatch.setattr(written_shards, "_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models[way].save_pretrained(folder, max_shard_size="50KB")
    assert contents(folder) == before


@pytest.mark.parametrize("way", ["numbers", "rounded", "offloaded"])
@pytest.mark.parametrize("at", [0, 2])
def test_an_interruption_while_files_move_leaves_what_does_not_load(folder, models, way, at, monkeypatch):
    count, move = [], os.replace

    def interrupted(source, target):
        if ".saving-" in str(source):
            count.append(source)
            if len(count) == at + 1:
                raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models[way].save_pretrained(folder, max_shard_size="100KB")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        lab.load(folder)
    models[way].save_pretrained(folder)
    state = state_of(folder)
    assert all(
        torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in models[way].state_dict().items()
    )


@pytest.mark.parametrize("way", ["numbers", "rounded"])
@torch.no_grad()
def test_a_model_in_memory_can_be_saved_over_the_files_it_came_from(models, way, random_ids):
    model, ids = models[way], random_ids(1, 12)
    before = model(ids).logits
    for _ in range(2):
        model.save_pretrained(model.folder)
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(lab.load(model.folder)(ids).logits, before)


def test_files_that_a_model_reads_from_are_not_written_over(models):
    model = models["offloaded"]
    before = contents(model.folder)
    with pytest.raises(ValueError, match="reads weights from there whenever it uses them"):
        model.save_pretrained(model.folder)
    assert contents(model.folder) == before


def test_a_model_whose_files_have_become_others_is_refused(saved_as, new_text_model, tmp_path):
    saved = lab.load(saved_as("int4 with zero points"))
    saved.save_pretrained(tmp_path / "moved")
    model = lab.load(tmp_path / "moved")
    lab.load().save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match="holds other weights by now"):
        model.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "moved").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="its settings are needed"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


def test_other_files_in_the_folder_stay(folder, models):
    (folder / "tokenizer.json").write_text("{}")
    models["rounded"].save_pretrained(folder)
    names = {file.name for file in folder.iterdir()}
    assert names == {"tokenizer.json", "config.json", "generation_config.json", "model.safetensors"}


def test_a_file_is_no_folder(models, tmp_path):
    (tmp_path / "file").write_text("")
    for model in models.values():
        with pytest.raises(NotADirectoryError, match="is a file"):
            model.save_pretrained(tmp_path / "file")


MEASURE = """
import resource, sys
import llama4lab as lab

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source, target = sys.argv[1:]
for method in (None, "int8"):
    model = lab.load(source, dtype="bfloat16", experts="offload", memory={"cpu": 0}, quantize=method)
    start = peak()
    model.save_pretrained(f"{target}/{method}")
    print(peak() - start)
"""


def test_saving_an_offloaded_model_takes_the_memory_of_a_few_experts(tmp_path, new_text_model):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 32, "num_hidden_layers": 2}
    model = new_text_model(dtype=torch.bfloat16, interleave_moe_layer_step=1, **sizes)
    model.save_pretrained(tmp_path / "model")
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    experts = 2 * 32 * 3 * 256 * 512 * 2
    assert max(map(int, done.stdout.split())) < experts / 3
    for method in ("None", "int8"):
        assert (tmp_path / method / "model.safetensors").stat().st_size > experts / 2
