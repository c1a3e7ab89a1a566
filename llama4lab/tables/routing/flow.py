"""How tokens move from expert to expert: between layers, along whole paths, between slots and from token to token."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalOperand=false

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.run import Run
from llama4lab.tables.routing.sources import Source, choices_of, number_of_experts, weighted_choices

TOKEN = ["row", "position"]
PAIR = ["from_layer", "to_layer", "from_expert", "to_expert"]
DRAWS = 32  # behind each chance level


def transitions(source: Source, layers: Sequence[int] | None = None) -> pd.DataFrame:
    """Gives where the tokens of each expert go in a later layer. Only pairs of experts with tokens are there.

    Args:
        source: A run with `router.indices` recorded, a table made by `decisions`, or statistics of a corpus, which have
            neighbouring routers only.
        layers: A chain of layers, each followed by the next, for example (1, 7) or [0, 8, 16]; by default all layers
            with a router.

    Columns:
        from_layer, to_layer: the earlier and the later layer.
        from_expert, to_expert: an expert of each.
        tokens: tokens that were sent to both, in whichever slots: with several experts a token, all pairs count.
        share: that as a share of the tokens of `from_expert`: P(to | from). From one expert the shares sum to the
            number of experts a token.
        uniform: the share that each expert would have if all had the same: experts a token / num_experts.

    Raises:
        KeyError: if the indices were not recorded.
        ValueError: if a layer has no router in the source, or statistics lack a pair of layers.
    """
    choices = weighted_choices(source)
    num_experts, slots = number_of_experts(choices), choices["slot"].nunique()
    chain = _chain(choices, layers)
    if isinstance(source, RoutingStats):
        table = _counted(source, chain)
    else:
        table = pd.concat([_pairs(_of_tokens(source), *pair) for pair in chain], ignore_index=True)
    visits = table.groupby(PAIR[:3])["tokens"].transform("sum") / slots
    table["share"] = table["tokens"] / visits
    table["uniform"] = slots / num_experts
    table.attrs = {"num_experts": num_experts, "top_k": slots}
    return table


def information(source: Source, layers: Sequence[int] | None = None, *, seed: int = 0) -> pd.DataFrame:
    """Gives how much the expert of one layer says about that of a later one.

    With several experts a token, it is about one of them, drawn at random, in each of the layers: all pairs of slots
    count, not only slots of the same rank.

    Args:
        source: As in `transitions`.
        layers: As in `transitions`.
        seed: Of the draws behind `chance`.

    Columns:
        from_layer, to_layer: the earlier and the later layer.
        tokens: how many tokens were counted.
        mutual_information: of the two experts, in nats, as the counts have it.
        entropy: of the later one's expert, in nats: the most that could be known.
        normalised: `mutual_information / entropy`, from 0 to 1; missing where the entropy is 0.
        chance: the mutual information that as many tokens would show by chance if the layers were independent. It is
            above 0, and far above with few tokens and many experts.

    Raises:
        KeyError: if the indices were not recorded.
        ValueError: as in `transitions`.
    """
    table = transitions(source, layers)
    generator, lines = np.random.default_rng(seed), []
    for pair, own in table.groupby(PAIR[:2], sort=False):
        counts = np.zeros((table.attrs["num_experts"],) * 2)
        counts[own["from_expert"], own["to_expert"]] = own["tokens"]
        found, total = _mutual_information(counts), int(counts.sum())
        later = counts.sum(axis=0) / total
        entropy = float(-np.sum(later[later > 0] * np.log(later[later > 0])))
        independent = np.outer(counts.sum(axis=1), later).ravel() / total
        drawn = generator.multinomial(total, independent / independent.sum(), size=DRAWS)
        chance = np.mean([_mutual_information(each.reshape(counts.shape).astype(float)) for each in drawn])
        tokens = total // table.attrs["top_k"] ** 2
        lines.append((*pair, tokens, found, entropy, found / entropy if entropy > 0 else np.nan, float(chance)))
    columns = ["from_layer", "to_layer", "tokens", "mutual_information", "entropy", "normalised", "chance"]
    return pd.DataFrame(lines, columns=columns)


def paths(source: Run | pd.DataFrame, labels: str | Mapping[int, Any] | None = None, *, seed: int = 0) -> pd.DataFrame:
    """Gives the experts that tokens visit from the first router to the last, the most frequent path first.

    Args:
        source: A run with `router.indices` recorded, or a table made by `decisions`, possibly of some layers only.
        labels: What tokens are told apart by: a column of the decisions, for example "modality" or "token", or a label
            for each row of the prompt.
        seed: Of the draws behind the chance level.

    Columns:
        path: the experts, layer by layer, for example "3-1-0-7". Several experts of a token are joined in order of
            their number, "1+3-0+2", whatever slots they have.
        tokens: tokens on it.
        share: that as a share of all tokens.
        label: with labels, the most frequent one of its tokens.
        purity: with labels, the share of its tokens with that label; 1 for a path of a single token.

    `attrs` have `layers`, and with labels `purity` (the mean over all tokens), `purity_chance` (the same with labels
    dealt out at random: above the share of the largest label where paths have few tokens) and `majority` (that share).

    Raises:
        KeyError: if the indices were not recorded, there is no column `labels`, or a row has no label.
        TypeError: for statistics of a corpus, which do not know the paths of tokens.
        ValueError: if some tokens lack a layer that others have, so that paths would not be of the same layers.
    """
    choices = _of_tokens(source)
    if labels is not None:
        choices = _labelled(choices, labels)
    layers = np.unique(choices["layer"]).tolist()
    ordered = choices.sort_values([*TOKEN, "layer", "expert"])
    steps = ordered.groupby([*TOKEN, "layer"])["expert"].agg(lambda own: "+".join(map(str, own)))
    found = steps.groupby(level=TOKEN).agg(path="-".join, length="size")
    if (found["length"] != len(layers)).any():
        row, position = found.index[(found["length"] != len(layers)).to_numpy()][0]
        raise ValueError(
            f"The token at row {row}, position {position} lacks some of the layers {', '.join(map(str, layers))}.\n"
            "Filter the table by tokens or layers, not by single choices."
        )
    table = found["path"].value_counts(sort=False).rename_axis("path").reset_index(name="tokens")
    table = table.sort_values(["tokens", "path"], ascending=[False, True], ignore_index=True)
    table["share"] = table["tokens"] / len(found)
    table.attrs = {"layers": layers}
    if labels is None:
        return table
    return _with_purity(table, found["path"].to_numpy(), choices.groupby(TOKEN)["_label"].first().to_numpy(), seed)


def coactivation(source: Source) -> pd.DataFrame:
    """Gives how often two experts of a layer serve the same token, in whichever of its slots.

    All pairs of slots count; both orders of a pair are there, and only pairs with tokens.

    Columns:
        layer: layer of the router.
        expert: the expert.
        other: another expert of the layer.
        tokens: tokens that were sent to both.
        share: that as a share of the tokens of `expert`; of one expert the shares sum to the experts a token less one.
        uniform: the share that each would have if all had the same: (experts a token - 1) / (num_experts - 1).

    Raises:
        KeyError: if the indices were not recorded.
        ValueError: if each token has one expert.
    """
    choices = weighted_choices(source)
    num_experts, slots = number_of_experts(choices), choices["slot"].nunique()
    if slots < 2:
        raise ValueError(
            "Each token has one expert here, so that no two serve the same token.\n"
            "How experts of different layers go together is in transitions(source) and information(source)."
        )
    if isinstance(source, RoutingStats):
        table = source.pairs()
    else:
        own = choices[[*TOKEN, "layer", "expert"]]
        both = own.merge(own.rename(columns={"expert": "other"}), on=[*TOKEN, "layer"])
        both = both[both["expert"] != both["other"]]
        table = both.groupby(["layer", "expert", "other"]).size().reset_index(name="tokens")
    visits = choices.groupby(["layer", "expert"])["tokens"].sum()
    table["share"] = table["tokens"] / visits.reindex(pd.MultiIndex.from_frame(table[["layer", "expert"]])).to_numpy()
    table["uniform"] = (slots - 1) / (num_experts - 1)
    table.attrs = {"num_experts": num_experts, "top_k": slots}
    return table


def repetition(source: Source) -> pd.DataFrame:
    """Gives how often a token has the same first expert as the token before it.

    Columns:
        layer: layer of the router.
        tokens: tokens that have one right before them; in a filtered table, those whose neighbour is still there.
        same: those with the same first expert.
        share: `same / tokens`; missing without tokens.
        chance: the share if each token drew its expert by the layer's load, whatever the token before has; 1 /
            num_experts for an even load.

    Raises:
        KeyError: if the indices were not recorded.
    """
    choices = weighted_choices(source)
    first = choices[choices["slot"] == 0]
    if isinstance(source, RoutingStats):
        table = source.repeats()
    else:
        first = first.sort_values(["layer", *TOKEN])
        before = first.groupby(["layer", "row"])[["position", "expert"]].shift()
        after = before["position"] == first["position"] - 1
        marked = first.assign(tokens=after, same=after & (before["expert"] == first["expert"]))
        table = marked.groupby("layer")[["tokens", "same"]].sum().reset_index()
    loads = first.groupby(["layer", "expert"])["tokens"].sum()
    shares = loads / loads.groupby(level="layer").transform("sum")
    table["share"] = (table["same"] / table["tokens"]).where(table["tokens"] > 0)
    table["chance"] = (shares**2).groupby(level="layer").sum().reindex(table["layer"]).to_numpy()
    table.attrs = {"num_experts": number_of_experts(choices)}
    return table


def _of_tokens(source: Source) -> pd.DataFrame:
    """Choices of single tokens."""
    choices = choices_of(source)
    if not set(TOKEN) <= set(choices):
        raise TypeError(
            "Statistics of a corpus do not know which token went where.\nPass a run, or a table made by decisions."
        )
    return choices


def _chain(choices: pd.DataFrame, layers: Sequence[int] | None) -> list[tuple[int, int]]:
    known = np.unique(choices["layer"]).tolist()
    chain = known if layers is None else list(layers)
    wrong = [layer for layer in chain if layer not in known]
    if wrong or len(chain) < 2:
        found = f"layer {wrong[0]}" if wrong else "fewer than two layers"
        raise ValueError(f"A flow of {found} was asked for; there are choices of layers {', '.join(map(str, known))}.")
    return list(pairwise(chain))


def _counted(stats: RoutingStats, chain: list[tuple[int, int]]) -> pd.DataFrame:
    """The lines of a chain that were counted in a corpus."""
    flow, neighbours = stats.flow(), list(pairwise(stats.layers))
    lacking = [pair for pair in chain if pair not in neighbours]
    if lacking:
        raise ValueError(
            f"The flow from layer {lacking[0][0]} to {lacking[0][1]} was not counted; statistics have neighbouring "
            f"routers: {', '.join(f'{a} to {b}' for a, b in neighbours[:6])}."
        )
    return pd.concat([flow[(flow["from_layer"] == a) & (flow["to_layer"] == b)] for a, b in chain], ignore_index=True)


def _pairs(choices: pd.DataFrame, earlier: int, later: int) -> pd.DataFrame:
    """Counts of the experts that tokens have in two layers, all slots with all slots."""
    sides = []
    for side, layer in (("from", earlier), ("to", later)):
        own = choices.loc[choices["layer"] == layer, [*TOKEN, "expert"]]
        sides.append(own.rename(columns={"expert": f"{side}_expert"}))
    counts = sides[0].merge(sides[1], on=TOKEN).groupby(PAIR[2:]).size().reset_index(name="tokens")
    counts.insert(0, "from_layer", earlier)
    counts.insert(1, "to_layer", later)
    return counts


def _mutual_information(counts: Float[np.ndarray, "one other"]) -> float:
    joint = counts / counts.sum()
    independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    there = joint > 0
    return max(0.0, float(np.sum(joint[there] * np.log(joint[there] / independent[there]))))


def _labelled(choices: pd.DataFrame, labels: str | Mapping[int, Any]) -> pd.DataFrame:
    if isinstance(labels, str):
        if labels not in choices:
            raise KeyError(f"labels={labels!r} is no column of the decisions. Columns: {', '.join(choices.columns)}.")
        return choices.assign(_label=choices[labels])
    lacking = set(choices["row"].tolist()) - set(labels)
    if lacking:
        raise KeyError(f"Row {min(lacking)} has no label; labels were given for rows {', '.join(map(str, labels))}.")
    return choices.assign(_label=choices["row"].map(dict(labels)))


def _with_purity(table: pd.DataFrame, path: np.ndarray, label: np.ndarray, seed: int) -> pd.DataFrame:
    """Adds the most frequent label of each path."""
    names, number = np.unique(label, return_inverse=True)
    place, shape = pd.Index(table["path"]).get_indexer(path), (len(table), len(names))

    def counted(labels: np.ndarray) -> np.ndarray:
        counts = np.zeros(shape, dtype=np.int64)
        np.add.at(counts, (place, labels), 1)
        return counts

    counts, generator, tokens = counted(number), np.random.default_rng(seed), len(label)
    chance = np.mean([counted(generator.permutation(number)).max(axis=1).sum() / tokens for _ in range(DRAWS)])
    pure = float(counts.max(axis=1).sum() / tokens)
    majority = float(counts.sum(axis=0).max() / tokens)
    attrs = {**table.attrs, "purity": pure, "purity_chance": float(chance), "majority": majority}
    table = table.assign(label=names[counts.argmax(axis=1)], purity=counts.max(axis=1) / table["tokens"])
    table.attrs = attrs
    return table
