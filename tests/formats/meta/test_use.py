"""What a researcher does with a checkpoint in Meta's format: watch, patch, sweep, save, and leave experts on disk."""

import pytest
import torch
from safetensors.torch import save_file

import llama4lab as lab
from llama4lab.checkpoint.meta.files import MetaFiles
from llama4lab.checkpoint.opening import files_of, settings_of
from llama4lab.checkpoint.shards import Shards
from llama4lab.model.expert_bank import ExpertBank


@pytest.fixture
def pair(write, small_model):
    """A checkpoint with experts in every other layer, two for each token, and the model that it is of."""
    model = small_model(num_experts_per_tok=2)
    return write(model, 2), model


@torch.no_grad()
def test_every_hook_point_sees_what_it_sees_in_the_model(pair, image_batch):
    folder, model = pair
    loaded, batch = lab.load(folder), image_batch([[2], [1]])
    kinds = [["image" if i == 127 else "text" if i else "pad" for i in row] for row in batch["input_ids"].tolist()]
    tokens = [[f"<{i}>" for i in row] for row in batch["input_ids"].tolist()]
    prompt = lab.Prompt(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], tokens, kinds)
    names = list(model.hook_points())
    assert list(loaded.hook_points()) == names
    ours, theirs = (lab.record(each, prompt, at=names) for each in (loaded, model))
    assert list(ours.names) == list(theirs.names) == names
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6, msg=name)


@torch.no_grad()
def test_patching_changes_what_it_changes_in_the_model(pair, random_ids):
    folder, model = pair
    ids = random_ids(2, 9)
    for name in ("layers.1.feed_forward.experts.hidden", "layers.3.self_attn.pattern", "layers.2.resid_mid"):
        value = lab.record(model, random_ids(2, 9, seed=1), at=name)[name]
        found = []
        for each in (lab.load(folder), lab.load(folder, experts="offload"), model):
            with lab.patched(each, {name: value}):
                found.append(lab.record(each, ids).logits)
        torch.testing.assert_close(found[0], found[2], rtol=0, atol=2e-6)
        torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-5)
        assert not torch.allclose(found[2], model(ids).logits, atol=1e-3)


def test_gradients_and_sweeps_are_those_of_the_model(pair, random_ids):
    folder, model = pair
    metric, at = lab.metrics.logit_diff(5, 7), "layers.*.resid_pre"
    clean, corrupted = random_ids(1, 8), random_ids(1, 8, seed=1)
    found = []
    for each in (lab.load(folder, experts="offload", memory={"cpu": "50KB"}), model):
        over = ["layer", "position"]
        sweep = lab.sweep(each, clean, corrupted, at=at, over=over, metric=metric, progress=False)
        estimate = lab.attribute(each, clean, corrupted, at=at, metric=metric)
        found.append((sweep.tensor("effect"), next(iter(estimate.tensors.values()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_offloaded_experts_only_those_that_are_used_are_read(
    write, small_text_model, experts_of, dtype, random_ids, monkeypatch
):
    model = small_text_model(dtype=dtype, num_local_experts=8, use_qk_norm=False)
    loaded = lab.load(write(model, 2), experts="offload", dtype="auto")
    read: list[int] = []
    plain = MetaFiles.read

    def counted(files, name, index=None):
        if ".experts." in name:  # the checks of types in the tests look at other tensors
            read.append(files.nbytes(name, index))
        return plain(files, name, index)

    monkeypatch.setattr(MetaFiles, "read", counted)
    run = lab.record(loaded, random_ids(1, 3), at="layers.*.feed_forward.router.indices")
    used = sum(len(chosen.unique()) for chosen in run.layers("feed_forward.router.indices").values())
    assert sum(read) == used * 3 * 64 * 88 * dtype.itemsize
    assert loaded.store is not None
    assert loaded.store.traffic.bytes_read == sum(read)
    assert isinstance(experts_of(loaded, 1).down_proj, ExpertBank)
    assert run.logits.equal(lab.record(loaded, random_ids(1, 3)).logits)
    torch.testing.assert_close(
        run.logits, model(random_ids(1, 3)).logits, rtol=0, atol=1e-5 if dtype.itemsize == 4 else 0.1
    )


@torch.no_grad()
def test_it_can_be_quantized_on_the_way_and_saved_again(pair, tmp_path, random_ids):
    folder, model = pair
    ids = random_ids(2, 9)
    lab.load(folder).save_pretrained(tmp_path / "plain")
    assert lab.load(tmp_path / "plain")(ids).logits.equal(model(ids).logits)
    rounded = lab.load(folder, quantize="int8")(ids).logits
    assert 0 < (rounded - model(ids).logits).abs().max() < 0.2


@torch.no_grad()
def test_slices_are_read_by_their_number(pair):
    folder, _ = pair
    files = MetaFiles(folder)
    for end in ("router.weight", "experts.2.down_proj.weight", "experts.2.gate_proj.weight"):
        name = f"model.layers.1.feed_forward.{end}"
        for index in (0, 3):
            assert files.read(name, index).equal(files[name][index])
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert files.read(name, 40).equal(files[name][40])
        assert files.nbytes(name, 40) == files[name][40].nbytes
        with pytest.raises(IndexError, match="slice 5000"):
            files.read(name, 5000)
    with pytest.raises(KeyError, match=r"near misses: model\.layers\.1\.self_attn\.o_proj\.weight"):
        files["model.layers.1.self_attn.o_prj.weight"]


def test_the_config_is_that_of_the_model(pair):
    folder, model = pair
    found, wanted = settings_of(folder), model.config
    for part, keys in (
        (
            "text_config",
            ("hidden_size", "intermediate_size", "intermediate_size_mlp", "num_local_experts", "moe_layers"),
        ),
        ("text_config", ("no_rope_layers", "layer_types", "attention_chunk_size", "num_experts_per_tok", "head_dim")),
        ("vision_config", ("hidden_size", "intermediate_size", "image_size", "patch_size", "pixel_shuffle_ratio")),
    ):
        for key in keys:
            assert getattr(getattr(found, part), key) == getattr(getattr(wanted, part), key), key


def test_safetensors_beside_it_come_first(pair, tmp_path):
    folder, model = pair
    model.save_pretrained(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert isinstance(files_of(tmp_path), Shards)
    assert isinstance(files_of(folder), MetaFiles)
    (tmp_path / "model.safetensors").unlink()
    assert isinstance(files_of(tmp_path), MetaFiles)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        lab.load(tmp_path)


def test_images_are_prepared_as_metas_code_does(pair):
    folder, model = pair
    processor = lab.load(folder).prompter.image_processor
    assert processor.normalize == "meta"
    assert processor.size["height"] == model.config.vision_config.image_size
