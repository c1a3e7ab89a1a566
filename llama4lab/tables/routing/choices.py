"""Which expert each token went to, and how sure the router was."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.run.run import Run
from llama4lab.tables.routing.writes import sizes_of_writes
from llama4lab.tables.token_index import at_tokens, tokens_of

ROUTER = "feed_forward.router."


def decisions(run: Run) -> pd.DataFrame:
    """Gives every choice of every router: one line for each row, layer, position and slot. Padding is left out.

    A choice is read from `router.indices`, so it is the expert that ran, whatever an edit made the logits say.

    Columns:
        row: row of the prompt.
        layer: layer of the router.
        position: position in the row.
        slot: which of the token's choices, from 0; as the router put them, the best first.
        token: text of the token.
        modality: "text", "image" or "special".
        expert: the chosen expert.
        logit: router logit of the chosen expert.
        gate: factor on the expert's input, between 0 and 1: `router.gates` as recorded, else the sigmoid of `logit`
            (record the gates of a run in which they are edited).
        margin: lowest logit of the token's chosen experts minus the highest logit not chosen; negative for a token that
            was forced elsewhere, NaN if all experts are chosen.
        entropy: of the softmax over the token's router logits, in nats, from 0 to log(num_experts). Llama 4 gates by
            sigmoid; the softmax is a way to look at it.
        runner_up: the best expert not chosen; missing if there is none.

    And, where these hook points were recorded (missing in layers where they were not):
        routed_norm: L2 norm of what the expert wrote, from `experts.out`. The gate is in it: Llama 4 scales the
            expert's input, so that it is |f(gate * x)|, not gate * |f(x)|.
        shared_norm: of what the shared expert wrote, from `shared_expert.out`.
        attention_norm: of what attention wrote, from `self_attn.out`.
        cosine: between what the routed and what the shared expert wrote.

    `attrs["num_experts"]` has the number of experts.

    Raises:
        KeyError: if router logits or indices were not recorded.
    """
    logits, indices = _recorded(run, "logits"), _recorded(run, "indices")
    gates = run.layers(f"{ROUTER}gates") if any(name.endswith(f"{ROUTER}gates") for name in run) else {}
    if logits.keys() != indices.keys():
        layers = ", ".join(str(layer) for layer in sorted(logits.keys() ^ indices.keys()))
        raise KeyError(f"Of layers {layers} either router.logits or router.indices is missing. {_advice()}")
    tokens = tokens_of(run)
    parts = []
    for layer, chosen in indices.items():
        gate = at_tokens(gates[layer], tokens) if layer in gates else None
        columns = _choices(at_tokens(logits[layer], tokens), at_tokens(chosen, tokens), gate)
        columns |= sizes_of_writes(run, layer, tokens)
        parts.append(_by_slot(tokens, layer, columns))
    table = pd.concat(parts, ignore_index=True)
    table = table.sort_values(["row", "layer", "position", "slot"], ignore_index=True)
    table["runner_up"] = table["runner_up"].astype("Int64").mask(table["runner_up"] < 0)
    table.attrs["num_experts"] = run.meta["num_experts"]
    return table


def _choices(
    logits: Float[Tensor, "token expert"], chosen: Int[Tensor, "token slot"], gate: Float[Tensor, "token slot"] | None
) -> dict[str, np.ndarray]:
    """The columns of `decisions` that come from the router, each of shape [token] or [token, slot]."""
    logits, chosen = logits.double(), chosen.long()
    logit = logits.gather(1, chosen)
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    best, runner_up = logits.masked_fill(taken, -torch.inf).max(dim=1)
    margin = (logit.min(dim=1).values - best).masked_fill(taken.all(dim=1), torch.nan)
    return {
        "expert": chosen.numpy(),
        "logit": logit.numpy(),
        "gate": (torch.sigmoid(logit) if gate is None else gate.double()).numpy(),
        "margin": margin.numpy(),
        "entropy": torch.special.entr(logits.softmax(dim=1)).sum(dim=1).numpy(),
        # An expert barred by a logit of -inf is no runner-up.
        "runner_up": runner_up.masked_fill(best == -torch.inf, -1).numpy(),
    }


def _by_slot(tokens: pd.DataFrame, layer: int, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """One line for each token and slot of a layer."""
    slots = columns["expert"].shape[1]
    table = tokens[["row", "position", "token", "modality"]].loc[tokens.index.repeat(slots)].reset_index(drop=True)
    table.insert(1, "layer", layer)
    table.insert(3, "slot", np.tile(np.arange(slots), len(tokens)))
    for name, column in columns.items():
        table[name] = column.reshape(-1) if column.ndim == 2 else column.repeat(slots)
    return table


def bare_choices(run: Run) -> pd.DataFrame:
    """The first columns of `decisions`, up to `expert`: all that a run with only the indices recorded can say."""
    tokens = tokens_of(run)
    layers = _recorded(run, "indices").items()
    parts = [_by_slot(tokens, layer, {"expert": at_tokens(chosen, tokens).numpy()}) for layer, chosen in layers]
    table = pd.concat(parts, ignore_index=True)
    table.attrs["num_experts"] = run.meta["num_experts"]
    return table


def _recorded(run: Run, name: str) -> dict[int, Tensor]:
    if not run.meta["moe_layers"]:
        raise KeyError("This model has no router: all its layers are dense.")
    if not any(recorded.endswith(ROUTER + name) for recorded in run):
        raise KeyError(f"No layer of this run has router.{name}. {_advice()}")
    return run.layers(ROUTER + name)


def _advice() -> str:
    return 'Record all of the router: at="layers.*.feed_forward.router.*".'
