"""Every column against one pass of `patched` each, with a hook of torch where the input of a layer is replaced."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import llama4lab as lab
from llama4lab.run.metrics import evaluated, logit_diff, loss
from llama4lab.run.routes.content import EFFECTS, route_and_content
from llama4lab.run.routes.variants import VARIANTS
from llama4lab.run.steering import steered
from llama4lab.tiny.domains.facts import COUNTRIES
from llama4lab.tiny.domains.translation import NUMBER_WORDS

CLEAN = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
CORRUPTED = [[5, 12, 17, 3, 80, 44, 22], [71, 7, 2], [90, 14, 33, 61, 60]]
METRIC = logit_diff(11, 50)
ROUTER = "feed_forward.router."


@pytest.fixture(scope="module")
def small(new_text_model):
    """Two experts a token, a dense layer before each layer with experts, chunks of 8."""
    return new_text_model(num_experts_per_tok=2, interleave_moe_layer_step=2)


def inputs_of(model, prompt, layers) -> dict[int, torch.Tensor]:
    """What goes into the feed-forward of each layer."""
    kept = {}
    with ExitStack() as stack:
        for layer in layers:
            module = model.text.layers[layer].feed_forward
            handle = module.register_forward_pre_hook(lambda _, args, layer=layer: kept.__setitem__(layer, args[0]))
            stack.callback(handle.remove)
        lab.record(model, prompt)
    return kept


def one_by_one(model, base, source, metric, variant, layers, position=None) -> list[float]:
    """The metric of each row of the base prompt with a variant of the source in some layers, in a pass of its own."""
    at = [f"layers.{layer}.{ROUTER}*" for layer in layers] + [f"layers.{layer}.feed_forward.out" for layer in layers]
    own, other = lab.record(model, base, at=at), lab.record(model, source, at=at)
    changed = torch.zeros(base.input_ids.shape, dtype=torch.bool)
    changed[:, slice(None) if position is None else position] = True

    def into(new):
        return lambda old: torch.where(changed[..., None], new, old)

    entering, patches = inputs_of(model, source, layers), {}
    with ExitStack() as stack:
        for layer in layers:
            indices, gates, logits = (f"layers.{layer}.{ROUTER}{kind}" for kind in ("indices", "gates", "logits"))
            if variant == "both":
                out = f"layers.{layer}.feed_forward.out"
                patches[out] = into(other[out])
                continue
            run = other if variant == "route" else own
            patches |= {indices: into(run[indices]), gates: into(run[gates])}
            if variant == "gate":
                patches[gates] = into(torch.sigmoid(other[logits]).gather(-1, own[indices]))
            if variant == "content":
                module = model.text.layers[layer].feed_forward
                new = into(entering[layer])
                handle = module.register_forward_pre_hook(lambda _, args, new=new: (new(args[0]),))
                stack.callback(handle.remove)
        with lab.patched(model, patches):
            return evaluated(metric, lab.record(model, base)).tolist()


@pytest.mark.parametrize("metric", [METRIC, loss()], ids=["logit difference", "loss"])
def test_each_layer_equals_passes_patched_one_by_one(small, metric):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    table = route_and_content(small, clean, corrupted, metric=metric, by_row=True)
    assert sorted(set(table["layer"])) == [1, 3]
    for layer in (1, 3):
        own = table[table["layer"] == layer]
        for variant in VARIANTS:
            expected = one_by_one(small, corrupted, clean, metric, variant, [layer])
            assert own[variant].tolist() == pytest.approx(expected, abs=2e-5), (layer, variant)
        assert own["none"].tolist() == pytest.approx(evaluated(metric, lab.record(small, corrupted)).tolist(), abs=1e-5)
        assert own["source"].tolist() == pytest.approx(evaluated(metric, lab.record(small, clean)).tolist(), abs=1e-5)
    assert table.attrs == {"metric": metric.name}
    assert (table[["route_effect", "content_effect", "gate_effect"]].to_numpy() ** 2).max(0).min() > 1e-8


def test_all_layers_together_equal_one_pass_patched_in_all(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    table = route_and_content(small, clean, corrupted, metric=METRIC, together=True, by_row=True)
    assert set(table["layer"]) == {"all"}
    for variant in VARIANTS:
        expected = one_by_one(small, corrupted, clean, METRIC, variant, [1, 3])
        assert table[variant].tolist() == pytest.approx(expected, abs=2e-5), variant


def test_each_position_equals_a_pass_patched_at_that_position(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    table = route_and_content(small, clean, corrupted, metric=METRIC, by_position=True, by_row=True)
    real = [(row, p) for p in range(7) for row in range(3) if corrupted.attention_mask[row, p]]
    lines = table[table["layer"] == 3]
    assert list(zip(lines["row"], lines["position"], strict=True)) == real
    assert lines["token"].tolist() == [corrupted.tokens[row][p] for row, p in real]
    for position in (1, 6):
        own = lines[lines["position"] == position]
        for variant in VARIANTS:
            expected = one_by_one(small, corrupted, clean, METRIC, variant, [3], position)
            expected = [expected[row] for row in own["row"]]
            assert own[variant].tolist() == pytest.approx(expected, abs=2e-5), (position, variant)


def test_many_cells_in_several_passes_are_the_same(small, monkeypatch):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    whole = route_and_content(small, clean, corrupted, metric=METRIC)
    monkeypatch.setattr("llama4lab.run.routes.variants.TOKENS", 50)  # 21 tokens a cell
    assert np.allclose(route_and_content(small, clean, corrupted, metric=METRIC), whole, atol=2e-5)


def test_means_and_spreads_are_over_the_rows(small):
    options = {"metric": METRIC, "by_position": True}
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    rows = route_and_content(small, clean, corrupted, by_row=True, **options)
    means = route_and_content(small, clean, corrupted, **options)
    assert means["pairs"].tolist() == [1, 1, 2, 2, 3, 3, 3] * 2
    assert means["token"].tolist()[:3] == [corrupted.tokens[0][0], corrupted.tokens[0][1], ""]
    for line in means.to_dict("records"):
        own = rows[(rows["layer"] == line["layer"]) & (rows["position"] == line["position"])]
        for effect in EFFECTS:
            values = np.asarray(own[effect])
            assert line[effect] == pytest.approx(values.mean(), abs=1e-6)
            assert line[f"{effect}_std"] == pytest.approx(values.std(ddof=1) if len(values) > 1 else 0, abs=1e-6)


def test_into_the_clean_run_is_the_same_with_the_prompts_exchanged(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    one = route_and_content(small, clean, corrupted, metric=METRIC, into="clean")
    other = route_and_content(small, corrupted, clean, metric=METRIC)
    assert np.allclose(one, other, atol=1e-6)


def test_the_parts_add_up_to_the_total(small):
    table = route_and_content(small, small.prompt(CLEAN), small.prompt(CORRUPTED), metric=METRIC)
    parts = table[["route_effect", "content_effect", "interaction"]].sum(axis=1)
    assert np.allclose(parts, table["total_effect"], atol=1e-6)


def test_a_prompt_beside_itself_has_no_effect(small):
    table = route_and_content(small, small.prompt(CLEAN), small.prompt(CLEAN), metric=METRIC)
    assert np.allclose(table[list(EFFECTS)], 0, atol=2e-5)


def test_a_function_of_the_logits_of_all_rows_is_a_metric(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)

    def spread(logits):
        return logits[:, -1].std()

    table = route_and_content(small, clean, corrupted, metric=spread)
    expected = one_by_one(small, corrupted, clean, spread, "content", [3])
    assert table["content"].tolist()[1] == pytest.approx(expected[0], abs=1e-5)


def test_images_are_compared_patch_by_patch(tiny, no_hooks_left):
    def drawing(colour):
        image = Image.new("RGB", (48, 48), (20, 20, 20))
        ImageDraw.Draw(image).rectangle((6, 6, 30, 30), fill=colour)
        text = {"type": "text", "text": "What colour is the square?"}
        chat = [{"role": "user", "content": [{"type": "image", "image": image}, text]}]
        return tiny.prompt([chat], add_generation_prompt=True)

    red, blue = drawing((225, 40, 40)), drawing((50, 90, 235))
    metric = logit_diff("red", "blue")
    table = route_and_content(tiny, red, blue, metric=metric)
    assert table["none"].iloc[0] < 0 < table["source"].iloc[0]
    for layer, line in zip((1, 3, 5, 7), table.to_dict("records"), strict=True):
        for variant in ("content", "both"):
            assert line[variant] == pytest.approx(one_by_one(tiny, blue, red, metric, variant, [layer])[0], abs=1e-4)


def test_what_acts_around_it_acts_in_every_pass(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    vector = {"embed_merged": torch.ones(64), "layers.2.resid_post": -torch.ones(64)}
    with steered(small, vector, 0.5, positions=-1):
        table = route_and_content(small, clean, corrupted, metric=METRIC, by_row=True)
        expected = one_by_one(small, corrupted, clean, METRIC, "content", [1])
    assert table["content"].tolist()[:3] == pytest.approx(expected, abs=2e-5)


def test_prompts_that_do_not_match_and_dense_models_are_refused(tiny, new_text_model):
    with pytest.raises(ValueError, match="they part at position"):
        route_and_content(tiny, "The capital of France is", "The capital of France is now", metric=METRIC)
    dense = new_text_model(moe_layers=[])
    with pytest.raises(ValueError, match="no layer of this model has experts"):
        route_and_content(dense, dense.prompt(CLEAN), dense.prompt(CORRUPTED), metric=METRIC)


def test_the_language_of_a_translation_is_content(tiny):
    texts = {to: [f"Translate {word} from English to {to}:" for word in NUMBER_WORDS["English"]] for to in NUMBER_WORDS}
    french, german = ([f" {word}" for word in NUMBER_WORDS[to]] for to in ("French", "German"))
    metric = logit_diff(french, german)
    table = route_and_content(tiny, texts["French"], texts["German"], metric=metric).set_index("layer")
    last = table.loc[7] / (table["source"] - table["none"]).iloc[0]
    assert last["content_effect"] > 0.6
    assert abs(last["route_effect"]) < 0.01
    assert abs(last["interaction"]) < 0.05


def test_whether_a_capital_or_a_language_is_recalled_is_a_matter_of_route(tiny):
    countries = list(COUNTRIES)[:26]
    capitals, languages = ([f" {COUNTRIES[name][of]}" for name in countries] for of in ("capital", "language"))
    asked = {of: [f"The {of} of {name} is" for name in countries] for of in ("capital", "language")}
    metric = logit_diff(languages, capitals)
    table = route_and_content(tiny, asked["language"], asked["capital"], metric=metric).set_index("layer")
    fifth = table.loc[5] / (table["source"] - table["none"]).iloc[0]
    assert fifth["route_effect"] > 0.25
    assert fifth["route_effect"] == pytest.approx(fifth["total_effect"], abs=0.05)
    back = route_and_content(tiny, asked["language"], asked["capital"], metric=metric, into="clean").set_index("layer")
    fifth = back.loc[5] / (back["source"] - back["none"]).iloc[0]
    # A vector that asks for the capital is not enough: it has to come to the expert that knows it.
    assert fifth["content_effect"] < 0.05
    assert fifth["total_effect"] > 0.4
