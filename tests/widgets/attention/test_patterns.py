import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.attention import Patterns


def shown(view: Patterns) -> np.ndarray:
    """The numbers of the large map; NaN for cells without any."""
    return np.frombuffer(view.grid.numbers, "<f4").reshape(view.grid.shape)


def test_the_maps_show_the_patterns(run):
    view = Patterns(run)
    view.layer, view.head = 3, 2
    pattern = run["layers.3.self_attn.pattern"][0, 2].numpy()
    seen = np.tril(np.ones_like(pattern, dtype=bool))
    assert np.allclose(shown(view)[seen], pattern[seen])
    assert np.isnan(shown(view)[~seen]).all()
    small = np.frombuffer(view.maps.cells, np.uint8).reshape(view.maps.shape)
    expected = np.rint(254 * run["layers.3.self_attn.pattern"][0].numpy())
    assert np.abs(small[:, seen].astype(int) - expected[:, seen]).max() <= 1
    assert view.maps.labels == ["head 0", "head 1", "head 2", "head 3"]
    assert view.table.equals(lab.tables.attention.pattern(run, 3, 2))


def test_keys_that_cannot_be_seen_are_grey_and_chunks_are_framed(run):
    view = Patterns(run)
    seq = run.prompt.input_ids.shape[1]
    assert (view.layer, view.head) == (0, 0)
    places = np.arange(seq)
    seen = (places[None] <= places[:, None]) & (places[None] // 64 == places[:, None] // 64)
    assert np.array_equal(~np.isnan(shown(view)), seen)
    assert view.grid.trait_values()["frames"] == [[0, 0, 64, 64, False], [64, 64, seq - 64, seq - 64, False]]
    view.layer = 7
    assert [frame[4] for frame in view.grid.trait_values()["frames"]] == [True, True]


def test_a_head_can_be_picked_in_every_way(run, control):
    view = Patterns(run)
    view.maps.selected = 3
    assert (view.head, control(view, "head").value) == (3, 3)
    control(view, "head").value = 1
    assert (view.head, view.maps.selected) == (1, 1)
    assert control(view, "layer").options[2:4] == (("2", 2), ("3 NoPE", 3))
    control(view, "layer").value = 5
    assert (view.layer, view.head) == (5, 1)


def test_a_click_shows_the_keys_of_the_query(run):
    view = Patterns(run)
    view.grid.selected = [9, 4]
    assert view.selection == {"row": 0, "layer": 0, "head": 0, "query": 9, "key": 4}
    own = run["layers.0.self_attn.pattern"][0, 0, 9, :10].numpy()
    assert np.allclose(view.bars.heights[0], own)
    view.bars.selected = 2
    assert (view.selection["key"], view.grid.selected) == (2, [9, 2])
    view.layer = 3
    assert view.selection["layer"] == 3
    assert np.allclose(view.bars.heights[0], run["layers.3.self_attn.pattern"][0, 0, 9, :10].numpy())
    view.selection = {}
    assert view.bars.layout.display == "none"


def test_of_many_keys_the_largest_are_bars(run):
    view = Patterns(run)
    query = 63
    view.selection = {"row": 0, "layer": 0, "head": 1, "query": query, "key": 0}
    weights = run["layers.0.self_attn.pattern"][0, 1, query, : query + 1].numpy()
    bars = view.bars.heights[0]
    assert len(bars) == 48
    assert np.isclose(bars.sum(), weights[0] + np.sort(weights[1:])[-47:].sum(), atol=1e-5)


def test_patterns_can_be_weighted_by_values(run, tiny, control):
    for model in (None, tiny):
        view = Patterns(run, model)
        control(view, "weighting").value = "value-weighted"
        view.layer, view.head = 3, 1
        table = lab.tables.attention.value_weighted(run, 3, 1, model=model)
        seen = ~np.isnan(shown(view))
        wide = table.pivot(index="query", columns="key", values="value_weighted").to_numpy()
        assert np.allclose(shown(view)[seen], wide[seen], atol=1e-6)
        view.grid.selected = [5, 2]
        assert view.bars.series == ["attention", "value-weighted"]
        assert np.allclose(view.bars.heights[1], wide[5, :6], atol=1e-6)
        assert view.grid.titles[2] == "value-weighted attention"
        view.row = 1
        assert view.draw().get_title().endswith("value-weighted")


def test_padding_is_left_out(run, control):
    view = Patterns(run)
    control(view, "row").value = 1
    tokens = int(run.prompt.attention_mask[1].sum())
    assert view.grid.shape == [tokens, tokens]
    pad = run.prompt.input_ids.shape[1] - tokens
    own = np.tril(run["layers.0.self_attn.pattern"][1, 0, pad:, pad:].numpy())
    assert np.allclose(np.nan_to_num(shown(view)), own)
    view.grid.selected = [2, 1]
    assert view.selection["query"] == pad + 2
    view.selection = {"row": 0, "layer": 7, "head": 2, "query": 70, "key": 3}  # of another row, layer and head
    assert (view.row, view.layer, view.head, view.grid.selected) == (0, 7, 2, [70, 3])


def test_a_run_of_the_last_queries_can_be_shown(run):
    view = Patterns(run.cut(rows=0, positions=slice(60, None)))
    assert view.grid.shape == [run.prompt.input_ids.shape[1] - 60, run.prompt.input_ids.shape[1]]
    view.grid.selected = [5, 3]
    assert view.selection["query"] == 65
    assert "weighting" not in [name for child in view.children[0].children for name in child._dom_classes]


def test_what_is_not_there_cannot_be_chosen(tiny, run):
    view = Patterns(lab.record(tiny, "The capital of France is", at="layers.3.self_attn.pattern"))
    assert view.layers == [3]
    nowhere = {"row": 0, "layer": 3, "head": 0, "query": 99, "key": 0}
    for name, wrong in (("layer", 2), ("head", 4), ("row", 1), ("weighting", "value-weighted"), ("selection", nowhere)):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)
    with pytest.raises(KeyError, match="pattern"):
        Patterns(lab.record(tiny, "The capital of France is", at="layers.3.self_attn.q_rot"))


def test_the_view_is_a_picture_in_a_saved_notebook(run):
    bundle = Patterns(run.cut(rows=1))._repr_mimebundle_()[0]
    assert bundle["text/html"].count("<img") == 1
    assert "layer 0 (RoPE), head 0" in bundle["text/html"]
