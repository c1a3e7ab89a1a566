"""The distance of a model from a reference, and what a verification says."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import math

import pytest
import torch
import torch.nn.functional as F

import llama4lab as lab
from llama4lab.tables.verification.spot_checks import chosen
from llama4lab.tables.verifying import verify

OPTIONS = {"num_experts_per_tok": 2, "num_local_experts": 6, "interleave_moe_layer_step": 2}


@pytest.fixture
def pair(new_text_model, tmp_path):
    """A text model without a tokenizer and one like it whose weights are a little off, both from disk."""

    def make(new_model=new_text_model, noise=0.02, **changes):
        model = new_model(**(OPTIONS | changes))
        model.save_pretrained(tmp_path / "reference")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vision" not in name:
                    parameter += noise * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "model")
        return lab.load(tmp_path / "model"), lab.load(tmp_path / "reference")

    return make


@pytest.fixture
def padded(random_ids):
    """Two rows of ids, of 21 and 13 tokens."""
    return [random_ids(21).tolist(), random_ids(13, seed=1).tolist()]


@torch.no_grad()
def test_parity_is_what_two_passes_give_row_by_row(pair, padded):
    model, reference = pair()
    table = verify(model, reference=reference, prompt=padded, matrices=0).parity
    assert table is not None
    apart, divergences, same = {}, [], []
    for row in padded:
        ours, theirs = (lab.record(each, [row], at="layers.*.resid_post") for each in (model, reference))
        for name in ours:
            relative = (ours[name] - theirs[name]).norm(dim=-1) / theirs[name].norm(dim=-1)
            apart.setdefault(name, []).append(relative[0])
        logs = [run.logits[0].double().log_softmax(-1) for run in (ours, theirs)]
        divergences.append(F.kl_div(logs[0], logs[1], log_target=True, reduction="none").sum(-1))
        same.append(logs[0].argmax(-1) == logs[1].argmax(-1))
    for line in table.iloc[:-1].to_dict("records"):
        wanted = torch.cat(apart[line["at"]])
        assert line["relative_error"] == pytest.approx(wanted.mean().item(), rel=1e-4)
        assert line["largest_relative_error"] == pytest.approx(wanted.max().item(), rel=1e-4)
        assert math.isnan(line["kl_mean"])
    logits, kl = table.iloc[-1], torch.cat(divergences)
    assert logits["at"] == "logits"
    assert logits["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert logits["kl_max"] == pytest.approx(kl.max().item(), rel=1e-4)
    assert logits["top1_agreement"] == pytest.approx(torch.cat(same).double().mean().item())
    assert table["layer"].dropna().tolist() == list(range(5))


@torch.no_grad()
def test_flips_are_tokens_with_other_experts(pair, padded):
    model, reference = pair(noise=0.08)
    found = verify(model, reference=reference, prompt=padded, matrices=0)
    assert found.routing is not None
    assert found.drift is not None
    assert found.tokens == 34
    for line in found.routing.to_dict("records"):
        name, moved, shared, margins = f"layers.{line['layer']}.feed_forward.router", [], [], []
        for row in padded:
            ours, theirs = (lab.record(each, [row], at=f"{name}.*") for each in (model, reference))
            for own, other, logits in zip(
                ours[f"{name}.indices"][0], theirs[f"{name}.indices"][0], theirs[f"{name}.logits"][0], strict=True
            ):
                shared.append(len({*own.tolist()} & {*other.tolist()}) / 2)
                moved.append(shared[-1] < 1)
                ranked = logits.sort(descending=True).values
                margins.append((ranked[1] - ranked[2]).item())
        assert line["tokens"] == len(moved)
        assert line["flips"] == sum(moved) > 0
        assert line["agreement"] == pytest.approx(sum(shared) / len(shared))
        assert line["largest_flip"] == pytest.approx(max(m for m, flip in zip(margins, moved, strict=True) if flip))
        assert line["margin"] == pytest.approx(sorted(margins)[16] / 2 + sorted(margins)[17] / 2)
        bins = found.drift[found.drift["layer"] == line["layer"]]
        assert bins["tokens"].sum() == line["tokens"]
        assert (bins["agreement"] * bins["tokens"]).sum() == pytest.approx(line["agreement"] * line["tokens"])
    assert f"{found.routing['flips'].sum()} of {found.routing['tokens'].sum()} choices differ" in str(found)


def test_a_model_is_no_distance_from_itself(pair, new_model):
    model, _ = pair(new_model)
    found = verify(model, reference=model.folder, matrices=3)
    assert found.parity is not None
    assert found.routing is not None
    assert found.ok
    assert (found.parity[["relative_error", "max_abs_difference"]] == 0).all(axis=None)
    assert found.parity.iloc[-1]["top1_agreement"] == 1
    assert (found.routing["agreement"] == 1).all()
    assert found.routing["largest_flip"].isna().all()
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_pictures_can_be_compared(new_model, pair, image_batch):
    model, reference = pair(new_model)
    batch = image_batch([[1]])
    prompt = lab.Prompt(
        batch["input_ids"],
        batch["attention_mask"],
        batch["pixel_values"],
        *([[kind] * batch["input_ids"].shape[1]] for kind in ("x", "text")),
    )
    with_picture = verify(model, reference=reference, prompt=prompt, matrices=0)
    assert with_picture.parity is not None
    assert 0 < with_picture.parity.iloc[-1]["relative_error"] < 1
    assert with_picture.tokens == batch["attention_mask"].sum()


def test_rounding_to_fewer_bits_is_further_from_the_tiny_model():
    reference, errors = lab.load(), []
    for method in ("int8", "int4"):
        found = verify(lab.load(quantize=method), reference=reference, matrices=4)
        assert found.ok
        assert found.parity is not None
        errors.append(found.parity.iloc[-1]["kl_mean"])
    assert 0 < errors[0] < errors[1] / 5


def test_a_model_without_routers_has_no_routing(pair):
    model, reference = pair(moe_layers=[])
    found = verify(model, reference=reference)
    assert found.routing is None
    assert found.drift is None
    assert found.parity is not None
    assert "routing" not in str(found)


def test_text_and_page_say_what_was_found(pair):
    model, reference = pair()
    with torch.no_grad():
        model.text.norm.weight[0] = 3
    found = verify(model, reference=reference)
    text, html = str(found), found._repr_html_()
    assert repr(found) == text
    for part in ("NOT in order", "1 DIFFERENT", "model.norm.weight", "against the reference", "routing"):
        assert part in text
        assert part in html
    assert html.count("<table") == 3
    assert "<script" not in html


def test_matrices_are_mostly_those_of_experts_and_others_by_another_seed():
    shapes = {"a.experts.gate_up_proj": (8, 4, 6), "b.router.weight": (8, 4), "c.norm.weight": (4,)}
    shapes |= {f"{letter}.weight": (4, 4) for letter in "defgh"}
    shapes = {name.replace("a.", "layers.0.feed_forward."): shape for name, shape in shapes.items()}
    draws = [chosen(shapes, 4, seed) for seed in range(8)]
    for drawn in draws:
        assert len(drawn) == 2 + 4
        assert sum(choice.expert is not None for choice in drawn) == 3
        assert [choice.name for choice in drawn if choice.name[0] in "bc"] == ["b.router.weight", "c.norm.weight"]
    assert len({tuple(drawn) for drawn in draws}) > 4
    assert chosen(shapes, 4, 3) == draws[3]
    assert len(chosen(shapes, None, 0)) == len(chosen(shapes, 100, 0)) == 8 + 2 + 5
    assert len(chosen(shapes, 12, 0)) == 2 + 12
    assert len(chosen({"d.weight": (4, 4), "e.weight": (4, 4)}, 1, 0)) == 1


def test_what_cannot_be_verified_is_refused(pair, new_text_model, tmp_path):
    with pytest.raises(ValueError, match="was not loaded from a checkpoint"):
        verify(new_text_model())
    model, _ = pair()
    with pytest.raises(ValueError, match="matrices=-1 were to be checked"):
        verify(model, matrices=-1)
    new_text_model(num_local_experts=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="The model has num_experts 6, the reference 4: it is another one"):
        verify(model, reference=tmp_path / "other")
    model.text.layers[0].feed_forward = torch.nn.Identity()
    with pytest.raises(ValueError, match="the model does not: its modules were exchanged"):
        verify(model, matrices=None)
