import json
import os
from math import prod

from llama4lab.checkpoint.settings import read_config
from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.summary import Summary, summarize
from llama4lab.checkpoint.weights import Weights


def summarized(make, folder) -> Summary:
    config = read_config(folder)
    return summarize(config, Weights(Shards(folder), make.shapes(config)))


def test_components_add_up_to_the_whole_checkpoint(tmp_path, make, multimodal):
    tensors = make.tensors(multimodal)
    summary = summarized(make, make.saved(tmp_path / "whole", multimodal, tensors))
    assert sum(summary.parameters.values()) == sum(tensor.numel() for tensor in tensors.values())
    assert summary.nbytes == {part: 2 * count for part, count in summary.parameters.items()}
    assert "other" not in summary.parameters


def test_components_are_counted_by_hand(tmp_path, make, text_only):
    summary = summarized(make, make.saved(tmp_path / "text", text_only, make.tensors(text_only)))
    assert summary.parameters == {
        "embeddings": 24 * 16,
        "lm_head": 24 * 16,
        "attention": 4 * (2 * 24 * 16 + 2 * 12 * 16),
        "router": 2 * 3 * 16,
        "shared expert": 2 * 3 * 12 * 16,
        "routed experts": 2 * 3 * 3 * 12 * 16,
        "dense MLP": 2 * 3 * 20 * 16,
        "norms": 9 * 16,
    }
    assert summary.layers == ["RoPE, dense", "RoPE, MoE", "RoPE, dense", "NoPE, MoE"]
    assert summary.dtypes == {"bfloat16": len(make.shapes(text_only))}


def test_fused_and_unfused_layouts_have_the_same_components(tmp_path, make, multimodal):
    tensors = make.tensors(multimodal)
    fused = summarized(make, make.saved(tmp_path / "fused", multimodal, tensors))
    unfused = summarized(make, make.saved(tmp_path / "unfused", multimodal, make.unfused(tensors), shards=2))
    assert fused.parameters == unfused.parameters
    assert (fused.files, unfused.files) == (1, 2)


def test_the_summary_reads_as_a_table(tmp_path, make, multimodal):
    text = str(summarized(make, make.saved(tmp_path / "table", multimodal, make.tensors(multimodal), shards=2)))
    assert "text and vision, fused experts, in 2 files" in text
    assert "layers: 2 x RoPE, dense, 1 x RoPE, MoE, 1 x NoPE, MoE" in text
    assert text.splitlines()[-1].startswith("total")


def test_a_checkpoint_of_the_size_of_scout_is_summarized_from_its_header(tmp_path, make, multimodal):
    """The file is sparse: two hundred gigabytes that take no room on the disk."""
    text = {
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "vocab_size": 202048,
    }
    vision = {
        "hidden_size": 1408,
        "num_hidden_layers": 34,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 4096,
        "image_size": 336,
        "patch_size": 14,
    }
    scout = type(multimodal)(text_config=text, vision_config=vision)
    scout.save_pretrained(tmp_path)
    header, end = {}, 0
    for name, shape in make.shapes(scout).items():
        start = end
        end += 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text_header = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(make.file_bytes(text_header))
    os.truncate(file, 8 + len(text_header) + end)
    summary = summarized(make, tmp_path)
    assert 108.6e9 < sum(summary.parameters.values()) < 108.7e9
    assert summary.parameters["routed experts"] == 48 * 16 * 3 * 5120 * 8192
    assert summary.parameters["embeddings"] == summary.parameters["lm_head"] == 202048 * 5120
    assert summary.layers[2:4] == ["RoPE, MoE", "NoPE, MoE"]
    assert 217e9 < sum(summary.nbytes.values()) < 218e9
