import matplotlib.pyplot as plt
import numpy as np
import pytest
import traitlets
from matplotlib.colors import Normalize

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors, faded
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.token_text import readable
from llama4lab.widgets.tokens import MOST_TOKENS, Tokens

TEXT = ["The", " cat", ".", "\n", "<|patch|>", *["<|patch|>"] * 11, " It"]


def levels(count: int) -> Levels:
    experts, gates = np.arange(count)[None] % 4, np.linspace(0, 1, count)[None]
    names, colors = list("0123"), expert_colors(np.arange(4))
    return Levels.of_classes(experts, names, colors, title="expert", strengths=("gate", gates))


@pytest.fixture
def view() -> Tokens:
    return Tokens(TEXT, levels(len(TEXT)), positions=range(3, 3 + len(TEXT)))


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" Mary", " Mary"), ("\n", "↵\n"), ("a\tb", "a⇥b"), ("\u202eabc", r"\u202eabc"), ("", "·"), ("<b>", "<b>")],
)
def test_a_token_in_a_text_keeps_its_spaces_and_line_ends(token: str, shown: str):
    assert readable(token) == shown


def test_a_long_run_of_one_token_is_folded(view):
    assert view.folds == [[4, 12]]
    assert Tokens(TEXT[:8], levels(8)).folds == []


def test_tokens_have_their_positions_and_colours(view):
    assert view.positions[0] == 3
    wanted = faded(expert_colors(np.arange(len(TEXT)) % 4), np.linspace(0, 1, len(TEXT)))
    assert np.allclose(view.colors(), wanted, atol=0.005)


def test_other_colours_leave_text_and_selection(view):
    view.selected = 2
    before = view.text_version
    numbers = Levels.of_numbers(np.ones((1, len(TEXT))), Normalize(0, 1), style.SEQUENTIAL, title="norm")
    view.color(numbers, ["note"] * len(TEXT))
    assert (view.selected, view.text_version, view.title, view.strengths) == (2, before, "norm", b"")


def test_another_text_has_nothing_selected(view):
    view.selected = 16
    view.write(["a", "b"], levels(2))
    assert (view.selected, view.tokens, view.folds) == (None, ["a", "b"], [])
    with pytest.raises(traitlets.TraitError, match="tokens 0 to 1"):
        view.selected = 2


def test_what_does_not_fit_is_refused(view):
    with pytest.raises(ValueError, match="There are 17 tokens"):
        view.color(levels(3))
    with pytest.raises(ValueError, match="2 tokens and 1 positions"):
        view.write(["a", "b"], levels(2), positions=[0])
    with pytest.raises(ValueError, match="can be shown"):
        view.write(["a"] * (MOST_TOKENS + 1), levels(MOST_TOKENS + 1))


def test_a_saved_notebook_has_a_picture(view):
    html = view._repr_mimebundle_()[0]["text/html"]
    assert html.count("<img") == 1
    assert "<script" not in html
    assert plt.get_fignums() == []
