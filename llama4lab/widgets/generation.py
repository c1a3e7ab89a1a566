"""Text while it is generated: its tokens, where they went and where they looked."""

import asyncio
import time
from html import escape
from typing import Any

import ipywidgets
import traitlets
from matplotlib.axes import Axes

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.recording import as_prompt
from llama4lab.tables.generation_growth import GrowingTables
from llama4lab.viz import generation as viz
from llama4lab.viz import routing
from llama4lab.widgets.controls import bar, dropdown, one_of, slider
from llama4lab.widgets.fallback import WithFallback
from llama4lab.widgets.generation_pace import GenerationPace
from llama4lab.widgets.generation_text import CHOICE, GenerationText
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import lines_of
from llama4lab.widgets.tokens import Tokens

SHOWS = ("expert", *CHOICE, *viz.NAMES)
PROMPT_TAIL = 256
EVERY = 0.1  # seconds between two pictures while tokens come
HINT = '<span style="opacity:.7">Click a token to see how it was chosen, where it went and where it looked.</span>'
BUTTONS = {"run": "Run", "step": "One token", "stop": "Stop", "again": "From the start"}


class Generation(WithFallback, ipywidgets.VBox):
    """A text that is generated as one watches, with the expert of each token and where it looked.

    `Run`, `One token` and `Stop` go on and rest at any token. While it runs, no hook stays on the model between two
    tokens, so other cells can use the model. Interventions act on passes made while their block lasts; under one,
    call `generate`, which waits until all is written:

        view = Generation(model, prompt)
        with lab.steered(model, vector, scale=4):
            view.generate()

    A token is chosen in one step and read in the next, so the newest one has no expert yet.

    Attributes:
        show: What the colours are: "expert", how a token was chosen ("prob", "surprisal", "rank") or where it looked
            ("own_chunk", "earlier", "first_token", "itself", "distance", "entropy"; means over heads).
        layer: Layer of experts and attention.
        row: Row of the prompt.
        slot: Which of a token's experts, from 0.
        selection: The selected token, for example `{"row": 0, "position": 5}`; empty without one.
        state: "ready", "running", "resting" (it can go on) or "ended".
        pace: What goes on, a `GenerationPace`.
        tokens: The text, a `Tokens`.
    """

    show = traitlets.Enum(list(SHOWS), "expert")
    layer = traitlets.Int()
    row = traitlets.Int(0)
    slot = traitlets.Int(0)
    selection = traitlets.Dict()
    state = traitlets.Enum(["ready", "running", "resting", "ended"], "ready")

    def __init__(
        self,
        model: HookedPreTrainedModel,
        prompt: Any,
        *,
        max_new_tokens: int = 50,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        """Makes the view; nothing is generated yet.

        Args:
            model: The model.
            prompt: A `Prompt`, or anything that `model.prompt` takes.
            max_new_tokens: How many tokens at most.
            seed: Of the random numbers, for sampling; by default they go on as they are.
            options: As for `lab.generate`, for example `do_sample=True, temperature=0.8`.
        """
        options = {"max_new_tokens": max_new_tokens, **options}
        self.pace = GenerationPace(model, as_prompt(model, prompt), seed=seed, tail=PROMPT_TAIL, options=options)
        self._quietly, self._task, self._due, meta = False, None, 0.0, self.tables.meta
        super().__init__(layer=next(iter(meta["moe_layers"]), 0))
        self._text = self._read()
        self.tokens = Tokens(*self._colored(), positions=self._text.positions, notes=self._text.notes())
        self.tokens.twin = self.draw
        self._below = ipywidgets.HTML(HINT).add_class("l4-cell")
        self._said = ipywidgets.HTML().add_class("l4-state")
        self._buttons = {name: self._button(name) for name in BUTTONS}
        controls = [dropdown(self, "show", SHOWS), slider(self, "layer", range(meta["num_layers"]))]
        controls += [dropdown(self, "row", range(len(self.pace.prompt)))] if len(self.pace.prompt) > 1 else []
        controls += [dropdown(self, "slot", range(meta["top_k"]))] if meta["top_k"] > 1 else []
        self.children = [bar([*self._buttons.values(), self._said]), bar(controls), self.tokens, self._below]
        self.observe(lambda _: self._paint(), ["show", "layer", "slot"])
        self.observe(lambda _: self._write(), "row")
        self.observe(lambda _: self._select(), "selection")
        self.observe(lambda _: self._say(), "state")
        self.tokens.observe(lambda _: self._clicked(), "selected")
        self._say()

    def generate(self) -> None:
        """Generates from the start and waits until all is written. An interrupt keeps what is there."""
        self.state = "running"
        try:
            self.pace.whole(self._write_if_due)
        finally:
            self.state = "ended"
            self._write()

    def run(self) -> None:
        """Lets the text go on, from the start where it had ended, while other cells can be run.

        Raises:
            ValueError: if somebody listens to the model or edits it, which would last no longer than this cell.
            RuntimeError: if there is no notebook, or other event loop, that could go on.
        """
        loop = asyncio.get_running_loop()
        if self.state != "running":
            self.pace.begin()
            self.state = "running"
            self._task = loop.create_task(self._go_on())

    def step(self) -> None:
        """Generates one token; a text that runs rests instead."""
        if self.state == "running":
            return self.stop()
        if self.pace.ended:
            self.state = "ready"
        self.pace.begin()
        self._turn()
        self._write()

    def stop(self) -> None:
        """Lets the text rest after the token that is being written."""
        if self.state == "running":
            self.state = "resting"

    def again(self) -> None:
        """Forgets what was generated, and the cache."""
        self.state = "ready"
        self.pace.forget()
        self._write()

    def close(self) -> None:
        """Ends the generation and takes the view away."""
        self.state = "ready"
        self.pace.forget()
        super().close()

    @property
    def tables(self) -> GrowingTables:
        """The tables so far: `tokens`, `decisions` and `attention`."""
        return self.pace.tables

    @property
    def ax(self) -> Axes:
        """What is shown as a matplotlib figure."""
        return self.draw()

    def draw(self) -> Axes:
        """The static twin: `viz.routing.tokens` or a plot of `viz.generation`; first of all, the plain text."""
        tables = self.tables
        if self.show == "expert" and self.layer in tables.meta["moe_layers"] and not tables.decisions.empty:
            own = lines_of(tables.decisions, row=self.row, layer=self.layer)
            return routing.tokens(own, layer=self.layer, row=self.row)
        if self.show in viz.NAMES and not tables.attention.empty:
            return viz.attention(tables.attention, self.show, row=self.row)
        return self.tokens._plain() if tables.tokens.empty else viz.tokens(tables.tokens, row=self.row)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        count = self.pace.new.shape[1]
        return f"{count} generated tokens, {self.show}, layer {self.layer}, row {self.row}"

    def _button(self, name: str) -> ipywidgets.Button:
        own = ipywidgets.Button(description=BUTTONS[name], layout={"width": "auto"})
        own.on_click(lambda _: self._press(name))
        return own.add_class(f"l4-{name}")

    def _press(self, name: str) -> None:
        try:
            getattr(self, name)()
        except Exception as error:  # a reader who pressed a button sees no traceback
            self._fail(error)

    def _turn(self) -> bool:
        """Lets the text grow by a token. Gives whether there may be more."""
        more = self.pace.turn()
        if not more:
            self.state = "ended"
        elif self.state == "ready":
            self.state = "resting"
        return more

    async def _go_on(self) -> None:
        try:
            while self.state == "running" and self._turn():
                self._write_if_due()
                await asyncio.sleep(0)  # for the reader: buttons, and cells to run
        except Exception as error:  # nobody waits for this
            self._fail(error)
        self._write()

    def _fail(self, error: Exception) -> None:
        self.state = "ended"
        self._said.value = escape(f"{type(error).__name__}: {error}")

    def _read(self) -> GenerationText:
        """The text of the row that is shown, so far."""
        whole, first = self.pace.text, max(self.pace.prompt.input_ids.shape[1] - PROMPT_TAIL, 0)
        mask = whole.attention_mask[self.row].tolist()
        positions = [place for place in range(first, len(mask)) if mask[place]]
        return GenerationText(self.tables, self.row, positions, [whole.tokens[self.row][place] for place in positions])

    def _colored(self) -> tuple[list[str], Levels]:
        return self._text.texts, self._text.levels(self.show, self.layer, self.slot)

    def _write_if_due(self) -> None:
        """Shows the text now and then: drawing takes a tenth of the time at most."""
        began = time.monotonic()
        if began >= self._due:
            self._write()
            self._due = time.monotonic() + max(EVERY, 9 * (time.monotonic() - began))

    def _write(self) -> None:
        """Shows the text as it is now; the selected token stays selected where it is there."""
        self.tables.catch_up()
        self._text = self._read()
        positions, position = self._text.positions, self.selection.get("position")
        self._quietly = True
        try:
            self.tokens.write(*self._colored(), positions=positions, notes=self._text.notes())
            kept = position in positions
            self.selection = {"row": self.row, "position": position} if kept else {}
            self.tokens.selected = positions.index(position) if kept else None
        finally:
            self._quietly = False
        self._describe()
        self._say()

    def _paint(self) -> None:
        self.tokens.color(self._colored()[1], self._text.notes())
        self._describe()

    def _clicked(self) -> None:
        if not self._quietly:
            place = self.tokens.selected
            self.selection = {} if place is None else {"row": self.row, "position": self._text.positions[place]}

    def _select(self) -> None:
        """Shows what was selected, here or from code."""
        if self._quietly:
            return
        if self.selection:
            self.row = self.selection["row"]
        self.tokens.selected = self._text.positions.index(self.selection["position"]) if self.selection else None
        self._describe()

    def _describe(self) -> None:
        position = self.selection.get("position")
        self._below.value = HINT if position is None else self._text.described(position, self.layer)

    def _say(self) -> None:
        going, count = self.state == "running", self.pace.new.shape[1]
        for name, own in self._buttons.items():
            own.disabled = going != (name == "stop") and name != "again"
        self._said.value = f"{self.state}: {count} of {self.pace.limit} tokens"

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], range(self.tables.meta["num_layers"]))

    @traitlets.validate("row")
    def _is_row(self, proposal: Any) -> int:
        return one_of("row", proposal["value"], range(len(self.pace.prompt)))

    @traitlets.validate("slot")
    def _is_slot(self, proposal: Any) -> int:
        return one_of("slot", proposal["value"], range(self.tables.meta["top_k"]))

    @traitlets.validate("selection")
    def _is_token(self, proposal: Any) -> dict[str, Any]:
        wanted = proposal["value"]
        if not wanted:
            return wanted
        mine = wanted.get("row") == self.row
        known = self._text.positions if mine else range(self.pace.text.input_ids.shape[1])
        if wanted.keys() != {"row", "position"} or wanted["position"] not in known:
            raise traitlets.TraitError(f"{wanted} is no token that is shown; one is {{'row': 0, 'position': 5}}.")
        return wanted
