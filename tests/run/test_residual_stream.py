import pytest
import torch

import llama4lab as lab
from llama4lab.run.residual_stream import RESIDUAL, kind_of, place_of, recorded_residuals


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(scope="module")
def run(model, random_ids):
    return lab.record(model, random_ids(1, 5), at=[*RESIDUAL, "layers.*.self_attn.out"])


def test_one_place_has_the_same_vectors_whatever_it_is_called(run):
    seen: dict[str, torch.Tensor] = {}
    for name in run:
        if kind_of(name) not in (None, "final_norm"):
            place = place_of(name, 5)
            assert torch.equal(seen.setdefault(place, run[name]), run[name])
    # The embeddings, the middle and the end of each layer; the last end is the end of the model.
    assert len(seen) == 1 + 5 + 5
    assert "final_norm" in seen


def test_all_hook_points_of_the_residual_stream_are_found_in_order(model, run):
    names = recorded_residuals(model, run)
    assert names[:5] == ["embed", "embed_merged", "layers.0.resid_pre", "layers.0.resid_mid", "layers.0.resid_post"]
    assert names[-1] == "final_norm"
    assert len(names) == 3 + 3 * 5
    assert recorded_residuals(model, run, "layers.[13].resid_mid") == ["layers.1.resid_mid", "layers.3.resid_mid"]


def test_what_cannot_be_read_is_refused(model, run, random_ids):
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.out is not in the residual stream"):
        recorded_residuals(model, run, "layers.*.self_attn.out")
    bare = lab.record(model, random_ids(1, 5), at="layers.2.resid_mid")
    with pytest.raises(KeyError, match=r"Record it with at='layers.\*.resid_post'"):
        recorded_residuals(model, bare, ["layers.2.resid_mid", "layers.*.resid_post"])
    with pytest.raises(KeyError, match="no hook point of the residual stream"):
        recorded_residuals(model, lab.record(model, random_ids(1, 5)))
    with pytest.raises(ValueError, match="matches none"):
        recorded_residuals(model, run, "layers.*.resid_end")
