"""A generation that goes on token by token, or in one go, with tables that grow with it."""

from collections.abc import Callable
from typing import Any

import torch

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.generated_prompt import extended
from llama4lab.run.generation import generate
from llama4lab.run.generation_steps import Step
from llama4lab.run.listening import is_hooked
from llama4lab.tables.generation_growth import GrowingTables
from llama4lab.widgets.turns import Turns


class GenerationPace:
    """What a view of a generation asks to go on.

    Attributes:
        prompt: The prompt.
        tables: The tables so far.
        new: The tokens so far.
        limit: How many tokens there can be.
    """

    def __init__(
        self, model: HookedPreTrainedModel, prompt: Prompt, *, seed: int | None, tail: int, options: dict[str, Any]
    ) -> None:
        """Makes a generation that has not begun.

        Args:
            model: The model.
            prompt: The prompt.
            seed: Of the random numbers; None to go on with those that are.
            tail: How many tokens of the prompt the tables keep decisions of.
            options: For `generate`, with `max_new_tokens`.
        """
        self.model, self.prompt, self.limit = model, prompt, int(options["max_new_tokens"])
        self._seed, self._tail, self._options = seed, tail, options
        self._turns: Turns | None = None
        self.forget()

    @property
    def ended(self) -> bool:
        """Whether nothing is there to go on with."""
        return self._turns is None or self._turns.ended

    @property
    def text(self) -> Prompt:
        """The prompt with what was generated."""
        if self._step is None:
            return self.prompt
        return extended(self.model, self.prompt, self.new, self._step.steps.ending)

    def forget(self) -> None:
        """Goes back to the start; the cache of what was generated is freed."""
        turns, self._turns = getattr(self, "_turns", None), None
        self._step: Step | None = None
        self.new = torch.zeros(len(self.prompt), 0, dtype=torch.long)
        self.tables = GrowingTables(self.model, prompt_tail=self._tail)
        if turns is not None and not turns.ended:
            turns.turn()  # it finds its tables gone, and ends without another pass

    def begin(self) -> None:
        """Makes sure that there is something to go on with.

        Raises:
            ValueError: if somebody listens to the model or edits it.
        """
        if is_hooked(self.model):
            raise ValueError(
                "Somebody listens to the model or edits it, which may last no longer than this cell.\n"
                "Call view.generate(), which waits until all is written."
            )
        if self.ended:
            self.forget()
            self._turns = Turns(lambda rest: self._write(lambda step: _rest(step, rest)))

    def turn(self) -> bool:
        """Generates one token. Gives whether there may be more."""
        assert self._turns is not None
        return self._turns.turn() and (not self._complete() or self._turns.turn())

    def whole(self, each_token: Callable[[], None]) -> None:
        """Generates all from the start.

        Args:
            each_token: Called after every token.
        """
        self.forget()
        with torch.random.fork_rng(enabled=self._seed is not None):
            self._write(lambda _: each_token())

    def _write(self, after: Callable[[Step], None]) -> None:
        own, old = self.tables, self.prompt.input_ids.shape[1]

        def each_step(step: Step) -> bool:
            own.add(step)
            self._step, self.new = step, step.ids[:, old:]
            after(step)
            return self.tables is not own

        if self._seed is not None:
            torch.manual_seed(self._seed)
        asked = {**self._options, "at": own.at, "passing": own.passing, "each_step": each_step}
        generate(self.model, self.prompt, **asked)

    def _complete(self) -> bool:
        """Whether no further token will come."""
        if self._step is None:
            return False
        ends = torch.isin(self.new, torch.tensor(self._step.steps.ending.tokens, dtype=torch.long))
        return self.new.shape[1] >= self.limit or bool(ends.any(1).all())


def _rest(step: Step, rest: Callable[[], None]) -> None:
    """Rests with no hook on the model."""
    with step.away():
        rest()
