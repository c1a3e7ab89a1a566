import pytest
import torch

import llama4lab as lab
from llama4lab.run.steering_vectors import SteeringVector, steering_vector
from llama4lab.tiny.domains.translation import translation

pytestmark = pytest.mark.usefixtures("no_hooks_left")
AT = "layers.3.resid_post"
WARM = ["I think the film is wonderful", "The food was great"]
COLD = ["I think the film is terrible", "The food was awful"]


def alone(model, texts: list[str], position: int) -> torch.Tensor:
    """The values of each text, run by itself."""
    return torch.stack([lab.record(model, text, at=AT)[AT][0, position] for text in texts])


def test_a_vector_is_the_difference_of_the_means_at_the_last_token(tiny):
    vector = steering_vector(tiny, WARM, COLD, at=AT)
    expected = alone(tiny, WARM, -1).mean(0) - alone(tiny, COLD, -1).mean(0)
    torch.testing.assert_close(vector[AT], expected, atol=1e-5, rtol=1e-4)


def test_another_position_counts_from_the_end_of_padded_rows(tiny):
    vector = steering_vector(tiny, WARM, COLD, at=AT, position=-2)
    expected = alone(tiny, WARM, -2).mean(0) - alone(tiny, COLD, -2).mean(0)
    torch.testing.assert_close(vector[AT], expected, atol=1e-5, rtol=1e-4)


def test_a_function_chooses_the_token_of_each_row(tiny):
    def noun(prompt):
        return [prompt.tokens[row].index(word) for row, word in enumerate([" film", " food"])]

    vector = steering_vector(tiny, WARM, COLD, at=AT, position=noun)
    both = [[lab.record(tiny, t, at=AT)[AT][0, p] for t, p in zip(ts, (4, 2), strict=True)] for ts in (WARM, COLD)]
    expected = torch.stack(both[0]).mean(0) - torch.stack(both[1]).mean(0)
    torch.testing.assert_close(vector[AT], expected, atol=1e-5, rtol=1e-4)


def test_the_mean_over_all_tokens_leaves_padding_out_and_counts_every_prompt_the_same(tiny):
    vector = steering_vector(tiny, WARM, COLD, at=AT, position=None)
    means = [[lab.record(tiny, text, at=AT)[AT][0].mean(0) for text in texts] for texts in (WARM, COLD)]
    expected = torch.stack(means[0]).mean(0) - torch.stack(means[1]).mean(0)
    torch.testing.assert_close(vector[AT], expected, atol=1e-5, rtol=1e-4)


def test_pairs_give_the_same_vector_and_how_far_they_agree(tiny):
    plain, pairs = (
        steering_vector(tiny, WARM, COLD, at="layers.*.resid_post", pairs=paired) for paired in (False, True)
    )
    for name in plain:
        torch.testing.assert_close(pairs[name], plain[name])
    differences = alone(tiny, WARM, -1) - alone(tiny, COLD, -1)
    cosines = [torch.cosine_similarity(d, pairs[AT], dim=0).item() for d in differences]
    assert pairs.facts["agreement"][AT] == pytest.approx(sum(cosines) / 2, abs=1e-5)


def test_many_prompts_run_a_few_at_a_time_and_recorded_runs_do_as_well(tiny):
    many = [f"The capital of {name} is" for name in ("France", "Spain", "Italy", "Peru", "Chile")] * 5
    cold = COLD + WARM
    vector = steering_vector(tiny, many, cold, at=AT)
    recorded = steering_vector(tiny, lab.record(tiny, many, at=AT), [tiny.prompt(text) for text in cold], at=AT)
    assert (vector.facts["positive"], vector.facts["negative"]) == (25, 4)
    torch.testing.assert_close(vector[AT], recorded[AT], atol=1e-4, rtol=1e-4)


def test_heads_have_a_vector_each(tiny):
    name = "layers.2.self_attn.z"
    assert steering_vector(tiny, WARM, COLD, at=name)[name].shape == (4, 32)


