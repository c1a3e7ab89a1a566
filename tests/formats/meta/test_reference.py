"""Meta's own code reads the checkpoints that the tests write, joins their ranks, and computes what llama4lab does."""

import importlib
import json
import sys
import warnings
from types import ModuleType

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint.meta.files import MetaFiles

REASON = "needs the extra `reference`"
parallel = pytest.importorskip("fairscale.nn.model_parallel.initialize", reason=REASON, exc_type=ImportError)
args = pytest.importorskip("llama_models.llama4.args", reason=REASON, exc_type=ImportError)
resharding = pytest.importorskip("llama_models.checkpoint", reason=REASON, exc_type=ImportError)
meta = pytest.importorskip("llama_models.llama4.model", reason=REASON, exc_type=ImportError)
datatypes = pytest.importorskip("llama_models.llama4.datatypes", reason=REASON, exc_type=ImportError)

CONFIGS = [
    {"attn_temperature_tuning": False},
    {"attn_temperature_tuning": True, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1},
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of this process alone; `.cuda()` is the identity."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
        yield
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def of_meta(one_process):
    """Gives Meta's model of a folder, its ranks joined by Meta's code."""

    def make(folder, experts: int):
        settings = args.ModelArgs(**json.loads((folder / "params.json").read_text()), max_seq_len=64)
        model = meta.Transformer(settings).to(torch.float32).eval()
        paths = sorted(folder.glob("*.pth"))
        with warnings.catch_warnings(action="ignore"):  # of functions of torch that Meta's code uses
            state = resharding.maybe_reshard_state_dict(paths, settings.n_kv_heads, experts)
            torch.set_default_tensor_type(torch.FloatTensor)
        found = model.load_state_dict(state, strict=False)
        assert not found.missing_keys
        assert not found.unexpected_keys
        return model

    return make


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_text_logits_equal_those_of_meta(write, small_text_model, of_meta, changes, ranks, random_ids):
    folder = write(small_text_model(num_key_value_heads=4, **changes), ranks, notes=False)
    ours, theirs = lab.load(folder), of_meta(folder, 4)
    for length in (1, 9, 40):
        ids = random_ids(2, length, seed=length)
        expected = theirs(datatypes.TransformerInput(tokens=ids, tokens_position=0)).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_vision_tower_equals_that_of_meta(write, small_model, of_meta, ranks):
    folder = write(small_model(num_key_value_heads=4), ranks, notes=False)
    ours, theirs = lab.load(folder), of_meta(folder, 4)
    pixels = torch.randn(3, 3, 24, 24)
    encoder, adapter = theirs.vision_embeddings.vision_encoder, theirs.vision_embeddings.vision_adapter
    expected = theirs.vision_projection(adapter(encoder.float()(pixels.unsqueeze(1).unsqueeze(1))))
    projected = ours.get_submodule("multi_modal_projector")(ours.get_submodule("vision_model")(pixels))
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_meta_itself_saves_is_read(write, small_model, of_meta, tmp_path, image_batch):
    """Under the names of its modules, which are others than those of the published files."""
    model = small_model(num_key_value_heads=4)
    folder = write(model, 1, notes=False)
    theirs = of_meta(folder, 4)
    (tmp_path / "params.json").write_text((folder / "params.json").read_text())
    torch.save(theirs.float().state_dict(), tmp_path / "consolidated.00.pth")
    assert "layers.1.feed_forward.experts.w1" in theirs.state_dict()
    batch = image_batch([[2], [1]])
    loaded = lab.load(tmp_path)
    # Meta makes its vision tower bfloat16 whatever it is given.
    assert loaded(batch["input_ids"] % 120).logits.equal(model(batch["input_ids"] % 120).logits)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0.2)


def test_int4_is_packed_as_by_meta(write, wide_model, experts_of, monkeypatch):
    for name in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # for GPUs only; what is used here does without
    packing = importlib.import_module("llama_models.quantize_impls")
    model = wide_model()
    files = MetaFiles(write(model, 1, "int4"))
    for layer, expert in ((1, 2), (3, 0)):
        codes, scale = packing.int4_row_quantize(experts_of(model, layer).down_proj[expert].T)
        name = f"model.layers.{layer}.feed_forward.experts.{expert}.down_proj"
        assert files.read(f"{name}.weight").equal(packing.pack_int4(codes).view(torch.uint8))
        assert files.read(f"{name}.weight_scale").equal(scale.T)
