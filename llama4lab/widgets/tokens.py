"""`Tokens`: a text to point at, whose tokens are coloured."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import traitlets
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.token_axis import label_tokens
from llama4lab.widgets.colored import Colored, script
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.token_text import readable, visible

MOST_TOKENS = 2**14
FOLD_FROM = 9  # equal neighbours


class Tokens(Colored):
    """A text whose tokens are coloured by a number or a class each: hover for a tooltip, click or arrow keys to select.

    Line ends break lines. A long run of one token, as an image is, is folded into one mark, which opens by a click.

    Attributes:
        selected: Which token is selected, from 0; None without. Set it to select from code.
    """

    _esm = script("tokens")

    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    positions = traitlets.List(traitlets.Int()).tag(sync=True)
    folds = traitlets.List().tag(sync=True)
    text_version = traitlets.Int(0).tag(sync=True)
    selected = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(
        self,
        tokens: Sequence[str],
        levels: Levels,
        *,
        positions: Sequence[int] | None = None,
        notes: Sequence[str] = (),
        twin: Callable[[], Axes] | None = None,
    ) -> None:
        """Makes a text.

        Args:
            tokens: The tokens.
            levels: Their colours: one row, as many columns as tokens.
            positions: The position of each token in the prompt; by default they count from 0.
            notes: For each token, further lines of its tooltip.
            twin: Gives the picture for saved notebooks; by default one of the tokens in a line.

        Raises:
            ValueError: if there are more tokens than can be shown, or not a colour and a position for each.
        """
        super().__init__()
        self.twin = twin
        self.add_class("l4-tokens")
        self.write(tokens, levels, positions=positions, notes=notes)

    def write(
        self,
        tokens: Sequence[str],
        levels: Levels,
        *,
        positions: Sequence[int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Shows another text. The arguments are those of a new one; nothing stays selected."""
        places = list(range(len(tokens)) if positions is None else positions)
        if not 0 < len(tokens) <= MOST_TOKENS:
            raise ValueError(
                f"A text of {len(tokens):,} tokens was asked for; 1 to {MOST_TOKENS:,} can be shown.\n"
                "Cut the run: run.cut(positions=slice(0, 4096))."
            )
        if len(places) != len(tokens):
            raise ValueError(f"There are {len(tokens)} tokens and {len(places)} positions.")
        self._check(len(tokens), levels, notes)
        with self.hold_sync():
            self.selected = None
            self.tokens, self.labels = [readable(token) for token in tokens], [visible(token) for token in tokens]
            self.positions, self.folds = places, _folds(tokens)
            self.text_version += 1
            self.take(levels, notes)

    def color(self, levels: Levels, notes: Sequence[str] = ()) -> None:
        """Gives the same text other colours."""
        self._check(len(self.tokens), levels, notes)
        with self.hold_sync():
            self.take(levels, notes)

    @staticmethod
    def _check(tokens: int, levels: Levels, notes: Sequence[str]) -> None:
        if levels.shape != (1, tokens) or len(notes) not in (0, tokens):
            raise ValueError(
                f"There are {tokens} tokens, colours for {levels.shape} and {len(notes)} notes; give one for each."
            )

    @traitlets.validate("selected")
    def _exists(self, proposal: Any) -> int | None:
        wanted = proposal["value"]
        if wanted is not None and not 0 <= wanted < len(self.tokens):
            raise traitlets.TraitError(f"Token {wanted} was selected; the text has tokens 0 to {len(self.tokens) - 1}.")
        return wanted

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{self.title}; {len(self.tokens)} tokens".replace("\n", " ")

    def draw(self) -> Axes:
        """The static twin; without one, the coloured tokens in a line."""
        return self.twin() if self.twin is not None else self._plain()

    def _plain(self) -> Axes:
        ax = style.axes(None, 1.0 + 0.25 * len(self.tokens), 1.8)
        ax.imshow(self.colors()[None], aspect="auto", interpolation="nearest")
        width = style.cell_size(ax, len(self.tokens), 1)[0]
        label_tokens(ax, [token.rstrip("\n") for token in self.tokens], self.positions, width)
        ax.set(yticks=[], title=self.title)
        style.plain(ax, keep=())
        return ax


def _folds(tokens: Sequence[str]) -> list[list[int]]:
    """First place and length of every long run of one token."""
    folds, first = [], 0
    for _, same in groupby(tokens):
        count = len(list(same))
        folds += [[first, count]] if count >= FOLD_FROM else []
        first += count
    return folds
