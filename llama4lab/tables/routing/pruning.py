"""Which experts matter: what happens without them, beside the scores by which experts are pruned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.alternatives import Given, Running, cell_outcomes
from llama4lab.run.metrics import Metric, loss
from llama4lab.run.recording import as_prompt, record
from llama4lab.run.routes.expert_outputs import ROUTED, WriteSums, expert_outputs, routed_layers
from llama4lab.tables.routing.counterfactuals import about

ABLATIONS = ("zero", "mean", "runner_up", "shared_only")
SCORES = ("frequency", "reap", "ean_sum", "ean_mean")


def importance(
    model: HookedPreTrainedModel,
    prompts: Any,
    *,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    layers: int | Sequence[int] | None = None,
    ablations: Sequence[str] = ABLATIONS,
    **options: Unpack[Running],
) -> pd.DataFrame:
    """Takes every expert away from all the tokens that it serves, one expert at a time, and measures what follows.

    Beside it stand scores that cost no ablation. Llama 4 multiplies the input of an expert by the gate, so the score of
    REAP, gate times norm of the output, is here the norm of what the expert writes, |f(gate x)|.

    Args:
        model: The model.
        prompts: A `Prompt`, anything that `model.prompt` takes, or a list of prompts, which are run one by one, each
            with all its rows.
        metric: One of `lab.metrics`, or a function of the logits. By default `lab.metrics.loss()`.
        layers: A layer with experts, several, or None for all.
        ablations: What becomes of the expert's tokens, out of
            "zero": it writes nothing;
            "mean": it writes the mean of what it writes over all its tokens of all prompts;
            "runner_up": they go to their best expert not chosen, with the gate of that one;
            "shared_only": no routed expert writes to them. For one expert a token the same as "zero".
        options: `memory` and `progress`: as in `lab.sweep`, without a bar by default.

    Columns:
        layer, expert: the expert; also those without a token.
        tokens: how many tokens it served; padding is never counted.
        frequency: their share of all tokens. In a layer, the sum is the number of experts a token is sent to.
        zero, mean, runner_up, shared_only: (those that are asked for) how the metric changes, as a mean over the rows
            of all prompts. Rows in which the expert serves no token count, with 0.
        reap: mean of |f(gate x)| over its tokens, missing without any.
        ean_sum, ean_mean: sum and mean of |f(x)| over its tokens, the expert fed without a gate.

    `attrs` has `metric`, `lower_is_better`, `num_experts`, `base` (the mean of the metric as it is) and `rows`.

    Raises:
        ValueError: if a layer is dense, an ablation is unknown, or there is no runner-up because every token has all
            experts.
    """
    metric, chosen = loss() if metric is None else metric, _checked(model, ablations)
    batches, config = _batches(model, prompts), model.text.config
    sums = {each: WriteSums(config.num_local_experts, config.hidden_size) for each in routed_layers(model, layers)}
    routes = [_measured(model, prompt, sums) for prompt in batches]
    means = [own.mean_write() for own in sums.values()]
    # Of one expert a token, nothing is left but the shared one.
    same = config.num_experts_per_tok == 1 and {"zero", "shared_only"} <= set(chosen)
    run = [kind for kind in chosen if not (same and kind == "shared_only")]
    changes, base = np.zeros((len(sums) * config.num_local_experts, len(run))), np.zeros(0)
    for prompt, route in zip(batches, routes, strict=True):
        given, keys = _given(route, means, run)
        found = cell_outcomes(model, prompt, given, len(keys), metric, **options)
        changes.reshape(-1)[keys] += (found.value - found.base.value).double().sum(1).numpy()
        base = np.append(base, found.base.value.double().numpy())
    effects = dict(zip(run, (changes / len(base)).T, strict=True))
    table = pd.concat([_score_columns(layer, own) for layer, own in sums.items()], ignore_index=True)
    for kind in chosen:
        table[kind] = effects[kind] if kind in effects else effects["zero"]
    table = table.reindex(columns=["layer", "expert", "tokens", "frequency", *chosen, "reap", "ean_sum", "ean_mean"])
    table.attrs |= {
        **about(metric),
        "num_experts": config.num_local_experts,
        "base": float(base.mean()),
        "rows": len(base),
    }
    return table


def rank_correlation(table: pd.DataFrame, *, signed: bool = False, within_layers: bool = False) -> pd.DataFrame:
    """Gives Spearman's rank correlation of every two measures of importance, over the experts that serve any token.

    Args:
        table: Made by `importance`, possibly filtered.
        signed: Whether effects keep their sign. By default their size counts, whichever way the metric moves: scores
            are sizes, too.
        within_layers: Whether experts are ranked in their layer only. By default all are ranked together, so that
            measures agree, too, if they find the same layers important.

    Returns:
        Measures x measures: the ablations of the table, then frequency, reap, ean_sum and ean_mean. A measure that is
        the same for all experts correlates with nothing, and is missing.

    Raises:
        ValueError: if fewer than two experts serve a token.
    """
    effects = [name for name in ABLATIONS if name in table]
    measures = table.loc[table["tokens"] > 0].reindex(columns=["layer", *effects, *SCORES])
    if len(measures) < 2:
        raise ValueError(f"{len(measures)} experts of the table serve a token; a correlation takes two or more.")
    layer = measures.pop("layer")
    if not signed:
        measures[effects] = measures[effects].abs()
    if not within_layers:
        return measures.rank().corr()
    ranks = measures.groupby(layer).rank()
    return (ranks - ranks.groupby(layer).transform("mean")).corr()


@dataclass(frozen=True, eq=False)
class _Route:
    """The tokens of a prompt in a layer: where they are, their experts, and the best one not chosen."""

    layer: int
    row: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    experts: Int[np.ndarray, "token slot"]
    runner_up: Int[np.ndarray, " token"]


def _checked(model: HookedPreTrainedModel, ablations: Sequence[str]) -> list[str]:
    chosen = [ablations] if isinstance(ablations, str) else list(dict.fromkeys(ablations))
    unknown = [name for name in chosen if name not in ABLATIONS]
    if unknown:
        raise ValueError(f"ablations has {unknown[0]!r}. Choose from {', '.join(ABLATIONS)}.")
    config = model.text.config
    if "runner_up" in chosen and config.num_experts_per_tok >= config.num_local_experts:
        raise ValueError("In this model every token has all experts: there is no runner-up. Leave out that ablation.")
    return chosen


def _batches(model: HookedPreTrainedModel, prompts: Any) -> list[Prompt]:
    several = isinstance(prompts, list | tuple) and any(isinstance(prompt, Prompt) for prompt in prompts)
    return [as_prompt(model, prompt) for prompt in (prompts if several else [prompts])]


@torch.no_grad()
def _measured(model: HookedPreTrainedModel, prompt: Prompt, sums: dict[int, WriteSums]) -> list[_Route]:
    """Runs a prompt, adds to the sums, and gives the routes of each layer."""
    parts = ("router.logits", "router.indices", "experts.out")
    names = [ROUTED.format(layer) + part for layer in sums for part in parts]
    run = record(model, prompt, at=[*names, *(f"layers.{layer}.resid_mid" for layer in sums)])
    mask = prompt.attention_mask.cpu().bool()
    row, position = (axis.numpy() for axis in mask.nonzero(as_tuple=True))
    routes = []
    for layer, own in sums.items():
        name = ROUTED.format(layer)
        experts = run[name + "router.indices"].cpu()[mask]
        plain = expert_outputs(model, run, layer, torch.ones(*mask.shape, experts.shape[1]))
        writes, plain = (tensor.cpu()[mask].double() for tensor in (run[name + "experts.out"], plain))
        own.add(experts, writes, plain)
        runner_up = run[name + "router.logits"].cpu()[mask].scatter(1, experts, -torch.inf).argmax(1)
        routes.append(_Route(layer, row, position, experts.numpy(), runner_up.numpy()))
    return routes


def _score_columns(layer: int, sums: WriteSums) -> pd.DataFrame:
    """The columns of `importance` that need no ablation."""
    served = np.where(sums.tokens > 0, sums.tokens, np.nan)
    columns = {
        "layer": layer,
        "expert": np.arange(len(sums.tokens)),
        "tokens": sums.tokens,
        "frequency": sums.tokens / sums.seen,
        "reap": sums.norms / served,
        "ean_sum": sums.plain_norms,
        "ean_mean": sums.plain_norms / served,
    }
    return pd.DataFrame(columns)


def _given(
    routes: Sequence[_Route], means: Sequence[Tensor], ablations: list[str]
) -> tuple[list[Given], Int[np.ndarray, " cell"]]:
    """What the cells put in, and for each cell its place among all layers, experts and ablations."""
    found: list[tuple[str, Tensor, np.ndarray]] = []
    for number, (route, mean) in enumerate(zip(routes, means, strict=True)):
        writes, experts = torch.cat([torch.zeros_like(mean[:1]), mean]), torch.arange(len(mean))
        for values, part in ((writes, "experts.out"), (experts, "router.indices")):
            own = [kind for kind in ablations if (kind == "runner_up") == (part == "router.indices")]
            entries = [_entries(route, kind) for kind in own]
            for kind, each in zip(own, entries, strict=True):
                each[0] = (number * len(mean) + each[0]) * len(ablations) + ablations.index(kind)
            if own:
                found.append((ROUTED.format(route.layer) + part, values, np.concatenate(entries, axis=1)))
    keys = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(entries[0] for _, _, entries in found)]))
    given = []
    for name, values, entries in found:
        cell = torch.from_numpy(np.searchsorted(keys, entries[0]))
        row, position, slot, at = (torch.from_numpy(column) for column in entries[1:])
        given.append(Given(name, cell, row, position, slot, values, at))
    return given, keys


def _entries(route: _Route, ablation: str) -> Int[np.ndarray, "5 entry"]:
    """What an ablation replaces: expert, row, position, slot, and the number of the value put in."""
    token, slot = (axis.ravel() for axis in np.indices(route.experts.shape))
    expert, top_k = route.experts[token, slot], route.experts.shape[1]
    at = {"mean": expert + 1, "runner_up": route.runner_up[token]}.get(ablation, np.zeros_like(expert))
    if ablation == "shared_only":
        token, expert, at = (np.repeat(column, top_k) for column in (token, expert, at))
        slot = np.tile(np.arange(top_k), len(token) // top_k)
    return np.stack([expert, route.row[token], route.position[token], slot, at])
