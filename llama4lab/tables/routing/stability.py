"""How far two runs agree in what their routers choose."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalOperand=false

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.run.routes.engine_formats import UNKNOWN
from llama4lab.run.routes.routed_experts import RoutedExperts
from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import bare_choices, decisions
from llama4lab.tables.token_index import tokens_of

Routes = Run | RoutedExperts
Align = Literal["start", "end"] | Mapping[int, int] | None
KEY = ["row", "place"]
CHUNK = 64  # tokens whose next-token probabilities are in memory together


def saturation(a: Routes, b: Routes, align: Align = None) -> pd.DataFrame:
    """Gives how much of the experts' choice is the same in two runs: router saturation as in OLMoE, of any two runs.

    They may be of different checkpoints, precisions, contexts or prompts, or come from a serving engine.

    Args:
        a: A run with `router.indices` recorded, or `RoutedExperts`, which have one row.
        b: The other.
        align: Which tokens are compared. By default each row must have as many tokens in both, which are compared one
            by one; most must be the same, as in a clean and a corrupted prompt. "start" or "end" compares texts of
            unequal length from their begin or from their end, where all compared tokens must be the same; a mapping has
            the place of a token of `a`, counted from 0 without padding, and that of its counterpart in `b`.

    Columns:
        layer: layer of the router.
        tokens: how many were compared.
        agreement: mean share of a token's experts that it has in both, |A ∩ B| / k; k of the run with fewer.
        chance: the agreement if the two had chosen independently, each with its own load of experts.

    `attrs["differing"]` is the number of compared tokens whose ids are known and not the same.

    Raises:
        KeyError: if the indices were not recorded.
        ValueError: if the two have no layer in common, other numbers of experts, or tokens that do not correspond.
    """
    one, other, tokens = _aligned(a, b, align)
    slots = min(_slots(one), _slots(other))
    same = one.merge(other, on=[*KEY, "layer", "expert"]).groupby("layer").size()
    lines = []
    for layer in np.intersect1d(one["layer"], other["layer"]).tolist():
        loads = [own.loc[own["layer"] == layer, "expert"].value_counts() for own in (one, other)]
        count = len(one.loc[one["layer"] == layer, KEY].drop_duplicates())
        chance = float((loads[0] * loads[1]).sum()) / count**2 / slots
        lines.append((layer, count, same.get(layer, 0) / count / slots, chance))
    table = pd.DataFrame(lines, columns=["layer", "tokens", "agreement", "chance"])
    table.attrs = {"differing": int(_differing(tokens).sum())}
    return table


def drift(a: Run, b: Routes, align: Align = None, *, bins: int = 4) -> pd.DataFrame:
    """Gives how much two runs agree for tokens of which the first router was more or less sure.

    Where they part only at small margins, as of rounding, it is numbers that differ; where they part at large ones, it
    is something else.

    Args:
        a: A run with `router.logits` and `router.indices` recorded.
        b: The other, as in `saturation`.
        align: As in `saturation`.
        bins: How many bins of margins there are in a layer, with equally many tokens each.

    Columns:
        layer: layer of the router.
        bin: number of the bin, from the least sure.
        least, most: the smallest and largest margin in it, in `a`.
        margin: their mean.
        tokens: how many tokens are in it.
        agreement: mean share of a token's experts that it has in both.
        kl: mean KL divergence of the next token's probabilities, of `b` from `a`, in nats; missing where one has no
            logits.

    `attrs` have `kl`, the mean over all compared tokens, and `differing` as in `saturation`.

    Raises:
        KeyError: if logits or indices were not recorded.
        ValueError: as in `saturation`.
    """
    if bins < 1:
        raise ValueError(f"bins={bins} were asked for; there is at least 1.")
    one, other, tokens = _aligned(a, b, align)
    slots = min(_slots(one), _slots(other))
    same = one.merge(other, on=[*KEY, "layer", "expert"]).groupby([*KEY, "layer"]).size()
    margins = (
        decisions(a).drop_duplicates(["row", "position", "layer"]).merge(tokens_of(a)[["row", "position", "place"]])
    )
    each = one.drop_duplicates([*KEY, "layer"])[[*KEY, "layer"]].merge(margins[[*KEY, "layer", "margin"]])
    each["agreement"] = same.reindex(pd.MultiIndex.from_frame(each[[*KEY, "layer"]]), fill_value=0).to_numpy() / slots
    divergence = _divergences(a, b, tokens)
    each = each.merge(tokens.assign(kl=divergence)[[*KEY, "kl"]])
    rank = each.groupby("layer")["margin"].rank(method="first") - 1
    size = each.groupby("layer")["margin"].transform("size")
    each["bin"] = (rank * bins // size).astype("Int64")
    groups = each[each["bin"].notna()].groupby(["layer", "bin"])
    table = groups.agg(
        least=("margin", "min"),
        most=("margin", "max"),
        margin=("margin", "mean"),
        tokens=("margin", "size"),
        agreement=("agreement", "mean"),
        kl=("kl", "mean"),
    ).reset_index()
    known = divergence[~np.isnan(divergence)]
    differing = int(_differing(tokens).sum())
    table.attrs = {"kl": float(known.mean()) if len(known) else float("nan"), "differing": differing}
    return table


def _aligned(a: Routes, b: Routes, align: Align) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The choices of both for the tokens in both, at the places of `a`, and these tokens."""
    (one, mine, mine_count), (other, theirs, their_count) = _routes(a), _routes(b)
    if mine_count != their_count:
        raise ValueError(
            f"The runs have {mine_count} and {their_count} experts; only the same experts can be compared."
        )
    layers = set(one["layer"]) & set(other["layer"])
    if not layers:
        raise ValueError("The runs have no layer in common of which the routes are known.")
    if set(mine["row"]) != set(theirs["row"]):
        raise ValueError(
            f"The runs have the rows {sorted(set(mine['row']))} and {sorted(set(theirs['row']))}; cut them to the same."
        )
    theirs = theirs.rename(columns={"place": "other_place", "id": "other_id"})
    tokens = _counterparts(mine, theirs, align)
    _check_alike(tokens, align)
    other = other.rename(columns={"place": "other_place"}).merge(tokens[[*KEY, "other_place"]])
    one = one.merge(tokens[KEY])
    # A token whose route one of them does not know, as the last one of an engine, is not compared.
    known = one[[*KEY, "layer"]].drop_duplicates().merge(other[[*KEY, "layer"]].drop_duplicates())
    return one.merge(known), other[[*KEY, "layer", "expert"]].merge(known), tokens


