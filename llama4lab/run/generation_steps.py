"""What is kept of a generation while it goes on, one step for each new token."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.generated_prompt import Ending, extended
from llama4lab.run.listening import Listener, listening, silent
from llama4lab.run.run import Run


@dataclass(eq=False)
class GenerationSteps:
    """The tensors of all steps so far.

    Attributes:
        model: The model.
        prompt: What it goes on from.
        kept: Hook points whose tensors stay -> the tensor of each pass.
        passing: Hook points whose tensors are there for one step only, from the second step on.
        to: Where tensors are kept; None for where they are.
        ending: What ends a row.
    """

    model: HookedPreTrainedModel
    prompt: Prompt
    kept: dict[str, list[Tensor]]
    passing: list[str]
    to: str | torch.device | None
    ending: Ending
    logits: list[Tensor] = field(default_factory=list)
    newest: dict[str, Tensor] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)
    _hooks: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watches the model as long as the block runs."""
        try:
            self._attach()
            yield
        finally:
            self._detach()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leaves the model without a hook of the recording as long as the block runs."""
        self._detach()
        try:
            yield
        finally:
            self._attach()

    def take(self, ids: Int[Tensor, "batch total"]) -> "Step":
        """Ends a step: the tokens with the new one."""
        tensors, self.newest = self.newest, {}
        self.logits.append(tensors["logits"])
        return Step(self, len(self.logits) - 1, ids.cpu(), tensors)

    def run(self, ids: Int[Tensor, "batch total"]) -> Run:
        """The steps so far as one run.

        Args:
            ids: The tokens so far, with those of the prompt.
        """
        old, points = self.prompt.input_ids.shape[1], self.model.hook_points()
        whole = extended(self.model, self.prompt, ids[:, old : old + len(self.logits)].cpu(), self.ending)
        shapes = {name: points[name] for name in self.kept}
        tensors = {name: joined(steps, shapes[name].split(), name) for name, steps in self.kept.items()}
        positions = list(range(whole.input_ids.shape[1] - 1))
        meta = facts(self.model.config, self.model.text) | {"generated_from": old}
        logits, chosen_from = torch.cat(self.logits, dim=1), positions[old - 1 :]
        return Run(tensors, shapes, logits, whole, meta, positions=positions, logit_positions=chosen_from)

    def check(self) -> None:
        """Complains about hook points that never fired."""
        late = self.passing if len(self.logits) > 1 else []
        silent([*self.kept, *late], self.fired, images=self.prompt.pixel_values is not None)

    def _attach(self) -> None:
        names = [*self.kept, "logits", *(self.passing if self.logits else [])]
        listeners = {name: self._listener(name) for name in dict.fromkeys(names)}
        self._hooks.enter_context(self._noting(listeners))

    def _detach(self) -> None:
        self._hooks.close()

    @contextmanager
    def _noting(self, listeners: Mapping[str, Listener]) -> Iterator[None]:
        with listening(self.model, listeners) as fired:
            try:
                yield
            finally:
                self.fired |= fired

    def _listener(self, name: str) -> Listener:
        def keep(tensor: Tensor) -> None:
            # Only the last position of the prompt chooses a token, and of a prompt in pieces only the last piece.
            tensor = tensor[:, -1:] if name == "logits" else tensor
            self.newest[name] = tensor if self.to is None else tensor.to(self.to)
            if name in self.kept:
                self.kept[name].append(self.newest[name])

        return keep


@dataclass(eq=False)
class Step:
    """One new token in each row.

    Attributes:
        steps: All steps so far.
        number: Which step it is, from 0. The first reads the prompt, every other the token chosen before it.
        ids: All tokens, with those of the prompt; the last ones are new.
        tensors: Hook point -> what it gave in the step (of the last piece, where the prompt is read in pieces).
    """

    steps: GenerationSteps
    number: int
    ids: Int[Tensor, "batch total"]
    tensors: dict[str, Tensor]

    @property
    def logits(self) -> Float[Tensor, "batch vocab"]:
        """The model's logits from which the new tokens were chosen, before any processing by sampling options."""
        return self.steps.logits[self.number][:, -1]

    @property
    def tokens(self) -> Int[Tensor, " batch"]:
        """The new tokens."""
        return self.ids[:, -1]

    def run(self) -> Run:
        """All steps so far as one run, as `generate` gives it at the end."""
        return self.steps.run(self.ids)

    def away(self) -> Any:
        """A block during which no hook of the recording is on the model, as for a pass of something else."""
        return self.steps.away()


def joined(steps: list[Tensor], words: list[str], name: str) -> Tensor:
    """Joins the tensors of all passes; those of scores and patterns on a common axis of keys.

    Args:
        steps: A tensor for each pass.
        words: Its axes.
        name: Its hook point.
    """
    if "query" in words and words[0] == "batch":
        total, seen, fill = sum(step.shape[2] for step in steps), 0, -torch.inf if name.endswith(".scores") else 0.0
        aligned = []
        for step in steps:
            seen += step.shape[2]
            first = max(seen - step.shape[3], 0)
            step = step[..., :seen]
            aligned.append(torch.nn.functional.pad(step, (first, total - first - step.shape[3]), value=fill))
        return torch.cat(aligned, dim=2)
    return torch.cat(steps, dim=words.index("seq")) if "seq" in words else steps[0]
