import accelerate
import pytest
import torch

import llama4lab as lab
from llama4lab.run import lens_training
from llama4lab.run.tuned_lens import TunedLens
from llama4lab.run.unembedding import Unembedding
from llama4lab.tiny.domains.catalogue import examples

EARLY = ["layers.0.resid_post", "layers.2.resid_mid", "layers.3.resid_post"]


def texts(split: str, count: int) -> list[str]:
    return [each.text + each.answer for each in examples("facts", count, seed=1, split=split)]


@pytest.fixture(scope="module")
def lens(tiny):
    return TunedLens.fit(tiny, texts("train", 80), at=[*EARLY, "layers.7.resid_post"], steps=80, progress=False)


@pytest.fixture(scope="module")
def held_out(tiny):
    return lab.record(tiny, texts("test", 16), at=["layers.*.resid_*", "final_norm"])


@torch.no_grad()
def divergence(model, run, name, lens=None) -> float:
    """The mean over all tokens, by torch's own function."""
    mask = run.prompt.attention_mask.bool()
    x = run[name][mask] if lens is None else lens.translated(name, run[name][mask])
    log_prob = Unembedding(model).logits(x).log_softmax(-1)
    target = run.logits[mask].log_softmax(-1)
    return torch.nn.functional.kl_div(log_prob, target, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("name", EARLY)
def test_on_held_out_text_a_fitted_lens_is_nearer_to_the_model(tiny, lens, held_out, name):
    assert divergence(tiny, held_out, name, lens) < 0.6 * divergence(tiny, held_out, name)


def test_at_the_end_of_the_model_a_lens_is_the_identity(lens, held_out):
    for name in ("layers.7.resid_post", "final_norm"):
        assert name in lens
        assert lens.translated(name, held_out[name]) is held_out[name]
    assert "layers.7.resid_post" not in lens.matrices


def test_a_lens_tells_how_far_it_was_from_the_model_before_and_after(tiny, lens):
    run = lab.record(tiny, texts("train", 80), at=EARLY)
    for name in EARLY:  # all tokens of the examples are judged, for they are few
        assert lens.facts["tokens"] < 1024
        assert lens.facts["before"][name] == pytest.approx(divergence(tiny, run, name), rel=1e-4)
        assert lens.facts["after"][name] == pytest.approx(divergence(tiny, run, name, lens), rel=1e-4)
    assert "layers.2.resid_mid" in repr(lens)


def test_before_its_first_step_a_translator_is_the_identity():
    x = torch.randn(5, 8)
    assert torch.equal(lens_training.Translator(x, torch.device("cpu"))(x), x)


def test_where_one_layer_ends_the_next_begins(lens, held_out):
    x = held_out["layers.0.resid_post"]
    assert torch.equal(lens.translated("layers.1.resid_pre", x), lens.translated("layers.0.resid_post", x))
    expected = x + x @ lens.matrices["layers.0.resid_post"] + lens.shifts["layers.0.resid_post"]
    assert torch.allclose(lens.translated("layers.0.resid_post", x), expected, atol=1e-6)


def test_fitting_leaves_the_model_as_it_was_and_is_repeatable(tiny, no_hooks_left):
    tiny.zero_grad()  # the model is shared with tests that differentiate
    before = {name: parameter.clone() for name, parameter in tiny.named_parameters()}
    torch.manual_seed(1)
    fits = []
    for _ in range(2):
        fits.append(TunedLens.fit(tiny, texts("train", 8), at=EARLY[0], steps=3, seed=4, progress=False))
        torch.rand(3)
    assert torch.equal(fits[0].matrices[EARLY[0]], fits[1].matrices[EARLY[0]])
    for name, parameter in tiny.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_another_seed_chooses_other_tokens(tiny):
    one, other = (
        TunedLens.fit(tiny, texts("train", 40), at=EARLY[0], steps=2, seed=seed, progress=False) for seed in (0, 1)
    )
    assert not torch.equal(one.matrices[EARLY[0]], other.matrices[EARLY[0]])


@pytest.mark.parametrize("nbytes", [1, 4 * 128 * 200, 4 * 128 * 10**6])
def test_the_size_of_a_chunk_changes_nothing(new_text_model, random_ids, monkeypatch, nbytes):
    model = new_text_model()
    prompt = random_ids(3, 9)
    whole = TunedLens.fit(model, prompt, steps=4, progress=False)
    monkeypatch.setattr("llama4lab.run.unembedding.CHUNK_NBYTES", nbytes)
    parts = TunedLens.fit(model, prompt, steps=4, progress=False)
    assert list(whole.matrices) == list(parts.matrices)
    for place, matrix in whole.matrices.items():
        assert torch.allclose(matrix, parts.matrices[place], atol=1e-4)


def test_padding_is_no_example(new_text_model):
    model = new_text_model()
    padded = model.prompt([[5, 6, 7, 8], [9, 10]])
    lens = TunedLens.fit(model, padded, steps=2, progress=False)
    assert lens.facts["tokens"] == 6


def test_an_offloaded_model_is_fitted_the_same(new_text_model, random_ids):
    models = new_text_model(), new_text_model()
    accelerate.cpu_offload(models[1], execution_device=torch.device("cpu"))
    lenses = [TunedLens.fit(model, random_ids(2, 9), steps=3, progress=False) for model in models]
    for place, matrix in lenses[0].matrices.items():
        assert torch.equal(matrix, lenses[1].matrices[place])


def test_a_half_precision_model_has_a_lens_in_float32(new_text_model, random_ids):
    model = new_text_model(dtype=torch.bfloat16)
    lens = TunedLens.fit(model, random_ids(4, 9), steps=20, progress=False)
    place = "layers.0.resid_post"
    assert lens.matrices[place].dtype == torch.float32
    assert lens.facts["after"][place] < lens.facts["before"][place]


def test_a_lens_comes_back_from_its_file(lens, held_out, tmp_path):
    lens.save(tmp_path / "lens.safetensors")
    back = TunedLens.load(tmp_path / "lens.safetensors")
    assert back.facts == lens.facts
    for name in EARLY:
        assert torch.equal(back.translated(name, held_out[name]), lens.translated(name, held_out[name]))
    assert [path.name for path in tmp_path.iterdir()] == ["lens.safetensors"]


def test_other_files_are_refused(held_out, tmp_path):
    held_out.save(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match=r"not a tuned lens.*llama4lab\.run"):
        TunedLens.load(tmp_path / "run.safetensors")
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no complete safetensors file"):
        TunedLens.load(tmp_path / "broken")


def test_what_a_lens_cannot_read_is_refused(tiny, lens):
    with pytest.raises(KeyError, match=r"not fitted at 'layers.5.resid_mid'"):
        lens.translated("layers.5.resid_mid", torch.zeros(1, 128))
    with pytest.raises(ValueError, match=r"128 numbers.* have 64"):
        lens.translated("layers.0.resid_post", torch.zeros(1, 64))
    with pytest.raises(ValueError, match="not in the residual stream"):
        TunedLens.fit(tiny, "Mary", at="layers.*.self_attn.out")
    with pytest.raises(ValueError, match="only the end of the model"):
        TunedLens.fit(tiny, "Mary", at="final_norm")
    with pytest.raises(ValueError, match="steps=0"):
        TunedLens.fit(tiny, "Mary", steps=0)
    with pytest.raises(ValueError, match="learning_rate=-1"):
        TunedLens.fit(tiny, "Mary", learning_rate=-1.0)


def test_vectors_that_do_not_fit_into_memory_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(lens_training, "free_nbytes", lambda _: 1000)
    with pytest.raises(MemoryError, match="fewer prompts"):
        TunedLens.fit(tiny, "Mary and John", steps=1, progress=False)
