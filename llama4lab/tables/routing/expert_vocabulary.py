"""Which tokens of the vocabulary each expert is for."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from llama4lab.run.corpus.arrays import KINDS
from llama4lab.run.corpus.stats import RoutingStats

LEAST = 10  # below, the best share of a token says little: a token that is seen once has all of it at one expert
DRAWS = 8  # behind each chance level


def vocabulary(
    stats: RoutingStats, kind: str = "input", *, smoothing: float | int = 1.0, least: int = LEAST
) -> pd.DataFrame:
    """Gives the tokens of each expert, the most characteristic first.

    Args:
        stats: Statistics that were counted with `vocabulary=`.
        kind: By the token itself ("input"), the one that follows it in the text ("next"), or the one that the model
            thinks most probable to follow ("predicted").
        smoothing: Choices that are added to those of every token that was seen, spread over the experts as all choices
            of the layer are. It draws the `npmi` of rare tokens towards 0 and hardly moves that of frequent ones.
        least: Tokens that were seen fewer times are left out of the lines; they count in everything that is compared
            with.

    Columns:
        layer: layer of the router.
        expert: the expert.
        token_id: id of the token.
        token: its text.
        tokens: how often it was sent to the expert.
        share: that as a share of how often it was seen.
        npmi: normalised pointwise mutual information of token and expert: log(p(x, e) / (p(x) p(e))) / -log p(x, e),
            p among all choices of the layer, with `smoothing`. 1 if they only come together, 0 if they are independent.

    Only pairs of an expert and a token that was sent to it are there.

    Raises:
        ValueError: if the vocabulary was not counted, or smoothing is negative.
    """
    if smoothing < 0:
        raise ValueError(f"smoothing={smoothing} is negative.")
    parts = []
    for layer, counts in zip(stats.words, stats.vocabulary_counts(kind), strict=True):
        of_token = counts.sum(axis=1)
        ids, experts = np.nonzero(counts * (of_token >= max(least, 1) * stats.top_k)[:, None])
        columns = {"layer": layer, "expert": experts, "token_id": ids}
        columns["token"] = [stats.token_texts.get(token, f"<{token}>") for token in ids.tolist()]
        columns |= {"tokens": counts[ids, experts].astype(np.int64)}
        columns |= {"share": counts[ids, experts] / (of_token[ids] / stats.top_k)}
        parts.append(pd.DataFrame({**columns, "npmi": npmi(counts, ids, experts, smoothing)}))
    table = pd.concat(parts, ignore_index=True)
    # The last key that is sorted by comes first.
    for column, ascending in (("token_id", True), ("tokens", False), ("npmi", False), ("expert", True)):
        table = table.sort_values(column, ascending=ascending, kind="stable")
    return table.sort_values("layer", kind="stable", ignore_index=True)


def vocabulary_specialization(stats: RoutingStats, *, least: int = LEAST, seed: int = 0) -> pd.DataFrame:
    """Gives how much the choice of the expert depends on the token: by the token itself, the next, and the predicted.

    The score of a layer is, as in OLMoE, the mean over the tokens of the vocabulary of the share that the favourite
    expert of each has. A token of several experts counts as sent to each of them. Their code differs from that in two
    ways: rare tokens, of which any one has a favourite, are left out of its lists but not of its means; and for several
    experts a token it rounds the number of times that a token was seen. Here the means are over the tokens that
    `vocabulary` lists, and nothing is rounded.

    Args:
        stats: Statistics that were counted with `vocabulary=`.
        least: Tokens that were seen fewer times are left out.
        seed: Of the draws behind `chance`.

    Columns:
        layer: layer of the router.
        kind: "input", "next" or "predicted".
        ids: how many tokens of the vocabulary the mean is over.
        score: the mean share of the favourite expert; NaN without tokens.
        chance: the same if choices did not depend on the token: drawn at random, for as many occurrences of each token,
            with the expert loads of the layer. It is above 1 / num_experts, and a score means something above it.
    """
    generator = np.random.default_rng(seed)
    lines = []
    for place, layer in enumerate(stats.words):
        for kind in KINDS:
            counts = stats.vocabulary_counts(kind)[place]
            seen = counts.sum(axis=1) // stats.top_k  # without a rest: each occurrence has so many choices
            rates = counts.sum(axis=0) / max(seen.sum(), 1)
            kept = seen >= max(least, 1)
            score = chance = np.nan
            if kept.any():
                score = float((counts[kept].max(axis=1) / seen[kept]).mean())
                chance = _chance(generator, seen[kept], rates, stats.top_k)
            lines.append((layer, kind, int(kept.sum()), score, chance))
    return pd.DataFrame(lines, columns=["layer", "kind", "ids", "score", "chance"])


def npmi(
    counts: Int[np.ndarray, "token_id expert"],
    ids: Int[np.ndarray, " pair"],
    experts: Int[np.ndarray, " pair"],
    smoothing: float | int,
) -> Float[np.ndarray, " pair"]:
    """Normalised pointwise mutual information of pairs of a token and an expert; see `vocabulary`."""
    of_token, of_expert, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    if not total:
        return np.zeros(len(ids))
    # The added choices of a token go to the experts as all choices do, so that p(e) stays as it is.
    whole = total + smoothing * np.count_nonzero(of_token)
    p_expert = of_expert[experts] / total
    p_token = (of_token[ids] + smoothing) / whole
    p_both = (counts[ids, experts] + smoothing * p_expert) / whole
    with np.errstate(invalid="ignore", divide="ignore"):
        association = np.log(p_both / (p_token * p_expert)) / -np.log(p_both)
    # Where one token and one expert are all that there is, there is nothing to associate.
    return np.where(p_both < 1, association, 0.0)


def _chance(
    generator: np.random.Generator, seen: Int[np.ndarray, " id"], rates: Float[np.ndarray, " expert"], slots: int
) -> float:
    """The mean share of the favourite expert, if each occurrence went to an expert with that expert's own rate."""
    scores = []
    for _ in range(DRAWS):
        if slots == 1:
            drawn = generator.multinomial(seen, rates / rates.sum())
        else:  # each expert by itself: how the slots of a token hang together is left open
            drawn = generator.binomial(seen[:, None], np.minimum(rates, 1))
        scores.append((drawn.max(axis=1) / seen).mean())
    return float(np.mean(scores))
