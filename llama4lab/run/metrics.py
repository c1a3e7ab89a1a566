"""Metrics: one number for each row of a batch, from the logits of the model.

A metric is made without a model (`logit_diff(" Mary", " John")`); the prompt that it is evaluated on gives the ids of
its tokens. Every call of llama4lab that takes a metric also takes any function of the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.prompt.prompt import Prompt
from llama4lab.run.run import Run

Token = str | int
Tokens = Token | Sequence[Token]
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BoundMetric:
    """A metric that knows the prompt.

    Attributes:
        name: What tables and plots call it.
        positions: The positions of the prompt whose logits it reads.
        score: Logits `[n, position, vocab]` of n rows and the numbers `[n]` of these rows in the prompt -> `[n]`.
        by_row: Whether the value of a row depends on that row alone, so that rows may come in any number and order.
    """

    name: str
    positions: list[int]
    score: Score
    by_row: bool = True

    def __call__(self, logits: Float[Tensor, "n position vocab"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The value of each row; NaN is an error.

        Raises:
            ValueError: if the metric gives NaN or a wrong shape.
        """
        values = self.score(logits, rows.to(logits.device))
        if values.ndim == 0:
            values = values.expand(len(rows))
        if values.shape != rows.shape:
            raise ValueError(
                f"The metric {self.name} gave shape {list(values.shape)} for {len(rows)} rows.\n"
                "Give one number for each row, or one for all."
            )
        if bool(values.isnan().any()):
            raise ValueError(f"The metric {self.name} is NaN for {int(values.isnan().sum())} of {len(rows)} rows.")
        return values

    def over_batches(
        self, logits: Float[Tensor, "n position vocab"], rows: Int[Tensor, " n"], batch: int
    ) -> Float[Tensor, " n"]:
        """The value of each row of one or more copies of the prompt, `batch` rows each, one copy after the other."""
        if not len(rows):  # a function of the logits may not know what to make of none
            return logits.new_zeros(0)
        if self.by_row:
            return self(logits, rows)
        copies = zip(logits.split(batch), rows.split(batch), strict=True)
        return torch.cat([self(some, own) for some, own in copies])


@dataclass(frozen=True)
class Metric:
    """A metric before it knows the prompt.

    Attributes:
        name: What tables and plots call it.
        position: The position whose next token it is about; -1 is the last one. None for all positions.
        make: Prompt -> score, as in `BoundMetric`.
        by_row: As in `BoundMetric`.
    """

    name: str
    position: int | None
    make: Callable[[Prompt], Score]
    by_row: bool = True

    def bound(self, prompt: Prompt) -> BoundMetric:
        """The metric for a prompt.

        Raises:
            IndexError: if the prompt has no such position, or padding is there.
            ValueError: if a token is not one token, or there are not as many tokens as rows.
        """
        length = prompt.input_ids.shape[1]
        if self.position is None:
            return BoundMetric(self.name, list(range(length)), self.make(prompt), self.by_row)
        if not -length <= self.position < length:
            raise IndexError(f"{self.name} is about position {self.position}; the prompt has {length} positions.")
        position = self.position % length
        padded = [row for row in range(len(prompt)) if not prompt.attention_mask[row, position]]
        if padded:
            raise IndexError(f"{self.name} is about position {position}, which is padding in row {padded[0]}.")
        return BoundMetric(self.name, [position], self.make(prompt), self.by_row)


def as_metric(metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
    """Lets a function of the logits `[row, seq, vocab]` of the whole batch stand for a metric.

    The function gives one number for each row, or one for the batch.
    """
    if isinstance(metric, Metric):
        return metric
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name, None, lambda _: lambda logits, _: metric(logits), by_row=False)


def evaluated(metric: Metric | Callable[[Tensor], Tensor], run: Run) -> Float[Tensor, " row"]:
    """The value of a metric for each row of a run; differentiable where the run was recorded with `grad=True`.

    Raises:
        IndexError: if the run has no logits of the position that the metric reads.
    """
    bound = as_metric(metric).bound(run.prompt)
    missing = sorted(set(bound.positions) - set(run.logit_positions))
    if missing:
        raise IndexError(f"{bound.name} reads the logits of position {missing[0]}, which the run does not have.")
    columns = [run.logit_positions.index(position) for position in bound.positions]
    return bound(run.logits[:, columns], torch.tensor(run.rows, dtype=torch.long))


