"""The tuned lens: what a layer already knows, read in the layer's own terms.

The logit lens reads a vector of an early layer as if it stood at the end of the model. Early layers write in other
terms, so it often sees nothing where there is something. The tuned lens first moves the vector by an affine map, one
for each place, which was fitted so that the prediction comes near to the model's own (Belrose et al. 2023,
arXiv 2303.08112). It shows what can be read off linearly, not what the model itself reads.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.lens_training import Course, Translator, divergences, gathered, trained
from llama4lab.run.residual_stream import LAST, RESIDUAL, kind_of, place_of
from llama4lab.run.selection import Selector, selected
from llama4lab.run.tensor_file import read_tensors, write_tensors
from llama4lab.run.unembedding import Unembedding

FORMAT = "llama4lab.tuned_lens/1"
JUDGED = 1024  # tokens of the examples that `facts` tells the divergence of
RATE = 0.5  # divided by the width, for a step changes a vector by as many numbers


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """An affine map for each place of the residual stream; at the end of the model it is the identity.

    Where one layer ends the next begins, so `layers.3.resid_post` and `layers.4.resid_pre` have one map.

    Attributes:
        matrices: Place -> what is added to a vector is the vector times this matrix, plus
        shifts: place -> this shift.
        facts: How it was fitted, as plain data: `num_layers`, `tokens`, `steps`, `seed`, `learning_rate`, and for each
            place the mean divergence from the model on tokens of the examples, in nats: `before` and `after` the fit.
    """

    matrices: dict[str, Float[Tensor, "d_model d_model"]]
    shifts: dict[str, Float[Tensor, " d_model"]]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        model: HookedPreTrainedModel,
        examples: Any,
        *,
        at: Selector = ("layers.*.resid_mid", "layers.*.resid_post"),
        steps: int = 250,
        seed: int = 0,
        learning_rate: float | None = None,
        progress: bool = True,
    ) -> "TunedLens":
        """Fits a lens to a model on the tokens of some examples; no label is needed. The model stays as it is.

        Each step lowers the Kullback-Leibler divergence from the model's prediction to the lens's on 128 tokens. Use
        as many tokens as the model is wide, or more.

        Args:
            model: The model.
            examples: A `Prompt`, a `Run`, a list of either, or anything that `model.prompt` takes.
            at: Hook points of the residual stream; the embeddings have a map where they are asked for.
            steps: Steps of AdamW, at a rate that falls to zero.
            seed: Of the choice of tokens.
            learning_rate: The rate at the start; by default 0.5 divided by the width of the model.
            progress: Whether to show a bar.

        Raises:
            ValueError: if a hook point is not in the residual stream, or `steps` or `learning_rate` is not above 0.
            MemoryError: if the vectors of the examples do not fit into memory.
        """
        if steps < 1 or (learning_rate is not None and not learning_rate > 0):
            raise ValueError(f"steps={steps} and learning_rate={learning_rate} were asked for; both are above 0.")
        num_layers = facts(model.config)["num_layers"]
        places = _places(model, at, num_layers)
        rate = RATE / facts(model.config)["d_model"] if learning_rate is None else learning_rate
        unembedding, values = Unembedding(model), gathered(model, examples, places)
        translators = trained(unembedding, values, Course(steps, seed, rate, progress))
        judged = torch.randperm(len(values[LAST]), generator=torch.Generator().manual_seed(seed))[:JUDGED]
        known = {"num_layers": num_layers, "tokens": len(values[LAST]), "steps": steps, "seed": seed}
        known["learning_rate"] = rate
        for name, each in (("before", None), ("after", translators)):
            known[name] = _mean_divergences(unembedding, values, judged, each)
        matrices = {place: each.matrix.detach().cpu() for place, each in translators.items()}
        shifts = {place: (each.rms * each.shift).detach().cpu() for place, each in translators.items()}
        return cls(matrices, shifts, known)

    def __contains__(self, name: str) -> bool:
        """Whether the lens can read a hook point."""
        place = place_of(name, self.facts["num_layers"])
        return place == LAST or place in self.matrices

    def translated(self, name: str, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """Vectors of a hook point as they would stand at the end of the model.

        Args:
            name: The hook point.
            x: Its vectors.

        Raises:
            KeyError: if the lens was not fitted there.
            ValueError: if the vectors have another width.
        """
        place = place_of(name, self.facts["num_layers"])
        if place == LAST:
            return x
        if place not in self.matrices:
            has = ", ".join(list(self.matrices)[:4]) + ", ..." * (len(self.matrices) > 4)
            raise KeyError(f"The lens was not fitted at {name!r}, only at {has}. Choose by at=, or fit it there.")
        matrix, shift = (tensors[place].to(x.device) for tensors in (self.matrices, self.shifts))
        if x.shape[-1] != len(shift):
            raise ValueError(f"The lens is for vectors of {len(shift)} numbers; those of {name} have {x.shape[-1]}.")
        wide = x.float()
        return wide + wide @ matrix + shift

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file; a file that is there already is replaced only when all is written."""
        metadata = {"order": json.dumps(list(self.matrices)), "facts": json.dumps(self.facts)}
        tensors = {f"{place}.matrix": matrix for place, matrix in self.matrices.items()}
        tensors |= {f"{place}.shift": shift for place, shift in self.shifts.items()}
        write_tensors(path, FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "TunedLens":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is no tuned lens.
        """
        tensors, metadata = read_tensors(path, FORMAT)
        places = json.loads(metadata["order"])
        matrices = {place: tensors[f"{place}.matrix"] for place in places}
        shifts = {place: tensors[f"{place}.shift"] for place in places}
        return cls(matrices, shifts, json.loads(metadata["facts"]))

    def __repr__(self) -> str:
        known = {name: self.facts[name] for name in ("tokens", "steps", "seed") if name in self.facts}
        head = (
            f"TunedLens: {len(self.matrices)} places, {', '.join(f'{value} {name}' for name, value in known.items())}"
        )
        before, after = self.facts.get("before", {}), self.facts.get("after", {})
        lines = [f"  {place:<22} {before[place]:6.3f} -> {after[place]:6.3f} nats" for place in after]
        return "\n".join([head, *lines])


def _places(model: HookedPreTrainedModel, at: Selector, num_layers: int) -> list[str]:
    """The places that hook points mean, each once, without the end of the model."""
    names = selected(model.hook_points(), at)
    outside = [name for name in names if kind_of(name) is None]
    if outside:
        raise ValueError(
            f"A lens was to be fitted at {outside[0]}, which is not in the residual stream.\n"
            f"Hook points of the residual stream: {', '.join(RESIDUAL)}."
        )
    places = [place for place in dict.fromkeys(place_of(name, num_layers) for name in names) if place != LAST]
    if not places:
        raise ValueError(f"{names[0]} is only the end of the model, where every lens is the identity.")
    return places


@torch.no_grad()
def _mean_divergences(
    unembedding: Unembedding,
    values: dict[str, Float[Tensor, "token d_model"]],
    tokens: Tensor,
    translators: dict[str, Translator] | None,
) -> dict[str, float]:
    parts = divergences(unembedding, values, tokens, translators)
    return {place: loss for places, losses in parts for place, loss in zip(places, losses.tolist(), strict=True)}
