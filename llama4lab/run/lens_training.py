"""Fitting the translators of a tuned lens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.examples import runs_over, token_values
from llama4lab.run.residual_stream import LAST
from llama4lab.run.size import free_nbytes
from llama4lab.run.unembedding import Unembedding

TOKENS = 128  # of one step
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Course:
    """How a training goes: its steps, its seed, its rate at the start, and whether it shows a bar."""

    steps: int
    seed: int
    rate: float
    progress: bool


class Translator:
    """An affine map, kept as its distance from the identity.

    The shift is in units of the root mean square of the vectors that it is for, so that one rate suits all places.
    """

    def __init__(self, x: Float[Tensor, "token d_model"], device: torch.device):
        d_model = x.shape[1]
        self.rms = float(x.float().pow(2).mean().sqrt())
        self.matrix = torch.zeros(d_model, d_model, device=device, requires_grad=True)
        self.shift = torch.zeros(d_model, device=device, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.matrix, self.shift]

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return x + x @ self.matrix + self.rms * self.shift


def gathered(
    model: HookedPreTrainedModel, examples: Any, places: list[str]
) -> dict[str, Float[Tensor, "token d_model"]]:
    """The vectors of every token of the examples at some places and, last, at the final norm; kept on the CPU.

    Raises:
        MemoryError: if they do not fit.
    """
    kept: dict[str, list[Tensor]] = {place: [] for place in [*places, LAST]}
    for run in runs_over(model, examples, list(kept)):
        values = {place: token_values(run, place) for place in kept}
        need, free = sum(tensor.nbytes for tensor in values.values()), free_nbytes(torch.device("cpu"))
        if 2 * need > free:
            raise MemoryError(
                f"The vectors of {len(kept)} hook points no longer fit: {free / 2**30:.1f} GiB are free.\n"
                'Fit with fewer prompts, or at fewer hook points, for example at="layers.*.resid_post".'
            )
        for place, tensor in values.items():
            kept[place].append(tensor.cpu())
    return {place: torch.cat(parts) for place, parts in kept.items()}


def trained(
    unembedding: Unembedding, values: dict[str, Float[Tensor, "token d_model"]], course: Course
) -> dict[str, Translator]:
    """Fits a translator for each place: what the lens predicts through it comes near to what the model predicts.

    Args:
        unembedding: The way to the logits.
        values: As `gathered` gives them.
        course: Of the training.
    """
    count, device = len(values[LAST]), unembedding.device
    translators = {place: Translator(x, device) for place, x in values.items() if place != LAST}
    trainable = [parameter for each in translators.values() for parameter in each.parameters]
    optimizer = torch.optim.AdamW(trainable, lr=course.rate, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(course.seed)
    for step in tqdm(range(course.steps), desc="tuned lens", unit="step", disable=not course.progress):
        optimizer.param_groups[0]["lr"] = course.rate * (1 - step / course.steps)
        tokens = torch.randperm(count, generator=generator)[:TOKENS]
        with torch.enable_grad():
            for places, losses in divergences(unembedding, values, tokens, translators):
                # Only of the translators: nothing of the model gets a gradient.
                own = [parameter for place in places for parameter in translators[place].parameters]
                for parameter, slope in zip(own, torch.autograd.grad(losses.sum(), own), strict=True):
                    parameter.grad = slope
        optimizer.step()
    return translators


def divergences(
    unembedding: Unembedding,
    values: dict[str, Float[Tensor, "token d_model"]],
    tokens: Int[Tensor, " n"],
    translators: dict[str, Translator] | None = None,
) -> Iterator[tuple[list[str], Float[Tensor, " place"]]]:
    """The mean divergence from the model's prediction to that of the lens, in nats, for a few places at a time.

    Args:
        unembedding: The way to the logits.
        values: As `gathered` gives them.
        tokens: The tokens of the mean.
        translators: What is applied first; nothing by default, which is the logit lens.
    """
    with torch.no_grad():
        target = unembedding.logits(values[LAST][tokens], normed=True).log_softmax(-1)
    places = [place for place in values if place != LAST]
    size = max(1, unembedding.rows_at_a_time // len(tokens))
    for first in range(0, len(places), size):
        some = places[first : first + size]
        x = {place: values[place][tokens].to(target.device, torch.float32) for place in some}
        moved = [x[place] if translators is None else translators[place](x[place]) for place in some]
        log_prob = unembedding.logits(torch.cat(moved)).log_softmax(-1).unflatten(0, (len(some), len(tokens)))
        yield some, (target.exp() * (target - log_prob)).sum(-1).mean(-1)