def _counterparts(mine: pd.DataFrame, theirs: pd.DataFrame, align: Align) -> pd.DataFrame:
    """For each token of the one that has a counterpart, which it is."""
    sizes = [own.groupby("row")[name].max() for own, name in ((mine, "place"), (theirs, "other_place"))]
    if isinstance(align, Mapping):
        wanted = pd.DataFrame({"place": list(align), "other_place": list(align.values())})
        tokens = mine.merge(wanted, on="place").merge(theirs, on=["row", "other_place"])
        if len(tokens) != len(align) * mine["row"].nunique():
            raise ValueError(
                "The mapping has a place that not all rows of both have; places count from 0, without padding."
            )
        return tokens
    unequal = sizes[0].index[sizes[0].to_numpy() != sizes[1].reindex(sizes[0].index).to_numpy()]
    if align is None and len(unequal):
        row = unequal[0]
        raise ValueError(
            f"Row {row} has {sizes[0][row] + 1} and {sizes[1][row] + 1} tokens.\n"
            'Say which correspond: align="start", align="end", or a mapping of places.'
        )
    shift = (sizes[1] - sizes[0]).reindex(mine["row"]).to_numpy() if align == "end" else 0
    return mine.assign(other_place=mine["place"] + shift).merge(theirs, on=["row", "other_place"])


def _check_alike(tokens: pd.DataFrame, align: Align) -> None:
    differing = _differing(tokens)
    most = 0 if align in ("start", "end") else len(tokens) / 2
    if not len(tokens) or differing.sum() > most:
        first = tokens[differing].iloc[0] if differing.any() else None
        where = "" if first is None else f", the first at row {first['row']}, place {first['place']}"
        raise ValueError(
            f"{differing.sum()} of {len(tokens)} tokens that were to be compared are not the same{where}.\n"
            "Compare runs of the same text, or say by align= which tokens correspond."
        )


def _differing(tokens: pd.DataFrame) -> np.ndarray:
    """Which of the compared tokens are known not to be the same."""
    one, other = tokens["id"].to_numpy(), tokens["other_id"].to_numpy()
    return (one != other) & (one != UNKNOWN) & (other != UNKNOWN)


def _routes(source: Routes) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Choices (row, place, layer, expert), tokens (row, place, id), and the number of experts."""
    if isinstance(source, Run):
        tokens = tokens_of(source)[["row", "position", "place"]]
        ids = source.prompt.input_ids.cpu().numpy()[tokens["row"], tokens["position"]]
        choices = bare_choices(source).merge(tokens, on=["row", "position"])
        return choices[[*KEY, "layer", "expert"]], tokens.assign(id=ids)[[*KEY, "id"]], source.meta["num_experts"]
    place, column, _ = np.indices(source.experts.shape).reshape(3, -1)
    layers = np.array(source.layers)[column]
    choices = pd.DataFrame({"row": 0, "place": place, "layer": layers, "expert": source.experts.ravel().astype(int)})
    tokens = pd.DataFrame({"row": 0, "place": np.arange(len(source))})
    tokens["id"] = UNKNOWN if source.token_ids is None else source.token_ids
    return choices[choices["expert"] != UNKNOWN], tokens, source.num_experts


def _slots(choices: pd.DataFrame) -> int:
    """How many experts a token has."""
    return int(choices.groupby([*KEY, "layer"]).size().max())


def _divergences(a: Run, b: Routes, tokens: pd.DataFrame) -> Float[np.ndarray, " token"]:
    """KL divergence of the next token at each of the compared tokens; NaN where there are no logits."""
    found = np.full(len(tokens), np.nan)
    if not isinstance(b, Run) or a.logits.shape[-1] != b.logits.shape[-1]:
        return found
    (rows, columns), (other_rows, other_columns) = _at(a, tokens, "place"), _at(b, tokens, "other_place")
    both = np.flatnonzero((columns >= 0) & (other_columns >= 0))
    for some in np.array_split(both, max(1, -(-len(both) // CHUNK))):
        p, q = _log_probs(a, rows[some], columns[some]), _log_probs(b, other_rows[some], other_columns[some])
        found[some] = (p.exp() * (p - q)).sum(-1).clamp(min=0).numpy()
    return found


def _at(run: Run, tokens: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Where in the logits of a run tokens are; -1 where they are not."""
    own = tokens_of(run).rename(columns={"place": column})
    found = tokens[["row", column]].merge(own, how="left", on=["row", column])
    index = {position: place for place, position in enumerate(run.logit_positions)}
    columns = [index.get(position, -1) for position in found["position"]]
    return found["batch_index"].to_numpy(), np.array(columns)


def _log_probs(run: Run, rows: np.ndarray, columns: np.ndarray) -> Float[Tensor, "token vocab"]:
    logits = run.logits.detach()[torch.from_numpy(rows), torch.from_numpy(columns)]
    return logits.double().log_softmax(-1).cpu()
