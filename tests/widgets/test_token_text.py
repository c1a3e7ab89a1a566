import pandas as pd
import pytest

from llama4lab.widgets.token_text import visible
from llama4lab.widgets.top_tokens import top_tokens_html

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Mary", "·Mary"),
        ("\n", "↵"),
        ("a\tb\r", "a⇥b␍"),
        ("\u202eabc", r"\u202eabc"),
        ("\x00", r"\x00"),
        ("\ud800", r"\ud800"),
        ("中文", "中文"),
        ("$x$", "$x$"),
        ("", ""),
    ],
)
def test_a_token_is_one_line_that_can_be_read(token: str, shown: str):
    assert visible(token) == shown


def test_a_long_token_ends_in_an_ellipsis():
    assert visible("a" * 30, 10) == "aaaaaaaaa…"
    assert visible("a" * 10, 10) == "a" * 10


def test_runs_stand_side_by_side():
    table = pd.DataFrame({"run": ["clean", "clean", "patched"], "rank": [0, 1, 0]})
    html = top_tokens_html(table.assign(token=[" Mary", " John", "\n"], prob=[0.75, 0.0001, 1.0]))
    assert html.count("<th") == 2
    assert html.count("<tr>") == 3
    for text in (">clean<", ">·Mary<", ">0.750<", "75.0%", ">&lt; 0.001<", ">↵<"):
        assert text in html


def test_tokens_and_names_never_become_html():
    html = top_tokens_html(pd.DataFrame({"run": [HOSTILE], "rank": [0], "token": [HOSTILE], "prob": [0.5]}))
    assert "<img" not in html
    assert html.count("&lt;img") == 2