def logit_diff(right: Tokens, wrong: Tokens, *, position: int = -1) -> Metric:
    """The logit of one token minus that of another.

    Args:
        right: Token (text or id), or one for each row.
        wrong: The same.
        position: The position whose next token it is.
    """

    def make(prompt: Prompt) -> Score:
        first, second = _ids(right, prompt), _ids(wrong, prompt)
        return lambda logits, rows: _at(logits, first[rows.cpu()]) - _at(logits, second[rows.cpu()])

    return Metric("logit difference", position, make)


def log_prob(token: Tokens, *, position: int = -1) -> Metric:
    """The logarithm (base e) of the probability of a token (one, or one for each row) as the next one."""

    def make(prompt: Prompt) -> Score:
        ids = _ids(token, prompt)
        return lambda logits, rows: _at(logits.float().log_softmax(-1), ids[rows.cpu()])

    return Metric("log probability", position, make)


def prob(token: Tokens, *, position: int = -1) -> Metric:
    """The probability of a token (one, or one for each row) as the next one."""

    def make(prompt: Prompt) -> Score:
        ids = _ids(token, prompt)
        return lambda logits, rows: _at(logits.float().softmax(-1), ids[rows.cpu()])

    return Metric("probability", position, make)


def rank(token: Tokens, *, position: int = -1) -> Metric:
    """How many tokens are more probable than a token (one, or one for each row); 0 for the most probable."""

    def make(prompt: Prompt) -> Score:
        ids = _ids(token, prompt)
        return lambda logits, rows: (logits[:, 0] > _at(logits, ids[rows.cpu()])[:, None]).sum(-1).to(logits.dtype)

    return Metric("rank", position, make)


def kl_to(run: Run, *, position: int = -1) -> Metric:
    """The Kullback-Leibler divergence, in nats, from the next-token distribution of a run to that of the model.

    It is the sum of p (log p - log q), with p that of the run, row by row at the same position.

    Args:
        run: The run to compare with, of as many rows.
        position: The position whose next token it is.
    """

    def make(prompt: Prompt) -> Score:
        place = run.logit_positions[position] if position < 0 else position
        if len(run.rows) != len(prompt) or place not in run.logit_positions:
            raise ValueError(
                f"kl_to has a run of {len(run.rows)} rows with logits of positions {run.logit_positions}; the prompt "
                f"has {len(prompt)} rows, and position {position} is asked for."
            )
        reference = run.logits[:, run.logit_positions.index(place)].detach().float().log_softmax(-1).cpu()

        def score(logits: Tensor, rows: Tensor) -> Tensor:
            target = reference[rows.cpu()].to(logits.device)
            return (target.exp() * (target - logits[:, 0].float().log_softmax(-1))).sum(-1)

        return score

    return Metric("KL divergence", position, make)


def loss() -> Metric:
    """The mean cross entropy, in nats, of every token of a row given those before it; padding is left out."""

    def make(prompt: Prompt) -> Score:
        ids, mask = prompt.input_ids.cpu(), prompt.attention_mask.cpu().bool()
        counted = mask[:, 1:] & mask[:, :-1]

        def score(logits: Tensor, rows: Tensor) -> Tensor:
            targets, kept = ids[rows.cpu(), 1:].to(logits.device), counted[rows.cpu()].to(logits.device)
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
            return -(log_probs * kept).sum(-1) / kept.sum(-1)

        return score

    return Metric("loss", None, make)


def _at(logits: Float[Tensor, "n 1 vocab"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return logits[:, 0].gather(-1, ids.to(logits.device)[:, None]).squeeze(-1)


def _ids(tokens: Tokens, prompt: Prompt) -> Int[Tensor, " row"]:
    """The id of the token for each row of a prompt."""
    each = [tokens] * len(prompt) if isinstance(tokens, str | int) else list(tokens)
    if len(each) != len(prompt):
        raise ValueError(f"The metric has {len(each)} tokens, but the prompt has {len(prompt)} rows.")
    return torch.tensor([prompt.token_id(token) if isinstance(token, str) else token for token in each])
