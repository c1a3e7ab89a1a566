"""Counting what the routers of a model do with a corpus, however long, in memory that does not grow."""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from tqdm.auto import tqdm

from llama4lab.model.config_parts import text_part
from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.corpus.arrays import AXES, KINDS, MODALITIES
from llama4lab.run.corpus.batch_pass import RoutedTokens, counting_device, routed_tokens
from llama4lab.run.corpus.batches import windows
from llama4lab.run.corpus.counts import Counts
from llama4lab.run.corpus.file import check_path
from llama4lab.run.corpus.identity import model_digest, rows_digest
from llama4lab.run.corpus.items import By, Row, labelled, rows_of
from llama4lab.run.corpus.passes import passes_of
from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.size import free_nbytes
from llama4lab.run.unembedding import Unembedding

SAVE_AFTER = 30.0  # seconds; and never more than a twentieth of the time is spent on saving


class Counting(TypedDict, total=False):
    """How a corpus is counted; see `routing_stats`."""

    tokens: int
    vocabulary: bool | Iterable[int]
    path: str | Path | None
    progress: bool
    max_length: int | None


def routing_stats(
    model: HookedPreTrainedModel, prompts: Any, *, by: By = None, **counting: Unpack[Counting]
) -> RoutingStats:
    """Counts what the routers do with a corpus.

    Prompts are taken one by one, so any generator will do. Neither texts nor activations nor logits are kept: the
    memory that it takes does not depend on the number of tokens. Interventions that are active (patches, re-routing)
    act here as in any run.

    Args:
        model: The model.
        prompts: An iterable of items, or label -> iterable of items. An item is a text, a chat, token ids, a `Prompt`,
            a row of a dataset (a mapping with "text", "messages" or "prompt", and "images" or "image"), or an object
            with the attribute `text` (and `image` or `images`).
        by: How items are grouped: a key or attribute of the items, or a function of an item.
        counting: How it is done. `tokens`: of a batch, padding included (4096). Where weights wait on disk a batch has
            as many as half of the free memory holds (32,768 at most): each weight is read once for all of them.
            `vocabulary`: whether to count by token, too, in all routers or in a list of layers; this takes 12 bytes for
            each layer, token of the vocabulary and expert. `path`: an .npz or .parquet file, saved as it goes; a count
            that was interrupted goes on from there, if it is given the same prompts again. `progress`: whether to show
            a bar. `max_length`: the number of tokens after which an item is cut.

    Raises:
        ValueError: if there are no prompts, the model has no routers, or the file at `path` is of another count.
        MemoryError: if the vocabulary does not fit; the message has both figures.
    """
    unknown = sorted(set(counting) - set(Counting.__annotations__))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option; options are {', '.join(Counting.__annotations__)}.")
    session = _Session(model, by if not isinstance(prompts, Mapping) else "label", counting)
    with tqdm(
        initial=session.stats.tokens if session.begun else 0,
        disable=not counting.get("progress", True),
        unit="token",
        unit_scale=True,
        desc="routing stats",
    ) as bar:
        try:
            session.count(labelled(prompts, by), bar)
        except BaseException:
            session.save()
            raise
    if not session.begun:
        raise ValueError("Prompts were to be counted, but there are none.")
    session.save()
    return session.stats


