"""Whether images and text go to different experts."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import numpy as np
import pandas as pd
from jaxtyping import Float

from llama4lab.tables.routing.domains import specialization
from llama4lab.tables.routing.sources import Source, check_groups, choices_of

MODALITIES = ("image", "text")
DRAWS = 64  # behind each chance level


def modality_shares(source: Source) -> pd.DataFrame:
    """Gives the share of the image tokens, and of the text tokens, that each expert gets.

    Control tokens (around images, tiles and messages) are neither, and are left out.

    Args:
        source: A run with `router.indices` recorded, a table made by `lab.tables.routing.decisions`, or statistics of a
            corpus.

    Columns:
        layer: layer of the router.
        modality: "image" or "text".
        expert: the expert; those without tokens are there, too.
        tokens: tokens of the modality that were sent to it, in any slot.
        share: that as a share of the modality's tokens; in a layer they sum to the number of experts a token.
        uniform: the share that each expert would have if all had the same.
        lift: `share` divided by the expert's share of all tokens; NaN for an expert that nothing was sent to.
        group_tokens: tokens of the modality.

    `attrs["num_experts"]` has the number of experts.

    Raises:
        KeyError: if the indices were not recorded, or a table does not say the modality.
        ValueError: if there is neither an image token nor a text token.
    """
    choices = choices_of(source)
    check_groups(choices, "modality")
    kept = choices.loc[choices["modality"].isin(MODALITIES)]
    if not len(kept):
        raise ValueError("Shares of image and text tokens were asked for, but there is neither of both.")
    return specialization(kept, by="modality")


def modality_information(source: Source, *, seed: int = 0) -> pd.DataFrame:
    """Gives how much the expert that a token is sent to says about whether it is an image token or a text token.

    It is the mutual information as the counts have it, which is above 0 even where the two are independent; compare it
    with `chance`. Tokens of one picture are alike, so that the true chance level of few pictures is higher still. With
    several experts a token, it is about one of them, drawn at random.

    Args:
        source: As for `modality_shares`.
        seed: Of the draws behind `chance`.

    Columns:
        layer: layer of the router.
        tokens: image tokens and text tokens together.
        information: between modality and expert, in nats.
        entropy: of the modality, in nats: the most that could be known.
        share_of_entropy: `information / entropy`: 0 if experts do not care, 1 if none has tokens of both.
        chance: the mean `information` of as many tokens with the same shares if modality and expert were independent.

    Raises:
        KeyError: if the indices were not recorded.
        ValueError: if there are no image tokens, or no text tokens.
    """
    shares = modality_shares(source)
    found = sorted(set(shares["modality"]))
    if len(found) < len(MODALITIES):
        raise ValueError(
            f"Image tokens were to be compared with text tokens, but there are only {found[0]} tokens.\n"
            "Pass a run or a corpus that has both."
        )
    generator, lines = np.random.default_rng(seed), []
    for layer, own in shares.groupby("layer", sort=True):
        counts = own.pivot(index="modality", columns="expert", values="tokens").to_numpy(dtype=float)
        modality, expert = (counts.sum(axis=axis) / counts.sum() for axis in (1, 0))
        draws = generator.multinomial(int(counts.sum()), np.outer(modality, expert).ravel(), size=DRAWS)
        chance = np.mean([_information(each.reshape(counts.shape)) for each in draws])
        information, entropy = _information(counts), _entropy(modality)
        tokens = int(own.groupby("modality")["group_tokens"].first().sum())
        lines.append((layer, tokens, information, entropy, information / entropy, float(chance)))
    columns = ["layer", "tokens", "information", "entropy", "share_of_entropy", "chance"]
    return pd.DataFrame(lines, columns=columns)


def _information(counts: Float[np.ndarray, "modality expert"] | np.ndarray) -> float:
    joint = counts / counts.sum()
    return max(0.0, _entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1)) - _entropy(joint.ravel()))


def _entropy(shares: Float[np.ndarray, " outcome"]) -> float:
    shares = shares[shares > 0]
    return float(-np.sum(shares * np.log(shares)))