def test_scaling_and_turning_a_vector(tiny):
    vector = steering_vector(tiny, WARM, COLD, at="layers.[23].resid_post")
    assert list(vector) == ["layers.2.resid_post", AT]
    assert torch.equal((2 * vector)[AT], 2 * vector[AT])
    assert torch.equal((-vector)[AT], -vector[AT])
    assert vector.norms[AT] == pytest.approx(vector[AT].norm().item())
    assert list(vector.unit().norms.values()) == pytest.approx([1, 1])
    assert "layers.3.resid_post [128], norm" in repr(vector)
    with pytest.raises(ValueError, match="no direction"):
        (vector * 0).unit()


def test_a_vector_is_the_same_after_saving_and_loading(tiny, tmp_path):
    vector = steering_vector(tiny, WARM, COLD, at="layers.*.resid_post", pairs=True)
    vector.save(tmp_path / "warm.safetensors")
    loaded = SteeringVector.load(tmp_path / "warm.safetensors")
    assert list(loaded) == list(vector)
    assert loaded.facts == vector.facts
    assert all(torch.equal(loaded[name], vector[name]) for name in vector)
    assert [path.name for path in tmp_path.iterdir()] == ["warm.safetensors"]


def test_a_file_that_is_no_vector_is_refused(tiny, tmp_path):
    lab.record(tiny, "The").save(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match=r"not a steering vector: its metadata says 'llama4lab\.run/1'"):
        SteeringVector.load(tmp_path / "run.safetensors")
    (tmp_path / "text.safetensors").write_text("none")
    with pytest.raises(ValueError, match="no complete safetensors file"):
        SteeringVector.load(tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ((WARM, COLD), {"at": "layers.3.self_attn.pattern"}, ValueError, "added to the values of a token"),
        ((WARM, COLD), {"at": "layers.3.feed_forward.router.indices"}, ValueError, "added to the values of a token"),
        ((WARM, COLD[:1]), {"at": AT, "pairs": True}, ValueError, "there are 2 and 1"),
        ((WARM, COLD), {"at": AT, "position": 0}, IndexError, "Position 0 was asked for; row 1"),
        ((WARM, COLD), {"at": AT, "position": -9}, IndexError, "Position -9 was asked for; row 0"),
        ((WARM, COLD), {"at": AT, "position": lambda prompt: [1]}, ValueError, "1 positions for 2 rows"),
        ((WARM, []), {"at": AT}, ValueError, "there are none"),
    ],
)
def test_what_cannot_be_a_vector_is_refused(tiny, given, options, error, message):
    with pytest.raises(error, match=message):
        steering_vector(tiny, *given, **options)


def test_a_run_without_the_hook_point_is_refused_with_how_to_record_it(tiny):
    with pytest.raises(
        ValueError, match=r"(?s)run of the examples has embed\.\nRecord it with at='layers.3.resid_post'"
    ):
        steering_vector(tiny, lab.record(tiny, WARM, at="embed"), COLD, at=AT)


def test_a_vector_needs_finite_numbers():
    with pytest.raises(ValueError, match="finite numbers; it has embed"):
        SteeringVector({"embed": torch.tensor([1.0, torch.inf])})
    with pytest.raises(ValueError, match="no hook point"):
        SteeringVector({})


def test_a_generated_run_gives_its_last_token_that_was_read(tiny):
    run = lab.generate(tiny, "The capital of France is", max_new_tokens=3, at=AT)
    vector = steering_vector(tiny, run, "The", at=AT)
    torch.testing.assert_close(vector[AT] + lab.record(tiny, "The", at=AT)[AT][0, -1], run[AT][0, -1])


def test_documents_of_translations_are_told_apart_by_the_target_language(tiny):
    """What the vector from French to Spanish of some numbers does to others is tested in test_steering.py."""
    texts = {to: [translation("English", to, n, 2).plain for n in range(8)] for to in ("French", "Spanish")}
    vector = steering_vector(tiny, texts["Spanish"], texts["French"], at="layers.2.resid_post", position=-4, pairs=True)
    assert vector.facts["agreement"]["layers.2.resid_post"] > 0.9
