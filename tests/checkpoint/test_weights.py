import pytest
import torch

from llama4lab.checkpoint.layouts import Layout
from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.weights import Weights

PREFIX = "language_model."


def with_prefix(tensors):
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors):
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def unchanged(tensors):
    return tensors


@pytest.mark.parametrize(
    ("kind", "rename"),
    [("text", unchanged), ("text", with_prefix), ("text and vision", unchanged), ("text and vision", without_prefix)],
)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_gives_the_same_tensors(tmp_path, make, text_only, multimodal, kind, rename, fused, shards):
    config = text_only if kind == "text" else multimodal
    tensors = make.tensors(config)
    on_disk = rename(tensors if fused else make.unfused(tensors))
    read = make.opened(make.saved(tmp_path / "layout", config, on_disk, shards=shards))
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name


def test_a_single_expert_is_read_from_either_layout(tmp_path, make, text_only):
    text_only.num_local_experts = 1
    tensors = make.tensors(text_only)
    for name, on_disk in {"fused": tensors, "unfused": make.unfused(tensors)}.items():
        read = make.opened(make.saved(tmp_path / name, text_only, on_disk))
        assert all(torch.equal(read[tensor], tensors[tensor]) for tensor in tensors)


def test_experts_of_equal_width_in_and_out_are_not_turned_by_mistake(tmp_path, make, text_only):
    text_only.intermediate_size = text_only.hidden_size  # every projection is square: the shapes cannot tell
    tensors = make.tensors(text_only)
    read = make.opened(make.saved(tmp_path / "square", text_only, make.unfused(tensors)))
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_checkpoint_without_experts_is_read(tmp_path, make, text_only):
    text_only.moe_layers = []
    tensors = make.tensors(text_only)
    assert not any("experts" in name for name in tensors)
    assert set(make.opened(make.saved(tmp_path / "dense", text_only, tensors))) == set(tensors)


def test_the_layout_says_itself_in_words(make, text_only, multimodal):
    assert str(Layout.of(make.tensors(multimodal))) == "text and vision, fused experts"
    assert str(Layout.of(make.unfused(make.tensors(text_only)))) == "text only, unfused experts"


def test_tensors_are_read_in_the_order_of_the_files(tmp_path, make, text_only):
    folder = make.saved(tmp_path / "order", text_only, make.unfused(make.tensors(text_only)), shards=3)
    shards = Shards(folder)
    weights = Weights(shards, make.shapes(text_only))
    files = [shards.file(next(iter(weights.layout.stored(name, (3, 1, 2))))) for name in weights.in_file_order()]
    assert files == sorted(files)
    assert len(set(files)) == 3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_tensor_comes_in_the_dtype_that_was_asked_for(tmp_path, make, text_only, dtype, fused):
    tensors = make.tensors(text_only)
    folder = make.saved(tmp_path / "dtype", text_only, tensors if fused else make.unfused(tensors))
    weights = Weights(Shards(folder), make.shapes(text_only))
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name, dtype=dtype), tensor.to(dtype)), name


def test_values_too_large_for_the_asked_dtype_are_an_error_and_not_infinite(tmp_path, make, text_only):
    tensors = make.tensors(text_only)
    tensors["model.norm.weight"][3] = 1e20
    weights = Weights(Shards(make.saved(tmp_path / "large", text_only, tensors)), make.shapes(text_only))
    assert weights.read("model.norm.weight", dtype=torch.float32)[3] > 1e19
    with pytest.raises(
        ValueError, match=r"model\.safetensors: model\.norm\.weight holds values too large for .*float16"
    ):
        weights.read("model.norm.weight", dtype=torch.float16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_a_value_that_is_not_finite_is_an_error_that_names_file_and_tensor(
    tmp_path, make, text_only, value, fused, dtype
):
    tensors = make.tensors(text_only)
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    tensors[name][1, 2, -1] = value
    folder = make.saved(tmp_path / "nan", text_only, tensors if fused else make.unfused(tensors))
    weights = Weights(Shards(folder), make.shapes(text_only))
    on_disk = name if fused else "experts.1.up_proj.weight"
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{on_disk} holds 1 values that are NaN or infinite"):
        weights.read(name, dtype=dtype)


def test_a_tied_tensor_may_be_stored_or_not(tmp_path, make, text_only):
    tensors = make.tensors(text_only)
    shapes = make.shapes(text_only)
    shapes.pop("lm_head.weight")
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    stored = Weights(Shards(make.saved(tmp_path / "stored", text_only, tensors)), shapes, tied)
    assert "lm_head.weight" in stored.in_file_order()
    tensors.pop("lm_head.weight")
    absent = Weights(Shards(make.saved(tmp_path / "absent", text_only, tensors)), shapes, tied)
    assert "lm_head.weight" not in absent.in_file_order()


def test_bytes_are_counted_by_dtype_with_the_commonest_first(tmp_path, make, text_only):
    tensors = make.tensors(text_only)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    weights = Weights(Shards(make.saved(tmp_path / "mixed", text_only, tensors)), make.shapes(text_only))
    total = sum(tensor.numel() for tensor in tensors.values())
    assert weights.dtypes() == {torch.bfloat16: 2 * (total - 16), torch.float32: 4 * 16}
    assert list(weights.dtypes()) == [torch.bfloat16, torch.float32]
