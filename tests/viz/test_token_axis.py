import pandas as pd
import pytest
from matplotlib import pyplot as plt

from llama4lab.viz.routing import decisions
from llama4lab.viz.token_axis import label_tokens, token_label


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" Paris", "·Paris"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("\x07", r"\x07"),
        ("中", r"\u4e2d"),
        ("\u200d", r"\u200d"),
        ("é", "é"),
        ("", ""),
        ("a" * 12, "a" * 12),
        ("a" * 13, "a" * 11 + "…"),
        ("<|header_start|>", "<|header_st…"),
        ("abcdefghi中国", "abcdefghi…"),
    ],
)
def test_a_token_is_one_short_line_that_the_font_can_draw(token: str, label: str):
    assert token_label(token) == label


def test_dollars_are_not_read_as_formulas():
    text = plt.figure().add_subplot().set_title(token_label("$x^$"))
    plt.gcf().canvas.draw()
    assert text.get_text() == r"\$x^\$"


def test_any_token_can_be_drawn_without_a_warning(decision_table):
    tokens = [" 中文", "😀", "\n", "$a$ $", "\\frac", "<|eot|>", "ﷺ", "\ud800", "e\u0301", "\0"]
    table = decision_table({1: list(range(10))}, [""] * 10)
    # Strings of pandas may be those of Arrow, which take no half of a surrogate pair.
    table["token"] = pd.Series(tokens, dtype=object)
    decisions(table).figure.canvas.draw()


def shown(tokens: list[str], points: float, first: int = 0) -> list[tuple[float, str]]:
    ax = plt.figure().add_subplot()
    label_tokens(ax, tokens, range(first, first + len(tokens)), points)
    return list(zip(ax.get_xticks().tolist(), [label.get_text() for label in ax.get_xticklabels()], strict=True))


def test_a_run_of_one_token_is_written_once_with_its_number():
    assert shown(["a", "<p>", "<p>", "<p>", "b", "b"], points=20.0) == [(0, "a"), (2, "<p> × 3"), (4, "b"), (5, "b")]


def test_narrow_cells_are_labelled_as_far_as_there_is_room():
    assert shown(list("abcdefg"), points=4.0, first=10) == [(0, "10 a"), (2, "12 c"), (4, "14 e"), (6, "16 g")]