class _Session:
    """A count that is going on."""

    def __init__(self, model: HookedPreTrainedModel, by: By, counting: Counting):
        self.model = model
        self.config = facts(model.config)
        self.layers: list[int] = self.config["moe_layers"]
        tokens, self.max_length = counting.get("tokens"), counting.get("max_length")
        self.path = counting.get("path")
        if self.path is not None:
            check_path(self.path)
        if not self.layers:
            raise ValueError("This model has no router: all its layers are dense.")
        if (tokens is not None and tokens < 1) or (self.max_length is not None and self.max_length < 1):
            raise ValueError(f"tokens={tokens} and max_length={self.max_length} must be at least 1.")
        old = RoutingStats.load(self.path) if self.path is not None and Path(self.path).exists() else None
        self.passes = passes_of(model, tokens, None if old is None else old.about.get("tokens"))
        words = _words(counting.get("vocabulary", False), self.layers)
        _check_memory(model, len(words), self.config["num_experts"])
        self.about = {
            "model": model_digest(model),
            "by": by if by is None or isinstance(by, str) else getattr(by, "__qualname__", type(by).__name__),
            "vocabulary": words,
            "max_length": self.max_length,
            "tokens": self.passes.about,
        }
        self.unembedding = Unembedding(model) if words else None
        self.counts: Counts | None = None
        self.items = 0
        # Items before the window of items that are sorted together, and batches of the window, which are counted.
        self.progress: dict[str, Any] = {"start": 0, "batches": 0, "first": "", "last": "", "window": ""}
        self._saved, self._saving = time.monotonic(), 0.0
        if old is not None:
            self._load(old)

    @property
    def begun(self) -> bool:
        """Whether there is anything to show."""
        return self.counts is not None and self.counts.tokens > 0

    def count(self, items: Iterator[tuple[str, Any]], bar: tqdm) -> None:
        """Counts all items that were not counted before."""
        filler = self.model.prompter.vocabulary.filler
        for window in windows(self._left(items), self.passes.tokens):
            digest = rows_digest([row for rows in window for row in rows])
            if self.progress["batches"] and digest != self.progress["window"]:
                raise self._other_items()
            batches = self.passes.cut(window)
            for number in range(self.progress["batches"], len(batches)):
                batch = self.passes.batch(batches[number], filler)
                seen = routed_tokens(self.model, batch, self.layers, self.unembedding)
                self._add(seen, batch.labels, batch.items, {"batches": number + 1, "window": digest})
                bar.update(len(seen.ids))
                if time.monotonic() - self._saved > max(SAVE_AFTER, 20 * self._saving):
                    self.save()
            first = self.progress["first"] or rows_digest(window[0])
            start = self.progress["start"] + len(window)
            last = rows_digest(window[-1])
            self.progress = {"start": start, "batches": 0, "first": first, "last": last, "window": ""}

    def save(self) -> None:
        """Writes the file, if there is a path and no batch is half counted."""
        if self.path is not None and self.begun and self.counts is not None and self.counts.whole:
            start = time.monotonic()
            self.stats.save(self.path)
            self._saved = time.monotonic()
            self._saving = self._saved - start

    @property
    def stats(self) -> RoutingStats:
        """What was counted so far, the groups sorted."""
        assert self.counts is not None
        # A label has its place before its first batch is counted.
        seen = self.counts.arrays["choices"].flatten(1).any(dim=1).tolist()
        groups = sorted(group for group, number in self.counts.groups.items() if seen[number])
        order = torch.tensor([self.counts.groups[group] for group in groups])
        arrays = {}
        for name, tensor in self.counts.arrays.items():
            tensor = tensor.cpu()
            arrays[name] = (tensor[order] if AXES[name][0] == "group" else tensor).numpy()
        texts = self._token_texts(arrays["vocabulary"]) if "vocabulary" in arrays else {}
        progress = dict(self.progress)
        return RoutingStats(
            groups, self.layers, self.config["num_experts"], self.items, arrays, self.about, texts, progress
        )

    def _add(self, seen: RoutedTokens, labels: list[str], items: int, progress: dict[str, Any]) -> None:
        if self.counts is None:
            self.counts = self._counts(seen.experts.shape[-1])
        # An exception between these lines would leave a count that does not know how far it has come.
        self.counts.add(seen, labels)
        self.counts.whole = False
        self.items += items
        self.progress |= progress
        self.counts.whole = True

    def _counts(self, slots: int) -> Counts:
        text, vocabulary = text_part(self.model.config), self.model.prompter.vocabulary
        kinds = torch.zeros(text.vocab_size, dtype=torch.long)
        kinds[[token for token in vocabulary.special if token < text.vocab_size]] = MODALITIES.index("special")
        if vocabulary.patch_id is not None:
            kinds[vocabulary.patch_id] = MODALITIES.index("image")
        sizes = {"layer": len(self.layers), "slot": slots, "expert": self.config["num_experts"]}
        sizes |= {"d_model": self.config["d_model"], "token_id": text.vocab_size}
        words = [self.layers.index(layer) for layer in self.about["vocabulary"]]
        return Counts(sizes, kinds, words, counting_device(self.model))

    def _load(self, old: RoutingStats) -> None:
        for key, mine in self.about.items():
            theirs = old.about.get(key)
            if mine != theirs or old.progress is None:
                other = f"its {key} is {theirs!r}, not {mine!r}" if mine != theirs else "it is a sum"
                raise ValueError(
                    f"{self.path} holds other statistics: {other}.\n"
                    "Give another path, or delete the file to begin anew."
                )
        assert old.progress is not None
        self.counts = self._counts(old.top_k)
        self.counts.load(old.groups, old.arrays)
        self.items, self.progress = old.items, old.progress

    def _left(self, items: Iterator[tuple[str, Any]]) -> Iterator[list[Row]]:
        """The rows of the items that are not counted yet; the first and the last of the others are looked at."""
        start, number = self.progress["start"], -1
        for number, (label, item) in enumerate(items):
            if number >= start:
                yield rows_of(self.model, item, label, number, self.max_length)
                continue
            for place, key in ((0, "first"), (start - 1, "last")):
                if number == place and self._digest(item, label, number) != self.progress[key]:
                    raise self._other_items()
        if number + 1 < start:
            raise self._other_items()

    def _digest(self, item: Any, label: str, number: int) -> str:
        return rows_digest(rows_of(self.model, item, label, number, self.max_length))

    def _other_items(self) -> ValueError:
        return ValueError(
            f"{self.path} has counted {self.items} items, but those that are given begin otherwise.\n"
            "Give the same prompts in the same order, or another path."
        )

    def _token_texts(self, counts: np.ndarray) -> dict[int, str]:
        seen = np.zeros(counts.shape[2], dtype=bool)
        for kind in range(len(KINDS)):
            for layer in range(counts.shape[1]):
                seen |= counts[kind, layer].any(axis=-1)
        ids = np.flatnonzero(seen).tolist()
        return dict(zip(ids, token_strings(self.model.tokenizer, ids), strict=True))


def _words(vocabulary: bool | Iterable[int], layers: list[int]) -> list[int]:
    """The layers whose vocabulary is counted."""
    if isinstance(vocabulary, bool):
        return layers if vocabulary else []
    chosen = sorted(set(vocabulary))
    wrong = [layer for layer in chosen if layer not in layers]
    if wrong:
        raise ValueError(f"vocabulary has layer {wrong[0]}, which has no router; routers are in {layers}.")
    return chosen


def _check_memory(model: HookedPreTrainedModel, layers: int, num_experts: int) -> None:
    need = len(KINDS) * layers * text_part(model.config).vocab_size * num_experts * torch.int32.itemsize
    device = counting_device(model)
    free = free_nbytes(device)
    if need > free:
        raise MemoryError(
            f"The vocabulary of {layers} routers takes {need / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} "
            "GiB are free.\nCount fewer of them: vocabulary=[layer, ...]."
        )
