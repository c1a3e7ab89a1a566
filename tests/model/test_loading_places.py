"""In which dtype, on which device and from which place a checkpoint is loaded, and how much memory that takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig

from llama4lab.model.loading import load

CPU = torch.device("cpu")


@pytest.fixture
def saved_text(tmp_path, new_text_model):
    """A text-only checkpoint in bfloat16, in several files."""
    new_text_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "text", max_shard_size="100KB")
    return tmp_path / "text"


@pytest.fixture
def saved(tmp_path, new_model):
    """A checkpoint with vision in bfloat16, in one file."""
    new_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "full")
    return tmp_path / "full"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.bfloat16),
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_the_dtype_is_the_one_asked_for(saved, dtype, expected):
    model = load(saved, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == model.config.get_text_config().dtype == expected


def test_weights_stored_in_two_dtypes_load_in_the_one_config_json_names(saved_text):
    shard = sorted(saved_text.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, shard)
    assert load(saved_text, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", torch.int8, torch.float8_e4m3fn, "bf16", "float8"])
def test_a_dtype_no_model_computes_in_is_an_error(saved, dtype):
    with pytest.raises(ValueError, match=r"choose from auto, float32, bfloat16"):
        load(saved, dtype=dtype)


@pytest.mark.parametrize("device_map", [None, "cpu", CPU, {"": "cpu"}, {"language_model": "cpu", "": CPU}])
def test_a_model_can_be_placed_on_the_cpu_in_every_spelling(saved, device_map):
    model = load(saved, device_map=device_map)
    assert {parameter.device for parameter in model.parameters()} == {CPU}
    assert model.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes the GPU")
def test_auto_is_the_cpu_where_there_is_no_gpu(saved):
    assert load(saved, device_map="auto").device == CPU


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("cuda:99", r"'cuda:99' was asked for; torch finds \d+ CUDA devices"),
        (99, r"'99' was asked for|is not a device|cannot hold a model"),
        ("gpu", r"'gpu' is not a device; write \"cpu\""),
        ("meta", r"'meta' cannot hold a model"),
        ({"language_model": "cpu"}, r"places no part of the model that holds vision_model\."),
        ({"": "cpu", "langage_model": "cpu"}, r"names 'langage_model', which holds no weight; near: language_model"),
    ],
)
def test_a_device_map_that_cannot_be_is_an_error(saved, device_map, message):
    with pytest.raises(ValueError, match=message):
        load(saved, device_map=device_map)


@torch.no_grad()
def test_a_hub_id_loads_from_the_cache_without_network(saved, tmp_path, monkeypatch, random_ids):
    repository = tmp_path / "hub" / "models--owner--llama"
    snapshot = repository / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    expected = load(saved)(random_ids(1, 9)).logits
    saved.rename(repository / "blobs")
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load("owner/llama@main")
    assert model.folder == snapshot
    assert model.config._name_or_path == "owner/llama@main"
    assert torch.equal(model(random_ids(1, 9)).logits, expected)
    with pytest.raises(FileNotFoundError, match="owner/other is neither a folder here nor complete"):
        load("owner/other")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@torch.no_grad()
@pytest.mark.parametrize(
    "device_map",
    ["cuda", "auto", 0, {"": 0, "language_model.model.layers.1": "cpu"}],
    ids=["cuda", "auto", "0", "mixed"],
)
def test_a_model_on_the_gpu_computes_what_the_cpu_computes(saved, device_map, random_ids):
    model = load(saved, device_map=device_map, dtype="float32")
    ids = random_ids(2, 20)
    torch.testing.assert_close(model(ids.cuda()).logits.cpu(), load(saved)(ids).logits, rtol=1e-3, atol=1e-3)
    assert load(saved, device_map="cuda").dtype == torch.bfloat16


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A text-only checkpoint of 300 MB in bfloat16, in four files; its largest tensor has 17 MB."""
    folder = tmp_path_factory.mktemp("large")
    config = Llama4TextConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=512,
        intermediate_size_mlp=1024,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=16,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llama4ForCausalLM(config).state_dict().items()}
    weight_map: dict[str, str] = {}
    for shard in range(4):
        names = list(shapes)[shard::4]
        save_file({name: torch.full(shapes[name], 0.01).bfloat16() for name in names}, folder / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


MEASURE = """
import re, sys
from pathlib import Path
from llama4lab.model.loading import load

def megabytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

load(sys.argv[2])  # a small one first, so that nothing is measured but the loading
resident, private = megabytes("VmRSS"), megabytes("RssAnon")
for dtype in "bfloat16", "float32":  # the larger one last, since the peak never falls
    model = load(sys.argv[1], dtype=dtype)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    print(size, megabytes("VmHWM") - resident, megabytes("RssAnon") - private)
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading_takes_the_model_and_little_more(large, saved_text):
    command = [sys.executable, "-c", MEASURE, str(large), str(saved_text)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stored, converted = ([float(number) for number in line.split()] for line in output.splitlines())
    file = sum(shard.stat().st_size for shard in large.glob("*.safetensors")) / 1e6
    assert 250 < file < 350
    for (size, peak, _), times in ((stored, 1), (converted, 2)):
        assert size == pytest.approx(times * file, rel=0.01)
        assert peak < size + 60  # the largest tensor, as stored and as converted, and some room
    assert stored[2] < 30  # nothing was copied: the weights are pages of the files
