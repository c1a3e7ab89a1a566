"""How alike the experts of a layer are: by what they are chosen for, what they write, or their weights."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.routes.expert_outputs import routed_layers
from llama4lab.run.run import Run
from llama4lab.tables.token_index import at_tokens, tokens_of

Kind = Literal["router", "logits", "activation", "weights"]
LOGITS, INDICES, OUT = (f"feed_forward.{name}" for name in ("router.logits", "router.indices", "experts.out"))


@torch.no_grad()
def similarity(
    source: HookedPreTrainedModel | Run | RoutingStats,
    kind: Kind = "router",
    layers: int | Sequence[int] | None = None,
    model: HookedPreTrainedModel | None = None,
) -> pd.DataFrame:
    """Compares each two experts of a layer by a cosine.

    Args:
        source: The model for "router" and "weights"; a run for "logits" (with `router.logits` recorded) and
            "activation" (`router.indices` and `experts.out`); for "activation" also statistics of a corpus.
        kind: What is compared.
            "router": the rows of the router, which say what an expert is chosen for.
            "logits": the router logits of all tokens, expert by expert, not centred.
            "activation": the mean of what each expert wrote, its gate included.
            "weights": the weights, after the neurons of the one were matched with those of the other: their order is
                arbitrary, and so is the sign of a neuron's `up` and `down` together, which is matched, too. Pairs of
                neurons that are each other's best match are taken, and then those among the rest, until all are; the
                best sum of all would be at least as high. Experts that differ in nothing but order and signs have 1.
        layers: A layer or several; all by default.
        model: The model, for "router" and "weights", if `source` is a run of it.

    Columns:
        layer: layer of the experts.
        expert: an expert.
        other: an expert, maybe the same.
        cosine: their cosine; missing for an expert that has nothing, as one without tokens.

    `attrs` have `kind` and `num_experts`.

    Raises:
        TypeError: if the source has not what is compared.
        KeyError: if it was not recorded.
        ValueError: for another kind, or a layer without experts.
    """
    if model is not None and kind in ("router", "weights"):
        source = model
    needed: dict[str, Any] = {"router": HookedPreTrainedModel, "weights": HookedPreTrainedModel, "logits": Run}
    needed["activation"] = (Run, RoutingStats)
    if kind not in needed:
        raise ValueError(f"kind={kind!r} was asked for; choose from {', '.join(needed)}.")
    if not isinstance(source, needed[kind]):
        wanted = {"logits": "a run", "activation": "a run or statistics of a corpus"}.get(kind, "the model")
        raise TypeError(f"Similarity by {kind} was asked for of a {type(source).__name__}; pass {wanted}.")
    parts = []
    for layer, cosine in _cosines(source, kind, layers).items():
        expert, other = np.indices(cosine.shape).reshape(2, -1)
        columns = {"layer": layer, "expert": expert, "other": other, "cosine": cosine.flatten().numpy()}
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    table.attrs = {"kind": kind, "num_experts": int(table["expert"].to_numpy().max()) + 1}
    return table


def matched_cosine(
    one: Float[Tensor, "part neuron d_model"], other: Float[Tensor, "part neuron d_model"]
) -> Float[Tensor, ""]:
    """Gives the cosine of two experts once their neurons are matched; the parts are gate, up and down."""
    dots = torch.einsum("pnd,pmd->pnm", one, other)
    # Up and down may both change sign: the neuron's output stays what it is.
    inner = dots[0] + (dots[1] + dots[2]).abs()
    sizes, other_sizes = (each.square().sum((0, 2)).sqrt() for each in (one, other))
    score = inner / (sizes[:, None] * other_sizes).clamp(min=torch.finfo(inner.dtype).tiny)
    total, rows, columns = inner.new_zeros(()), torch.arange(len(score)), torch.arange(len(score))
    while len(rows):
        left = score[rows][:, columns]
        best, back = left.argmax(1), left.argmax(0)
        mutual = back[best] == torch.arange(len(rows))
        total += inner[rows[mutual], columns[best[mutual]]].sum()
        kept = torch.ones(len(columns), dtype=torch.bool)
        kept[best[mutual]] = False
        rows, columns = rows[~mutual], columns[kept]
    return total / (sizes.norm() * other_sizes.norm())


def _cosines(
    source: HookedPreTrainedModel | Run | RoutingStats, kind: Kind, layers: int | Sequence[int] | None
) -> dict[int, Float[Tensor, "expert expert"]]:
    """Each kind of cosine, layer by layer."""
    if isinstance(source, HookedPreTrainedModel):
        compared = _of_weights if kind == "weights" else _of_rows
        return {layer: compared(source, layer) for layer in routed_layers(source, layers)}
    if isinstance(source, RoutingStats):
        return {layer: _between(source.writes[source.layers.index(layer)]) for layer in _asked(source.layers, layers)}
    tokens = tokens_of(source)
    recorded = source.layers(LOGITS if kind == "logits" else OUT)
    found = {}
    for layer in _asked(sorted(recorded), layers):
        values = at_tokens(recorded[layer], tokens).double()
        found[layer] = _between(values.T if kind == "logits" else _sums(source, layer, tokens, values))
    return found


def _asked(known: list[int], layers: int | Sequence[int] | None) -> list[int]:
    wanted = known if layers is None else np.atleast_1d(layers).tolist()
    wrong = [layer for layer in wanted if layer not in known]
    if wrong or not wanted:
        raise ValueError(f"Layer {wrong or 'none'} was asked for; the source has {', '.join(map(str, known))}.")
    return sorted(set(wanted))


def _between(rows: Float[Tensor, "expert x"]) -> Float[Tensor, "expert expert"]:
    """Cosines of rows; NaN for a row of zeros."""
    sizes = rows.norm(dim=-1, keepdim=True)
    units = rows / torch.where(sizes > 0, sizes, torch.nan)
    return (units @ units.T).clamp(-1, 1)


def _sums(
    run: Run, layer: int, tokens: pd.DataFrame, writes: Float[Tensor, "token slot d_model"]
) -> Float[Tensor, "expert d_model"]:
    """The sum of what each expert wrote."""
    chosen = at_tokens(run[f"layers.{layer}.{INDICES}"], tokens).long()
    sums = torch.zeros(run.meta["num_experts"], writes.shape[-1], dtype=writes.dtype)
    return sums.index_add_(0, chosen.flatten(), writes.flatten(0, 1))


def _of_rows(model: HookedPreTrainedModel, layer: int) -> Float[Tensor, "expert expert"]:
    router = cast(MixtureOfExperts, model.text.layers[layer].feed_forward).router
    with align_module_device(router):
        return _between(router.weight.detach().double().cpu())


def _of_weights(model: HookedPreTrainedModel, layer: int) -> Float[Tensor, "expert expert"]:
    experts = cast(MixtureOfExperts, model.text.layers[layer].feed_forward).experts
    with align_module_device(experts):
        first, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        count = len(down)
        cosine = torch.ones(count, count, dtype=torch.float64)

        def parts(expert: int) -> Tensor:
            gate, up = first[expert].float().T.chunk(2)
            return torch.stack([gate, up, down[expert].float()])

        for expert in range(count):
            one = parts(expert)
            for other in range(expert):
                cosine[expert, other] = cosine[other, expert] = matched_cosine(one, parts(other)).double().cpu()
    return cosine
