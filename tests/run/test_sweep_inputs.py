"""Sweeps over images, unlike prompts, small memories, interruptions and bad input."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image, ImageDraw

import llama4lab as lab
from llama4lab.prompt.joining import joined
from llama4lab.run.metrics import evaluated

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
METRIC = lab.metrics.logit_diff(" Mary", " John")


def drawn(color: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (48, 48), (20, 20, 20))
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=color)
    return image


def question(tiny, *pictures) -> lab.Prompt:
    content = [{"type": "image", "image": picture} for picture in pictures]
    message = {"role": "user", "content": [*content, {"type": "text", "text": "What color is the circle?"}]}
    return tiny.prompt([message], add_generation_prompt=True)


@pytest.fixture(scope="module")
def pictures(tiny) -> tuple[lab.Prompt, lab.Prompt]:
    """Two rows: a question on one picture, and one on two, of which the first is the same in both prompts."""
    red, blue, green = (225, 40, 40), (50, 90, 235), (60, 190, 80)
    clean = [question(tiny, drawn(red)), question(tiny, drawn(green), drawn(red))]
    corrupted = [question(tiny, drawn(blue)), question(tiny, drawn(green), drawn(blue))]
    return joined(clean), joined(corrupted)


VISION = {
    "patches": ("vision_model.layers.*.resid_post", {"layer": None, "patch": [0, 21, 63]}),
    "patches of tiles": ("vision_model.layers.*.resid_pre", {"layer": None, "tile": None, "patch": [3, 40]}),
    "heads": ("vision_model.layers.*.self_attn.z", ["layer", "head"]),
    "patterns": ("vision_model.layers.*.self_attn.pattern", {"layer": None, "head": None, "patch": [3, 64]}),
    "neurons": ("vision_model.layers.*.mlp.hidden", {"layer": None, "neuron": [0, 17, (5, 200)]}),
    "the way to the text": (
        [
            *("vision_model.patch_embed", "vision_model.embed", "vision_model.final_norm", "vision_model.shuffled"),
            *("vision_model.adapter", "image_features", "embed", "embed_merged"),
        ],
        ["hook_point"],
    ),
    "image tokens": (["vision_model.shuffled", "image_features"], ["hook_point", "image_token"]),
    "text positions": ("layers.*.resid_pre", ["layer", "position"]),
    "vision and text at once": (["vision_model.layers.3.resid_post", "layers.5.self_attn.z"], ["component"]),
}


@pytest.mark.parametrize("values", ["other", "zero", "function"])
@pytest.mark.parametrize("grid", VISION)
def test_sweeps_over_images_equal_single_runs(tiny, pictures, grid, values):
    at, over = VISION[grid]
    chosen = {"other": "other", "zero": 0.0, "function": lambda now, other: 2 * other - now}[values]
    options = {"at": at, "values": chosen, "into": "corrupted"}
    metric = lab.metrics.logit_diff(" red", " blue")
    result = lab.sweep(tiny, *pictures, over=over, metric=metric, progress=False, **options)
    for index in random.Random(0).sample(range(len(result)), min(6, len(result))):
        with lab.patched(tiny, lab.cell_patches(tiny, *pictures, cell=result.labels[index], **options)):
            expected = evaluated(metric, lab.record(tiny, pictures[1]))
        assert (result.patched[index] - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))


def test_the_whole_image_restores_the_answer(tiny, pictures):
    result = lab.sweep(
        tiny, *pictures, at="image_features", over=["hook_point"], progress=False,
        metric=lab.metrics.logit_diff(" red", " blue"),
    )  # fmt: skip
    assert abs(float(result.tensor()[0]) - 1) < 1e-4


def test_prompts_of_unlike_length_are_refused_or_aligned(tiny):
    longer = "When Mary and the John went to the store, Mary gave a drink to"
    options = {"at": "layers.*.resid_post", "metric": METRIC, "over": ["layer", "position"], "progress": False}
    with pytest.raises(ValueError, match="part at position 4: ' John' against ' the'"):
        lab.sweep(tiny, CLEAN, longer, **options)
    align = lab.matching_positions(tiny.prompt(CLEAN), tiny.prompt(longer))
    result = lab.sweep(tiny, CLEAN, longer, align=align, **options)
    clean = lab.record(tiny, CLEAN, at="layers.*.resid_post")
    for layer, position in ((0, 10), (3, 5), (6, 15)):
        name = f"layers.{layer}.resid_post"

        def put(x: torch.Tensor, name: str = name, position: int = position) -> torch.Tensor:
            x = x.clone()
            x[:, position] = clean[name][:, position - 1]
            return x

        with lab.patched(tiny, {name: put}):
            expected = evaluated(METRIC, lab.record(tiny, longer))
        found = result.patched[result.labels.index({"layer": layer, "position": position})]
        assert (found - expected).abs().max() < 2e-4


def test_a_pair_padded_otherwise_is_refused(tiny):
    short = "Mary gave a drink to"
    with pytest.raises(ValueError, match="Row 1 has 15 tokens in the clean prompt and 6"):
        lab.sweep(
            tiny, [CLEAN, CLEAN], [CORRUPTED, short], at="layers.0.resid_post", over=["layer"], metric=METRIC,
            progress=False,
        )  # fmt: skip


def test_other_pictures_of_another_size_are_refused(tiny):
    wide = Image.new("RGB", (96, 48))
    with pytest.raises(ValueError, match="tokens in the clean prompt"):
        lab.sweep(
            tiny, question(tiny, drawn((255, 0, 0))), question(tiny, wide), at="layers.0.resid_post", over=["layer"],
            metric=METRIC, progress=False,
        )  # fmt: skip


def test_without_a_corrupted_prompt_a_sweep_ablates(tiny):
    result = lab.sweep(
        tiny, CLEAN, at="layers.*.feed_forward.experts.out", over=["layer", "expert"], values=0, metric=METRIC,
        progress=False,
    )  # fmt: skip
    table = result.table
    assert result.into == "clean"
    assert np.isnan(table["corrupted"].to_numpy()).all()
    assert result.tensor().isnan().all()
    used = lab.tables.routing.decisions(lab.record(tiny, CLEAN, at="layers.*.feed_forward.router.*"))
    chosen = set(zip(used["layer"], used["expert"], strict=True))
    for layer, expert, effect in table[["layer", "expert", "effect"]].to_numpy():
        if (layer, expert) not in chosen:
            assert abs(effect) < 1e-4


def test_a_tuple_of_values_is_patched_as_one(tiny):
    options = {"at": "layers.3.resid_post", "metric": METRIC, "progress": False}
    both = lab.sweep(tiny, CLEAN, CORRUPTED, over={"position": [(10, 14), 10, 14]}, **options)
    assert both.labels == [{"position": (10, 14)}, {"position": 10}, {"position": 14}]
    assert both.table["token"].tolist() == [" Mary to", " Mary", " to"]
    clean = lab.record(tiny, CLEAN, at="layers.3.resid_post")["layers.3.resid_post"]

    def put(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, [10, 14]] = clean[:, [10, 14]]
        return x

    with lab.patched(tiny, {"layers.3.resid_post": put}):
        expected = evaluated(METRIC, lab.record(tiny, CORRUPTED))
    assert (both.patched[0] - expected).abs().max() < 2e-4


def test_hooks_of_the_user_act_in_every_cell(tiny, no_hooks_left):
    outer = {"layers.4.self_attn.out": lambda x: 0.5 * x}
    options = {"at": "layers.*.resid_pre", "over": {"layer": [2, 5], "position": [10, 14]}, "metric": METRIC}
    with lab.patched(tiny, outer):
        result = lab.sweep(tiny, CLEAN, CORRUPTED, progress=False, **options)
        clean = lab.record(tiny, CLEAN, at="layers.2.resid_pre")["layers.2.resid_pre"]

        def put(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, 14] = clean[:, 14]
            return x

        with lab.patched(tiny, {"layers.2.resid_pre": put}):
            expected = evaluated(METRIC, lab.record(tiny, CORRUPTED))
    assert (result.patched[1] - expected).abs().max() < 2e-4
    free = lab.sweep(tiny, CLEAN, CORRUPTED, progress=False, **options)
    assert not torch.allclose(free.patched, result.patched)


def test_a_small_memory_gives_the_same_numbers_and_too_small_a_one_is_refused(tiny):
    options = {"at": "layers.*.self_attn.z", "over": ["layer", "head", "position"], "metric": METRIC, "progress": False}
    free = lab.sweep(tiny, CLEAN, CORRUPTED, **options)
    small = lab.sweep(tiny, CLEAN, CORRUPTED, memory="2MiB", **options)
    assert torch.allclose(free.patched, small.patched, atol=2e-4)
    with pytest.raises(MemoryError, match="at least"):
        lab.sweep(tiny, CLEAN, CORRUPTED, memory=1000, **options)
    with pytest.raises(ValueError, match="no size"):
        lab.sweep(tiny, CLEAN, CORRUPTED, memory="much", **options)


def test_an_interrupted_sweep_goes_on_where_it_was(tiny, tmp_path, no_hooks_left):
    path = tmp_path / "sweep.safetensors"
    options = {"at": "layers.*.self_attn.z", "over": ["layer", "head"], "metric": METRIC, "progress": False}
    whole = lab.sweep(tiny, CLEAN, CORRUPTED, values=_mixed, **options)
    generator, interrupts = random.Random(0), 0
    for _ in range(200):
        stop = generator.randint(1, 12)
        calls = 0

        def mixed(now: torch.Tensor, other: torch.Tensor, stop: int = stop) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return _mixed(now, other)

        mixed.__name__ = "_mixed"
        try:
            found = lab.sweep(tiny, CLEAN, CORRUPTED, values=mixed, path=path, **options)
            break
        except KeyboardInterrupt:
            interrupts += 1
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())
    assert interrupts >= 3
    assert found.complete
    assert torch.allclose(found.patched, whole.patched, atol=2e-4)
    again = lab.Sweep.load(path)
    assert torch.equal(again.patched, found.patched)
    assert again.table.equals(found.table)


def _mixed(now: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return 0.5 * (now + other)


def test_a_path_of_another_sweep_is_refused(tiny, tmp_path):
    path = tmp_path / "sweep.safetensors"
    options = {"over": ["layer"], "progress": False, "path": path}
    lab.sweep(tiny, CLEAN, CORRUPTED, at="layers.*.resid_mid", metric=METRIC, **options)
    with pytest.raises(ValueError, match="holds another sweep"):
        lab.sweep(tiny, CLEAN, CORRUPTED, at="layers.*.resid_pre", metric=METRIC, **options)
    with pytest.raises(ValueError, match="other tokens in its metric"):
        lab.sweep(
            tiny, CLEAN, CORRUPTED, at="layers.*.resid_mid", metric=lab.metrics.logit_diff(" Mary", " store"), **options
        )


def test_an_offloaded_model_gives_the_same_and_reads_each_weight_once(tiny):
    model = lab.load()
    cpu_offload(model, torch.device("cpu"))
    reads = dict.fromkeys(range(8), 0)
    for number, layer in enumerate(model.text.layers):
        hook: Any = layer.self_attn.q_proj._hf_hook
        before = hook.pre_forward

        def counted(module, *args, number=number, before=before, **kwargs):
            reads[number] += 1
            return before(module, *args, **kwargs)

        hook.pre_forward = counted
    options = {"at": "layers.*.resid_pre", "over": ["layer", "position"], "metric": METRIC, "progress": False}
    found = lab.sweep(model, CLEAN, CORRUPTED, **options)
    assert torch.allclose(found.patched, lab.sweep(tiny, CLEAN, CORRUPTED, **options).patched, atol=2e-4)
    assert set(reads.values()) == {1}


BAD = {
    "an unknown axis": ({"over": ["depth"]}, ValueError, "'depth' is not an axis"),
    "an axis that a hook point lacks": ({"over": ["layer", "head"]}, ValueError, "cannot be swept over 'head'"),
    "no axis": ({"over": []}, ValueError, "over is empty"),
    "a value that is not there": ({"over": {"layer": [9]}}, ValueError, "9 is no value of the axis 'layer'"),
    "an unknown hook point": ({"at": "layers.*.resid"}, ValueError, "matches none"),
    "a vision hook point without image": ({"at": "vision_model.*.*.resid_pre"}, ValueError, "no image"),
    "values of the wrong shape": ({"values": {"layers.0.resid_pre": torch.zeros(7)}}, ValueError, "must broadcast"),
    "values that lack a name": ({"values": {"x": torch.zeros(7)}}, ValueError, "has no tensor for"),
    "an unknown word for values": ({"values": "mean"}, ValueError, "is unknown"),
    "a function of another shape": ({"values": lambda now, other: now[:, :3]}, ValueError, "Give a tensor of that"),
    "a metric of NaN": ({"metric": lambda logits: logits[:, 0, 0] * torch.nan}, ValueError, "is NaN"),
    "a metric of another shape": ({"metric": lambda logits: logits[0]}, ValueError, "gave shape"),
    "a position outside": ({"metric": lab.metrics.prob(" Mary", position=99)}, IndexError, "has 15 positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(tiny, case, no_hooks_left):
    changes, error, message = BAD[case]
    options = {"at": "layers.0.resid_pre", "over": ["layer"], "metric": METRIC, "progress": False} | changes
    with pytest.raises(error, match=message):
        lab.sweep(tiny, CLEAN, CORRUPTED, **options)
