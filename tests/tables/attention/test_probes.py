"""The tiny checkpoint recalls far facts through its NoPE layers, and through nothing else."""

from typing import Any

import pytest

from llama4lab.model.loading import load
from llama4lab.run.attention.editing import edited
from llama4lab.run.attention.needles import found, made, owners
from llama4lab.tables.attention.probes import needle

LABELS = ["none", "3", "7", "3, 7"]


@pytest.fixture(scope="module")
def tiny():
    return load()


@pytest.fixture(scope="module")
def table(tiny) -> Any:
    return needle(tiny, distances=[5, 100], borders=[None, -1, 0], n=16)


def accuracy(table: Any, distance: int, border: int | None, ablated: str) -> float:
    own = table[(table["distance"] == distance) & (table["ablated"] == ablated)]
    own = own[own["border"].isna()] if border is None else own[own["border"] == border]
    return own["accuracy"].item()


@pytest.mark.parametrize("border", [None, -1])
def test_far_recall_needs_nope_layers(table, border):
    assert accuracy(table, 100, border, "none") > 0.9
    assert accuracy(table, 100, border, "3, 7") < 0.1


def test_near_recall_needs_them_only_where_a_border_lies_between(table):
    assert accuracy(table, 5, -1, "none") > 0.9
    assert accuracy(table, 5, -1, "3, 7") < 0.1
    assert accuracy(table, 5, None, "3, 7") > 0.9
    assert accuracy(table, 5, 0, "3, 7") > 0.7


def test_lines_are_the_means_of_single_texts(tiny, table):
    """Each line by hand: the same texts, under the same edit."""
    for distance in (5, 100):
        make = owners(tiny)
        needles = [made(tiny, make, each, 16) for each in ([5] if distance == 5 else [5, 100])][-1]
        with edited(tiny, layers=[3, 7], bar="earlier"):
            correct, log_probs = found(tiny, needles, -1)
        own = table[(table["distance"] == distance) & (table["ablated"] == "3, 7") & (table["border"] == -1)]
        assert own["accuracy"].item() == correct.float().mean()
        assert own["log_prob"].item() == log_probs.mean()


def test_without_the_fact_hardly_anything_is_found_where_no_border_cuts_it(table):
    """Of four things one is right, and none of them has the owner that is asked for."""
    whole = table[table["border"].isna() | (table["border"] == -1)]
    assert (whole["guessed"] < 0.6).all()
    assert whole.loc[whole["ablated"] == "none", "accuracy"].min() > 0.9


def test_a_model_that_guesses_at_a_fact_cut_in_two_is_not_said_to_recall(table):
    """The fact says nothing there: with it or without it, the answers are as often right, also where many are."""
    cut = table[(table["distance"] == 5) & (table["border"] == 0) & table["ablated"].isin(["7", "3, 7"])]
    assert (cut["accuracy"] > 0.7).all()
    assert (cut["accuracy"] - cut["guessed"]).abs().max() < 0.1


def test_borders_between_are_counted(table):
    assert table["ablated"].unique().tolist() == LABELS
    assert len(table) == 2 * 3 * len(LABELS)
    crossed = table.drop_duplicates(["distance", "border"]).set_index(["distance", "border"])["crossed"]
    assert crossed[5, -1] == 1
    assert crossed[5, 0] == 0
    assert crossed[100, -1] == 2
    assert crossed[100, 0] == 1
    assert table.loc[table["border"].isna(), "crossed"].isna().all()


def test_own_texts_and_own_ablations(tiny):
    def make(distance: int) -> tuple[str, str]:
        return "recall" + " the" * distance, " the"

    found = needle(tiny, distances=20, borders=[None], ablate=[7], make=make, n=1)
    assert found["ablated"].tolist() == ["none", "7"]
    assert found["guessed"].isna().to_numpy().all()
    only = needle(tiny, distances=20, borders=[None], ablate=(), make=make, n=1)
    assert only["log_prob"].item() == found["log_prob"].iloc[0]


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ({"n": 0}, ValueError, "nothing to ask"),
        ({"borders": []}, ValueError, "nothing to ask"),
        ({"ablate": [0]}, ValueError, "sees no earlier chunk"),
        ({"ablate": [9]}, IndexError, "layers 0 to 7"),
    ],
)
def test_wrong_wishes_are_refused(tiny, asked, kind, message):
    with pytest.raises(kind, match=message):
        needle(tiny, **{"distances": [5], "n": 1, **asked})
