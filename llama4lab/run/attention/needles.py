"""Needles: one fact among others, so many tokens before it is asked for, and at a chosen place of its chunk.

The text stays the same wherever the needle stands in its chunk: what moves is the position that the text begins at.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.recording import as_prompt

# Distance -> the prompt, in which the needle stands that many tokens before the last one; what comes next; and, if one
# is given, a prompt of the same length that does not tell what comes next.
Make = Callable[[int], tuple[Any, str | int] | tuple[Any, str | int, Any]]

ROWS = 16  # of one pass
OWNERS = 4
NAMES = ("Mary", "John", "Tom", "Anna", "James", "Lucy", "Peter", "Sarah", "David", "Emma", "Paul", "Laura", "Mark")
THINGS = ("book", "ring", "key", "letter", "ball", "apple", "cake", "map", "lamp", "bag", "coin", "flower", "cup")
PLACES = ("park", "school", "office", "house", "garden", "station", "market", "museum", "library", "church", "farm")
QUESTION, END = ("has", "the"), "."


@dataclass(frozen=True)
class Needle:
    """One question.

    Attributes:
        ids: The tokens of the text; the answer follows.
        answer: The token that is right.
        distance: How many tokens before the last one the needle stands.
        control: The tokens of a text of the same length that does not tell the answer; None if there is none.
    """

    ids: list[int]
    answer: int
    distance: int
    control: list[int] | None = None

    @property
    def place(self) -> int:
        """Where the needle stands in the text."""
        return len(self.ids) - 1 - self.distance


def owners(model: HookedPreTrainedModel, seed: int = 0) -> Make:
    """Makes needles of the kind "Mary has the key." among other owners, with sentences about places up to the question.

    The control is the same text, but that the key is of somebody nobody asks for: who finds it now, guesses.

    Args:
        model: The model, for its tokenizer; every word has to be one token.
        seed: Of the draw.

    Raises:
        ValueError: if the model has no tokenizer, or too few of the words are one token.
    """
    if model.tokenizer is None:
        raise ValueError("Needles are made of words, and this model has no tokenizer.\nPass make=..., with token ids.")
    names, things, places = (_single_tokens(model, words) for words in (NAMES, THINGS, PLACES))
    fixed = _single_tokens(model, (*QUESTION, "The", "is", "open"))
    end = model.tokenizer.encode(END, add_special_tokens=False)
    if len(names) <= OWNERS or len(things) < OWNERS or not places or len(fixed) < 5 or len(end) != 1:
        raise ValueError("Needles are made of words that are one token each, which few are here.\nPass make=...")
    has, the, begin, *rest = fixed.values()
    rng, bos = random.Random(seed), model.tokenizer.bos_token_id
    start = [bos] if isinstance(bos, int) else []

    def make(distance: int) -> tuple[list[int], int, list[int]]:
        if distance < OWNERS:
            raise ValueError(f"A needle {distance} tokens before the end was asked for; the question takes {OWNERS}.")
        *owner, stranger = rng.sample(list(names.values()), OWNERS + 1)
        thing = rng.sample(list(things.values()), OWNERS)
        stated = [[name, has, the, own, *end] for name, own in zip(owner, thing, strict=True)]
        # Behind the needle: its full stop, other owners, sentences, and the question of three tokens.
        later = rng.randint(0, min(OWNERS - 1, (distance - 4) // 5))
        asked, filler = OWNERS - 1 - later, distance - 4 - 5 * later
        sentences = [[begin, rng.choice(list(places.values())), *rest, *end] for _ in range(filler // 5 + 1)]
        between = [token for sentence in sentences for token in sentence]
        between = between[len(between) - filler :]
        text = [*start, *(token for fact in stated for token in fact), *between, owner[asked], has, the]
        control = list(text)
        control[len(start) + 5 * asked] = stranger
        return text, thing[asked], control

    return make


def made(model: HookedPreTrainedModel, make: Make, distance: int, count: int) -> list[Needle]:
    """Calls `make` and checks what it gives.

    Raises:
        ValueError: if a prompt is not one row of text, is shorter than the distance, or the answer is no token; or a
            control has another length.
    """
    needles = []
    for _ in range(count):
        content, answer, *others = make(distance)
        ids, *control = (_row(model, one, distance) for one in (content, *others))
        if control and len(control[0]) != len(ids):
            raise ValueError(f"make({distance}) gave {len(ids)} tokens, and a control of {len(control[0])}.")
        needles.append(Needle(ids, _answer(model, answer), distance, control[0] if control else None))
    return needles


def _row(model: HookedPreTrainedModel, content: Any, distance: int) -> list[int]:
    """The tokens of a prompt, checked."""
    prompt = as_prompt(model, [content] if isinstance(content, list) and isinstance(content[0], int) else content)
    if len(prompt) != 1 or prompt.pixel_values is not None:
        raise ValueError(f"make({distance}) gave {len(prompt)} rows or an image; give one row of text.")
    ids = prompt.input_ids[0][prompt.attention_mask[0].bool()].tolist()
    if not 0 <= distance < len(ids):
        raise ValueError(f"make({distance}) gave {len(ids)} tokens, so nothing stands {distance} before the last.")
    return ids


def _answer(model: HookedPreTrainedModel, answer: str | int) -> int:
    """The first token of an answer."""
    if isinstance(answer, int) and 0 <= answer < model.text.config.vocab_size:
        return answer
    ids = []
    if isinstance(answer, str) and model.tokenizer is not None:
        ids = model.tokenizer.encode(answer, add_special_tokens=False)
    if not ids:
        raise ValueError(f"make gave the answer {answer!r}, which is no token of this model.")
    return ids[0]


def chunk_of(model: HookedPreTrainedModel, borders: Sequence[int | None]) -> int | None:
    """The chunk size that borders are about.

    Raises:
        ValueError: if there are borders and no chunks.
    """
    size = facts(model.config, model.text)["chunk_size"]
    if size is None and any(border is not None for border in borders):
        raise ValueError("Needles were to stand at borders of chunks; no layer has chunks.\nPass borders=[None].")
    return size


@torch.no_grad()
def found(
    model: HookedPreTrainedModel, needles: list[Needle], border: int | None
) -> tuple[Bool[Tensor, " needle"], Float[Tensor, " needle"]]:
    """Whether each answer is the most probable next token, and its log probability.

    Args:
        model: The model.
        needles: The questions.
        border: Where each needle stands: 0 at the first token of a chunk, -1 at the last of the one before; None to
            begin each text at position 0.
    """
    size = chunk_of(model, [border])
    correct, log_probs = [], []
    for first in range(0, len(needles), ROWS):
        some = needles[first : first + ROWS]
        length = max(len(needle.ids) for needle in some)
        ids, mask, positions = (torch.zeros(len(some), length, dtype=torch.long) for _ in range(3))
        for row, needle in enumerate(some):
            offset = 0 if border is None or size is None else (border - needle.place) % size
            own = slice(length - len(needle.ids), None)
            ids[row, own], mask[row, own] = torch.tensor(needle.ids), 1
            positions[row, own] = torch.arange(offset, offset + len(needle.ids))
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        last = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1).cpu()
        answers = torch.tensor([needle.answer for needle in some])
        correct.append(last.argmax(-1) == answers)
        log_probs.append(last.gather(-1, answers[:, None])[:, 0])
    return torch.cat(correct), torch.cat(log_probs)


def _single_tokens(model: HookedPreTrainedModel, words: Sequence[str]) -> dict[str, int]:
    """Those of the words, with a space before them, that are one token."""
    assert model.tokenizer is not None
    encoded = {word: model.tokenizer.encode(f" {word}", add_special_tokens=False) for word in words}
    return {word: ids[0] for word, ids in encoded.items() if len(ids) == 1}
