import numpy as np
import pandas as pd
import pytest

import llama4lab as lab
from llama4lab.run.corpus import file

COUNT = {"by": "kind", "vocabulary": True, "progress": False}


@pytest.fixture(scope="module")
def items(random_ids) -> list[dict]:
    return [{"text": random_ids(3 + n, seed=n).tolist(), "kind": "ab"[n % 2]} for n in range(8)]


@pytest.fixture(scope="module")
def stats(small, items) -> lab.RoutingStats:
    return lab.routing_stats(small, items, **COUNT)


@pytest.mark.parametrize("name", ["stats.npz", "stats.parquet"])
def test_a_file_gives_back_everything(tiny, tmp_path, name):
    stats = lab.routing_stats(tiny, {"words": ["one two", "Ünïcode, too"], "no, comma": ["x"]}, vocabulary=True)
    stats.save(tmp_path / name)
    again = lab.RoutingStats.load(tmp_path / name)
    for attribute in ("groups", "layers", "num_experts", "top_k", "items", "about", "token_texts", "progress", "words"):
        assert getattr(again, attribute) == getattr(stats, attribute)
    for key, array in stats.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], array)
        assert again.arrays[key].dtype == array.dtype
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_parquet_file_is_a_table_that_other_tools_can_read(stats, tmp_path):
    stats.save(tmp_path / "stats.parquet")
    table = pd.read_parquet(tmp_path / "stats.parquet")
    own = table.loc[np.asarray(table["counts"] == "choices"), ["group", "modality", "layer", "slot", "expert", "value"]]
    choices = stats.choices().query("tokens > 0")
    assert own.to_numpy().tolist() == choices.to_numpy().tolist()


def test_a_file_of_another_kind_is_refused(small, stats, tmp_path):
    with pytest.raises(ValueError, match=r"saved as \.npz or \.parquet"):
        stats.save(tmp_path / "stats.csv")
    with pytest.raises(ValueError, match=r"saved as \.npz or \.parquet"):
        lab.routing_stats(small, [[1, 2]], path=tmp_path / "stats.csv", progress=False)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    for name in ("bad.npz", "other.npz", "other.parquet"):
        with pytest.raises(ValueError, match="holds no routing statistics"):
            lab.RoutingStats.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        lab.RoutingStats.load(tmp_path / "missing.npz")


def test_parquet_without_pyarrow_is_refused_before_anything_runs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(file, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install llama4lab\[parquet\]"):
        lab.routing_stats(small, [[1, 2]], path=tmp_path / "stats.parquet", progress=False)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(stats, tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    stats.save(path)
    before = path.read_bytes()

    def broken(*_, **__) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(file.np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        stats.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.npz"]


def test_a_sum_has_the_groups_of_both(small, items, stats):
    one = lab.routing_stats(small, items[::2], **COUNT)
    other = lab.routing_stats(small, items[1::2], **COUNT)
    total = other + one
    assert (one.groups, other.groups, total.groups) == (["a"], ["b"], ["a", "b"])
    assert total.items == len(items)
    pd.testing.assert_frame_equal(total.choices(), stats.choices())
    pd.testing.assert_frame_equal(total.vocabulary("next"), stats.vocabulary("next"))


def test_what_does_not_belong_together_is_not_added(small, new_text_model, items, stats):
    other = new_text_model(num_experts_per_tok=2, num_hidden_layers=4, seed=1)
    with pytest.raises(ValueError, match="their model is"):
        _ = stats + lab.routing_stats(other, items, **COUNT)
    with pytest.raises(ValueError, match=r"their vocabulary is \[1, 3\] and \[\]"):
        _ = stats + lab.routing_stats(small, items, by="kind", progress=False)
    with pytest.raises(ValueError, match="their max_length is None and 2"):
        _ = stats + lab.routing_stats(small, items, max_length=2, **COUNT)
    with pytest.raises(TypeError):
        _ = stats + 1  # pyright: ignore[reportOperatorIssue]


def test_counts_of_two_billion_choices_do_not_overflow(stats):
    large = lab.RoutingStats(**{**vars(stats), "arrays": {k: v.copy() for k, v in stats.arrays.items()}})
    large.arrays["vocabulary"][0, 0, 5, 1] = 2**31 - 1
    large.arrays["choices"][0, 0, 0, 0, 0] += 2**31 - 1
    assert max((large + large).vocabulary("input")["tokens"]) == 2 * (2**31 - 1)


def test_the_vocabulary_must_have_been_counted(small, items, stats):
    with pytest.raises(ValueError, match="vocabulary=True"):
        lab.routing_stats(small, items, progress=False).vocabulary("input")
    with pytest.raises(ValueError, match="choose from input, next, predicted"):
        stats.vocabulary("output")


def test_sums_of_every_table_are_the_number_of_tokens(stats):
    tokens, layers, slots = stats.tokens, len(stats.layers), stats.top_k
    assert stats.token_counts()["tokens"].sum() == tokens
    assert stats.choices()["tokens"].sum() == tokens * layers * slots
    assert stats.expert_means()["tokens"].sum() == tokens * layers * slots
    assert stats.by_position()["tokens"].sum() == tokens * layers * slots
    assert stats.flow()["tokens"].sum() == tokens * (layers - 1) * slots**2
    assert stats.pairs()["tokens"].sum() == tokens * layers * slots * (slots - 1)
    assert stats.vocabulary("input")["tokens"].sum() == tokens * layers * slots
    assert stats.vocabulary("next")["tokens"].sum() == (tokens - stats.items) * layers * slots


def test_it_shows_itself(stats):
    told = f"RoutingStats: {stats.tokens} tokens of 8 items in 2 groups; 2 routers of 4 experts, 2 a token"
    assert repr(stats) == f"{told}, with vocabulary"
    assert "<table" in stats._repr_html_()
