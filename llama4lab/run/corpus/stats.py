"""`RoutingStats`: what the routers of a model did with a corpus."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.run.corpus import file
from llama4lab.run.corpus.arrays import AXES, KINDS, MEANS, MODALITIES, RESOLUTION, bin_edges


@dataclass(repr=False, eq=False)
class RoutingStats:
    """Counts of routing decisions, by group, layer and expert. Padding is never counted.

    `a + b` are the statistics of both corpora. All counts are whole numbers, and sums of real numbers are kept in fixed
    point (multiples of 2 ** -24, rounded for each token; of writes for each batch), so that adding is exact in any
    order: shards that were counted apart add up to what one pass over the same batches gives.

    Attributes:
        groups: The labels, sorted.
        layers: The layers with routers.
        num_experts: Experts of each.
        items: How many items of prompts were counted.
        arrays: The counts; axes and units are in `llama4lab.run.corpus.arrays`.
        about: Which model and which options they are of.
        token_texts: The text of each token in the vocabulary counts; empty without them.
        progress: How far an interrupted count has come; None for a sum.
    """

    groups: list[str]
    layers: list[int]
    num_experts: int
    items: int
    arrays: dict[str, np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)
    token_texts: dict[int, str] = field(default_factory=dict)
    progress: dict[str, Any] | None = None

    @property
    def top_k(self) -> int:
        """How many experts each token is sent to."""
        return self.arrays["choices"].shape[3]

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self._group_tokens().sum())

    @property
    def words(self) -> list[int]:
        """The layers whose vocabulary was counted."""
        return list(self.about.get("vocabulary", []))

    @property
    def writes(self) -> Float[Tensor, "layer expert d_model"]:
        """The sum of what each expert wrote; divided by its tokens, its characteristic activation."""
        return torch.from_numpy(self.arrays["writes"] * RESOLUTION)

    def token_counts(self) -> pd.DataFrame:
        """The tokens of each group and modality. Columns: group, modality, tokens."""
        counts = self._group_tokens()
        groups, modalities = np.nonzero(counts)
        return pd.DataFrame(
            {
                "group": [self.groups[group] for group in groups],
                "modality": [MODALITIES[modality] for modality in modalities],
                "tokens": counts[groups, modalities],
            }
        )

    def choices(self) -> pd.DataFrame:
        """How often each expert was chosen; lines without tokens are there for every group and modality that has some.

        Columns: group, modality, layer, slot, expert, tokens.
        """
        counts, present = self.arrays["choices"], self._group_tokens() > 0
        places = np.nonzero(np.broadcast_to(present[:, :, None, None, None], counts.shape))
        return self._table("choices", places)

    def expert_means(self) -> pd.DataFrame:
        """Means over the tokens of each expert; NaN for an expert without any.

        Columns:
            group: label.
            layer: layer of the router.
            expert: the expert.
            tokens: those that were sent to it, in any slot.
            gate: mean factor on the expert's input.
            margin: mean of the lowest logit of the chosen experts minus the highest of the others; over those tokens
                where there are others.
            entropy: mean entropy of the softmax over the logits, in nats.
            write_norm: mean L2 norm of what the expert wrote. The gate is in it, as it is a factor on the input: this
                is the score of REAP as it must be for Llama 4.
        """
        tokens = self.arrays["choices"].sum(axis=(1, 3))
        places = np.nonzero(np.ones(tokens.shape, dtype=bool))
        table = self._table("gate", places, value="gate")
        table.insert(3, "tokens", tokens[places])
        for name in MEANS:
            number = self.arrays["with_margin"] if name == "margin" else tokens
            with np.errstate(invalid="ignore"):
                table[name] = (self.arrays[name] * RESOLUTION / number)[places]
        return table

    def by_position(self) -> pd.DataFrame:
        """How often each expert was chosen at each distance from the begin of the text.

        Columns:
            layer: layer of the router.
            first: first place of a stretch of the text, counted from 0; stretches double in length.
            last: its last place.
            expert: the expert.
            tokens: how often it was chosen there.
        """
        counts = self.arrays["positions"].transpose(1, 0, 2)
        present = np.broadcast_to((counts.sum(axis=(0, 2)) > 0)[None, :, None], counts.shape)
        layer, number, expert = places = np.nonzero(present)
        first, last = bin_edges(number)
        columns = {"layer": np.array(self.layers)[layer], "first": first, "last": last, "expert": expert}
        return self._with_attrs(pd.DataFrame({**columns, "tokens": counts[places]}))

    def flow(self) -> pd.DataFrame:
        """How many tokens went from an expert to an expert of the next router; of several slots, all pairs.

        Only pairs with tokens are there. Columns: from_layer, to_layer, from_expert, to_expert, tokens.
        """
        layer, one, two = places = np.nonzero(self.arrays["flow"])
        layers = np.array(self.layers)
        columns = {"from_layer": layers[layer], "to_layer": layers[layer + 1], "from_expert": one, "to_expert": two}
        return self._with_attrs(pd.DataFrame({**columns, "tokens": self.arrays["flow"][places]}))

    def pairs(self) -> pd.DataFrame:
        """How many tokens were sent to both of two experts, for all pairs of slots; both orders are there.

        Only pairs with tokens are there, so none if each token has one expert. Columns: layer, expert, other, tokens.
        """
        return self._table("pairs", np.nonzero(self.arrays["pairs"]))

    def repeats(self) -> pd.DataFrame:
        """How often a token's first expert is that of the token before it.

        Columns:
            layer: layer of the router.
            tokens: tokens that have one before them.
            same: those with the same expert.
        """
        counts = self.arrays["repeats"]
        return self._with_attrs(
            pd.DataFrame({"layer": self.layers, "tokens": counts.sum(axis=1), "same": counts[:, 1]})
        )

    def vocabulary(self, kind: str = "input") -> pd.DataFrame:
        """How often each expert was chosen for each token of the vocabulary; image tokens are left out.

        Args:
            kind: By the token itself ("input"), the one that follows it in the text ("next"), or the one that the model
                thinks most probable to follow ("predicted").

        Only pairs with tokens are there. Columns: layer, token_id, expert, tokens.

        Raises:
            ValueError: for another kind, or if the vocabulary was not counted.
        """
        counts = self.vocabulary_counts(kind)
        layer, token, expert = places = np.nonzero(counts)
        columns = {"layer": np.array(self.words)[layer], "token_id": token, "expert": expert}
        return self._with_attrs(pd.DataFrame({**columns, "tokens": counts[places].astype(np.int64)}))

    def vocabulary_counts(self, kind: str = "input") -> Int[np.ndarray, "layer token_id expert"]:
        """The counts of `vocabulary`, for the layers of `words`."""
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} was asked for; choose from {', '.join(KINDS)}.")
        if "vocabulary" not in self.arrays:
            raise ValueError("The vocabulary was not counted. Count it by routing_stats(..., vocabulary=True).")
        return self.arrays["vocabulary"][KINDS.index(kind)]

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        """The statistics of both corpora.

        Raises:
            ValueError: if they are of different models, or were counted with other options.
        """
        if not isinstance(other, RoutingStats):
            return NotImplemented
        for key in ("model", "max_length", "vocabulary"):
            mine, theirs = self.about.get(key), other.about.get(key)
            if mine != theirs:
                raise ValueError(
                    f"These statistics cannot be added: their {key} is {_shown(mine)} and {_shown(theirs)}.\n"
                    "Add statistics of the same model, counted with the same options."
                )
        if self.top_k != other.top_k:
            raise ValueError(f"These statistics cannot be added: of {self.top_k} and {other.top_k} experts a token.")
        groups = sorted({*self.groups, *other.groups})
        wide = (self.tokens + other.tokens) * self.top_k >= 2**31  # the vocabulary has 32 bits while they suffice
        arrays = {name: _placed(self, name, groups, wide) + _placed(other, name, groups, wide) for name in self.arrays}
        about = {
            **self.about,
            "by": self.about.get("by") if self.about.get("by") == other.about.get("by") else "several",
        }
        items, texts = self.items + other.items, {**self.token_texts, **other.token_texts}
        return RoutingStats(groups, self.layers, self.num_experts, items, arrays, about, texts)

    def __radd__(self, other: int) -> "RoutingStats":
        """Lets `sum` add several."""
        return self if other == 0 else NotImplemented

    def save(self, path: str | Path) -> None:
        """Writes one file, .npz or .parquet; it is replaced only when all is written."""
        names = ("groups", "layers", "num_experts", "items", "about", "progress")
        header = {name: getattr(self, name) for name in names}
        texts = {str(token): text for token, text in self.token_texts.items()}
        file.write(path, {**header, "words": self.words, "token_texts": texts}, self.arrays)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingStats":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        header, arrays = file.read(path)
        header.pop("words")
        texts = {int(token): text for token, text in header.pop("token_texts").items()}
        return cls(arrays=arrays, token_texts=texts, **header)

    def _group_tokens(self) -> np.ndarray:
        """Tokens by group and modality: every token makes one choice in the first slot of the first router."""
        return self.arrays["choices"][:, :, 0, 0].sum(axis=-1)

    def _table(self, name: str, places: tuple[np.ndarray, ...], value: str = "tokens") -> pd.DataFrame:
        labels = {"group": self.groups, "modality": MODALITIES, "layer": self.layers}
        columns = {
            axis: np.array(labels[axis])[place] if axis in labels else place
            for axis, place in zip(AXES[name], places, strict=True)
        }
        return self._with_attrs(pd.DataFrame({**columns, value: self.arrays[name][places]}))

    def _with_attrs(self, table: pd.DataFrame) -> pd.DataFrame:
        table.attrs = {"num_experts": self.num_experts, "top_k": self.top_k}
        return table

    def __repr__(self) -> str:
        groups = f"{len(self.groups)} groups" if len(self.groups) > 1 else "1 group"
        return (
            f"RoutingStats: {self.tokens:,} tokens of {self.items:,} items in {groups}; {len(self.layers)} routers of "
            f"{self.num_experts} experts, {self.top_k} a token" + (", with vocabulary" if self.words else "")
        )

    def _repr_html_(self) -> str:
        table = self.token_counts().pivot(index="group", columns="modality", values="tokens").fillna(0).astype(int)
        return f"<b>{self!r}</b>{table.to_html()}"


def _placed(stats: RoutingStats, name: str, groups: list[str], wide: bool) -> np.ndarray:
    """An array with room for more groups."""
    array = stats.arrays[name].astype(np.int64, copy=False) if wide else stats.arrays[name]
    if AXES[name][0] != "group":
        return array
    room = np.zeros((len(groups), *array.shape[1:]), array.dtype)
    room[[groups.index(group) for group in stats.groups]] = array
    return room


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
