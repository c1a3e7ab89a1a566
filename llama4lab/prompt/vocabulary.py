"""What the ids of a model mean: the text and the kind of every token, and which id is padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import Llama4Config, Llama4TextConfig, PreTrainedTokenizerFast

from llama4lab.prompt.tokenizer import token_strings


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one model.

    Attributes:
        tokenizer: of the checkpoint; None if there is none, and a token is then shown as its id.
        size: ids are 0 to `size - 1`.
        patch_id: the id of image tokens; None for a model of text only.
        special: the ids of control tokens.
        padding: the id that means padding and nothing else; None if there is no such id.
        filler: the id to pad rows with.
    """

    tokenizer: PreTrainedTokenizerFast | None
    size: int
    patch_id: int | None
    special: frozenset[int]
    padding: int | None
    filler: int

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerFast | None,
        config: Llama4Config | Llama4TextConfig,
    ) -> "Vocabulary":
        """Reads them from the tokenizer and the config of a model."""
        text = config.get_text_config()
        patch = config.image_token_index if isinstance(config, Llama4Config) else None
        if tokenizer is None:
            pad = text.pad_token_id
            # Padding is never attended to: without an id of its own any will do.
            return cls(None, text.vocab_size, patch, frozenset(), None, pad if pad is not None and pad >= 0 else 0)
        special = frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        pad: Any = tokenizer.pad_token_id
        # A tokenizer may pad with the token that ends a text. That one is a token like any other, then.
        padding = pad if pad not in (tokenizer.bos_token_id, tokenizer.eos_token_id) else None
        return cls(tokenizer, text.vocab_size, patch, special, padding, 0 if pad is None else pad)

    def describe(self, ids: Sequence[int]) -> tuple[list[str], list[str]]:
        """Gives text and kind ("pad", "text", "image" or "special") of every token; padding has the text ""."""
        kinds = [self._kind(token) for token in ids]
        texts = token_strings(self.tokenizer, ids)
        return ["" if kind == "pad" else text for text, kind in zip(texts, kinds, strict=True)], kinds

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """Raises ValueError if a row has an id beyond the vocabulary, only padding, or padding between its tokens."""
        for row, ids in enumerate(rows):
            for position, token in enumerate(ids):
                if not 0 <= token < self.size:
                    raise ValueError(
                        f"Token {token} at position {position} of row {row} is not in the vocabulary of the model.\n"
                        f"Ids are 0 to {self.size - 1}."
                    )
            places = [position for position, token in enumerate(ids) if token != self.padding]
            if not places:
                raise ValueError(f"Row {row} of the ids has no token but padding.")
            gap = next((a + 1 for a, b in pairwise(places) if b != a + 1), None)
            if gap is not None:
                raise ValueError(
                    f"Row {row} of the ids has padding between its tokens, at position {gap}.\n"
                    "Padding stands before the first token or after the last one."
                )

    def _kind(self, token: int) -> str:
        if token == self.padding:
            return "pad"
        if token == self.patch_id:
            return "image"
        return "special" if token in self.special else "text"
