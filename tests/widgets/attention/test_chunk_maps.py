import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.attention import ChunkMap


def shown(view: ChunkMap) -> np.ndarray:
    return np.frombuffer(view.grid.numbers, "<f4").reshape(view.grid.shape)


def masses(table, layer: int) -> np.ndarray:
    """Head, chunk of the query, chunk of the key."""
    own = table[table["layer"] == layer]
    chunks = own["query_chunk"].max() + 1
    found = np.full((own["head"].max() + 1, chunks, chunks), np.nan)
    for line in own.itertuples():
        found[line.head, line.query_chunk, line.key_chunk] = line.mass
    return found


def test_the_map_shows_the_mean_and_each_head(stream, control):
    view = ChunkMap(stream)
    table = lab.tables.attention.chunk_map(stream)
    assert (view.layer, view.head, view.maps.selected) == (3, "mean", 0)  # the first layer with anything to see
    assert np.allclose(shown(view), masses(table, 3).mean(0), equal_nan=True)
    assert np.allclose(np.nansum(shown(view), 1), 1, atol=1e-5)
    view.maps.selected = 2
    assert (view.head, control(view, "head").value) == (1, 1)
    assert np.allclose(shown(view), masses(table, 3)[1], equal_nan=True)
    control(view, "layer").value = 0
    assert np.allclose(np.nan_to_num(shown(view)), np.eye(5), atol=1e-6)
    assert [frame[4] for frame in view.maps.frames] == [False] * 5


def test_a_click_compares_the_heads(stream):
    view = ChunkMap(stream)
    view.grid.selected = [3, 1]
    assert view.selection == {"layer": 3, "head": "mean", "query_chunk": 3, "key_chunk": 1}
    own = masses(view.table, 3)[:, 3, 1]
    assert np.allclose(view.bars.heights[0], own)
    assert view.bars.line == pytest.approx(own.mean(), abs=1e-6)
    view.bars.selected = 2
    assert view.selection["head"] == 2
    view.layer = 7
    assert view.selection == {"layer": 7, "head": 2, "query_chunk": 3, "key_chunk": 1}
    assert np.allclose(view.bars.heights[0], masses(view.table, 7)[:, 3, 1])
    view.grid.selected = [1, 3]  # a later chunk
    assert not view.bars.heights.any()


def test_the_heading_says_where_attention_goes(stream):
    view = ChunkMap(stream)
    view.layer, view.head = 7, 1
    own = lab.tables.attention.reductions(stream).query("layer == 7 and head == 1").iloc[0]
    heading = view.children[4].value
    assert f"earlier chunks {own['earlier']:.3f}" in heading
    assert f"first token {own['first_token']:.3f}" in heading
    assert "layer 7 (NoPE), head 1" in heading


def test_runs_streams_and_tables_are_shown_alike(run):
    table = lab.tables.attention.chunk_map(run)
    from_run, from_table = ChunkMap(run), ChunkMap(table)
    assert from_run.table.equals(table)
    assert from_run.grid.numbers == from_table.grid.numbers
    with pytest.raises(ValueError, match="no lines"):
        ChunkMap(table.iloc[:0])


def test_a_model_without_chunks_is_one_chunk(new_text_model, random_ids):
    model = new_text_model(no_rope_layers=[0] * 5)
    ids = random_ids(2, 12)
    names = ["layers.*.self_attn.q_rot", "layers.*.self_attn.k_rot"]
    view = ChunkMap(lab.record(model, ids, at=names))
    assert view.grid.shape == [1, 1]
    assert view.maps.frames == []


def test_what_is_not_there_cannot_be_chosen(stream):
    view = ChunkMap(stream)
    nowhere = {"layer": 3, "head": 0, "query_chunk": 9, "key_chunk": 0}
    for name, wrong in (("layer", 8), ("head", 4), ("selection", nowhere)):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)
    assert ChunkMap(stream)._repr_mimebundle_()[0]["text/html"].count("<img") == 1
