"""Plans of checkpoints of the published sizes, and of the tiny one, which is then loaded as planned."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4Config, Llama4TextConfig
from typer.testing import CliRunner

import llama4lab as lab
from llama4lab.cli import app
from llama4lab.model.expert_bank import ExpertBank, Held
from llama4lab.model.packed_linear import PackedLinear
from llama4lab.tables.planning import memory_plan

RATES = {"disk": "7GB/s", "cpu": "25GB/s"}
TEXT: dict[str, Any] = {"hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "head_dim": 128}
TEXT |= {"num_local_experts": 16, "interleave_moe_layer_step": 1, "num_key_value_heads": 8, "vocab_size": 202048}
TEXT |= {"intermediate_size": 8192, "intermediate_size_mlp": 16384}
VISION: dict[str, Any] = {"hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16, "patch_size": 14}
VISION |= {"intermediate_size": 5632, "image_size": 336, "projector_input_dim": 4096, "projector_output_dim": 4096}
VISION |= {"vision_output_dim": 4096}
# Billions of parameters and GB in bfloat16; then, in seconds, a token and a prefill that uses every expert, from a disk
# of 7 GB/s and over links of 25 and of 50 GB/s.
SCOUT = {"vision": (0.851, 1.70), "projector": (0.021, 0.04), "embeddings": (1.034, 2.07), "lm_head": (1.034, 2.07),
         "attention": (3.020, 6.04), "shared expert": (6.040, 12.08), "routed experts": (96.637, 193.27)}  # fmt: skip
MAVERICK = SCOUT | {"shared expert": (3.020, 6.04), "dense MLP": (6.040, 12.08), "routed experts": (386.547, 773.09)}
TIMES = {
    ("scout", None): ((1.73, 0.48, 0.24), (27.6, 7.7, 3.9)),
    ("scout", "fp8"): ((0.86, 0.24, 0.12), (13.8, 3.9, 1.9)),
    ("scout", "int4"): ((0.44, 0.125, 0.062), (7.1, 2.0, 1.0)),
    ("maverick", None): ((0.86, 0.24, 0.12), (110, 31, 15.5)),
    ("maverick", "fp8"): ((0.43, 0.12, 0.06), (55, 15.5, 7.7)),
    ("maverick", "int4"): ((0.22, 0.062, 0.031), (28.5, 8.0, 4.0)),
}


def published(name: str) -> Llama4Config:
    changes = {} if name == "scout" else {"num_local_experts": 128, "interleave_moe_layer_step": 2}
    return Llama4Config(text_config=TEXT | changes, vision_config=VISION)


def published_text(name: str) -> Llama4TextConfig:
    config = published(name).text_config
    assert isinstance(config, Llama4TextConfig)
    return config


def as_printed(value: float, wanted: float | int) -> float:
    """Rounded to as many digits as are printed."""
    text = str(wanted)
    return round(value, len(text.partition(".")[2]) if "." in text else 0)


def nbytes(model) -> int:
    sources = [module.source for module in model.modules() if isinstance(module, PackedLinear)]
    banks = [getattr(module, name, None) for module in model.modules() for name in ("gate_up_proj", "down_proj")]
    sources += [bank.source for bank in banks if isinstance(bank, ExpertBank)]
    packed = sum(each.nbytes for source in sources if isinstance(source, Held) for each in source.matrices)
    return packed + sum(each.nbytes for each in model.parameters())


def column(plan: lab.MemoryPlan, name: str) -> dict[str, int]:
    """A column of its table, by component."""
    return dict(zip(plan.table["component"].tolist(), plan.table[name].tolist(), strict=True))


@pytest.mark.parametrize(("name", "wanted", "total"), [("scout", SCOUT, 108.64), ("maverick", MAVERICK, 401.58)])
def test_parts_of_the_published_sizes(name, wanted, total):
    plan = memory_plan(published(name), memory={"cpu": "1TB"}, bandwidths=RATES)
    parameters, in_memory = column(plan, "parameters"), column(plan, "bytes_in_memory")
    for part, (billions, gigabytes) in wanted.items():
        assert round(parameters[part] / 1e9, 3) == billions
        assert round(in_memory[part] / 1e9, 2) == gigabytes
    assert parameters["routed experts"] == (48 * 16 if name == "scout" else 24 * 128) * 3 * 5120 * 8192
    assert round(sum(parameters.values()) / 1e9, 2) == total
    assert sum(column(plan, "bytes_stored").values()) == 2 * sum(parameters.values())


@pytest.mark.parametrize(("name", "quantize"), TIMES)
def test_times_of_the_published_sizes(name, quantize):
    decode, prefill = TIMES[name, quantize]
    # Everything in RAM, nothing kept on the GPU: all that is used goes over the link. A disk is like a link of 7.
    memory = {"cuda:0": "30GiB", "cpu": "2TB"}
    plan = memory_plan(published_text(name), memory=memory, quantize=quantize, bandwidths=RATES)
    plan.placement.places[0].slots = 0
    assert plan.time(1).from_disk == 0
    experts = [size for size in plan.placement.model.sizes if size.experts]
    assert plan.expert_nbytes == sum(size.one_kept for size in experts[:2])
    for number, rate in enumerate((7e9, 25e9, 50e9)):
        other = replace(plan, bandwidths={"disk": 1e9, "cpu": rate})
        assert as_printed(other.time(1).seconds_cpu, decode[number]) == decode[number]
        assert as_printed(other.time(100_000).seconds_cpu, prefill[number]) == prefill[number]


def test_scout_in_four_bits_fits_on_one_gpu():
    plan = memory_plan(published("scout"), memory={"cuda:0": "80GiB"}, quantize="int4", bandwidths=RATES, context=8192)
    assert plan.experts == "resident"
    assert round(sum(column(plan, "bytes_in_memory").values()) / 1e9, 1) == 64.9
    assert round(plan.expert_nbytes / 1e6, 1) == 64.9
    rooms = {room.what: room.nbytes for room in plan.placement.places[0].rooms}
    assert rooms["KV cache"] == 8192 * 196_608
    assert plan.options == {"device_map": "cuda:0", "dtype": "bfloat16", "experts": "resident", "quantize": "int4"}
    assert set(plan.times["bytes_from_disk"].tolist()) == {0.0}


def test_a_checkpoint_with_layers_of_the_size_of_scout_is_planned_from_its_header(tmp_path):
    """The file is sparse: tens of gigabytes that take no room on the disk."""
    settings: dict[str, Any] = TEXT | {"num_hidden_layers": 6}
    config = Llama4TextConfig(**settings)
    config.save_pretrained(tmp_path)
    memory = {"cuda:0": "20GiB", "cpu": "16GiB"}
    bare = memory_plan(tmp_path, memory=memory, bandwidths=RATES)
    header, end = {}, 0
    for size, shape in zip(bare.placement.model.sizes, _shapes(config), strict=True):
        start, end = end, end + 2 * size.parameters
        header[size.name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "model.safetensors", 8 + len(text) + end)
    plan = memory_plan(tmp_path, memory=memory, bandwidths=RATES)
    assert plan.table.equals(bare.table)
    assert plan.devices.equals(bare.devices)
    assert plan.options == bare.options
    assert plan.options["memory"]["cpu"] == 16 * 2**30, "with what is being read"


def _shapes(config) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(each.shape) for each in lab.HookedLlama4ForCausalLM(config).parameters()]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int4"}, {"quantize": "fp8"}])
def test_tiny_is_loaded_as_planned(options):
    plan = memory_plan("tiny", memory={"cpu": "1GB"}, bandwidths=RATES, **options)
    model = lab.load("tiny", **plan.options)
    assert nbytes(model) == sum(column(plan, "bytes_in_memory").values()) == plan.placement.places[0].weights
    assert model.store is None
    loaded = {name: parameter.numel() for name, parameter in lab.load("tiny").named_parameters()}
    assert sum(column(plan, "parameters").values()) == sum(loaded.values())


@torch.no_grad()
@pytest.mark.parametrize("share", [0.2, 0.6, 1.2])
def test_tiny_with_its_experts_on_disk_is_loaded_as_planned(share):
    whole = memory_plan("tiny", memory={"cpu": "1GB"}, bandwidths=RATES, context=64)
    experts = column(whole, "bytes_stored")["routed experts"]
    (place,) = whole.placement.places
    always, working = place.weights - 2 * experts, place.working
    memory = {"cpu": always + working + 600_000 + int(share * experts)}
    plan = memory_plan("tiny", memory=memory, bandwidths=RATES, context=64)
    assert plan.experts == "offload"
    model = lab.load("tiny", **plan.options)
    (place,) = plan.placement.places
    assert nbytes(model) == place.weights == always
    assert model.store is not None
    assert model.store.tiers[torch.device("cpu")].budget == place.store
    assert place.slots == min(place.kept * 32 // experts, 32)
    inputs = model.prompt("The cat sat on the mat, and the dog sat on the rug.").inputs()
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, lab.load("tiny")(**inputs).logits, rtol=0, atol=1e-4)
    assert model.store.tiers[torch.device("cpu")].nbytes <= place.store
    read, tokens = model.store.traffic.bytes_read, inputs["input_ids"].shape[1]
    most = plan.time(tokens, first=True)
    assert read <= plan.time(100_000, first=True).from_disk
    assert read == pytest.approx(most.from_disk, rel=0.5), "as uniform routing has it, or less"
    model.store.reset()
    model(**inputs)
    if share > 1:
        assert model.store.traffic.bytes_read == plan.time(tokens).from_disk == 0


def test_layers_on_disk_are_loaded_as_planned():
    plan = memory_plan("tiny", memory={"cpu": "3.4MB"}, bandwidths=RATES, context=8)
    assert "disk" in plan.options["device_map"].values()
    model = lab.load("tiny", **plan.options)
    assert nbytes(model) == plan.placement.places[0].weights
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, lab.load("tiny")(ids).logits, rtol=0, atol=1e-4)
    assert plan.time(1).from_disk > plan.time(1).experts


def test_bandwidths_are_measured_where_they_are_not_given():
    plan = memory_plan("tiny", memory={"cpu": "1GB"}, bandwidths={"cpu": 1e10})
    assert plan.measured == {"disk"}
    assert plan.bandwidths["disk"] > 1e6
    assert "measured here" in str(memory_plan("tiny", memory={"cpu": "15MB"}, context=64))


def test_a_config_alone_leaves_the_disk_unmeasured():
    plan = memory_plan(published_text("scout"), memory={"cpu": "64GiB"})
    assert plan.bandwidths["disk"] != plan.bandwidths["disk"]
    assert all(seconds != seconds for seconds in plan.times["seconds"].tolist())
    assert "an unknown rate" in str(plan)


def test_the_text_and_the_page_tell_the_same():
    plan = memory_plan(published("scout"), memory={"cuda:0": "40GiB", "cpu": "64GiB"}, bandwidths=RATES)
    text, page = str(plan), plan._repr_html_()
    for number in ("193.27 GB", "251.66 MB", "196,608 bytes each", "7.00 GB/s", "25.00 GB/s"):
        assert number in text
        assert number in page
    assert "Routing is taken to be uniform" in text
    assert "experts='offload'" in text
    assert page.count("<table>") == text.count("\n\ndevice") + text.count("\n\ncomponent") + text.count("\n\ntokens")
    assert max(map(len, text.splitlines()[:-1])) <= 120
    assert "<script" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": {"gpu": "1GB"}}, "not a device"),
        ({"memory": {"cpu": "1 heap"}}, "not a size"),
        ({"bandwidths": {"ssd": 1}}, "Sources are"),
        ({"quantize": "int3"}, "not a method"),
        ({"dtype": "int8"}, "not one a model can compute in"),
        ({"context": 0}, "number of tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        memory_plan("tiny", **options)


def test_too_little_memory_says_what_is_needed_and_what_would_work():
    with pytest.raises(MemoryError) as error:
        memory_plan("tiny", memory={"cpu": "30MB"})
    (found,) = re.findall(r"([\d.]+) MB would hold the model", str(error.value))
    (choice, *_) = re.findall(r"dtype='bfloat16'|context=\d+", str(error.value))
    key, _, value = choice.partition("=")
    works: dict[str, Any] = {key: value.strip("'") if key == "dtype" else int(value)}
    assert memory_plan("tiny", memory={"cpu": "30MB"}, bandwidths=RATES, **works).experts
    enough = memory_plan("tiny", memory={"cpu": f"{float(found) + 0.01}MB"}, bandwidths=RATES)
    assert not enough.placement.case.disk
    with pytest.raises(MemoryError, match="More memory is needed"):
        memory_plan("tiny", memory={"cpu": "10kB"})


def test_info_shows_the_plan():
    found = CliRunner().invoke(app, ["info", "tiny", "--memory", "cuda:0=1GiB", "--memory", "cpu=2GiB",
                                     "--bandwidth", "disk=1GB/s", "--quantize", "int4"])  # fmt: skip
    assert found.exit_code == 0
    assert "routed experts" in found.output
    assert "device_map='cuda:0'" in found.output
    assert "1.07 GB" in found.output
    small = CliRunner().invoke(app, ["info", "tiny", "--memory", "cpu=10kB"])
    assert small.exit_code == 1
    assert "No plan" in small.output
    assert "layers:" in small.output, "the summary is there all the same"
    assert CliRunner().invoke(app, ["info", "tiny", "--memory", "80GiB"]).exit_code == 2


def test_info_of_a_config_alone_shows_the_plan(tmp_path: Path):
    published("scout").save_pretrained(tmp_path)
    found = CliRunner().invoke(app, ["info", str(tmp_path), "--memory", "cpu=1TB"])
    assert found.exit_code == 0
    assert "193.27 GB" in found.output
    assert "108,641,793,536" in found.output
