"""The tokenizer of a checkpoint folder, and its tokens as a reader can read them."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama4lab.prompt.tiktoken_file import load_tiktoken_file


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a checkpoint: `tokenizer.json`, or else Meta's `tokenizer.model`.

    Raises:
        FileNotFoundError: if the folder has neither.
        ValueError: if the file cannot be read as a tokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read as a tokenizer.\n{error}") from error
    if (folder / "tokenizer.model").is_file():
        return load_tiktoken_file(folder / "tokenizer.model")
    raise FileNotFoundError(
        f"No tokenizer in {folder}.\nIt has neither tokenizer.json nor Meta's tokenizer.model.\n"
        "Add one of them with tokenizer_config.json, or give token ids instead of text."
    )


def token_strings(tokenizer: PreTrainedTokenizerFast | None, ids: Sequence[int]) -> list[str]:
    r"""Gives each token as text: a space stays a space, a byte that is no character alone is written as \xe2.

    Without a tokenizer a token is shown as its id, `<17>`.
    """
    if tokenizer is None:
        return [f"<{token}>" for token in ids]
    added = tokenizer.added_tokens_decoder
    known: dict[int, str] = {}
    for token in set(ids):
        name = tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            known[token] = f"<{token}>"  # ids between the vocabulary and the size of the embedding
        elif token in added:
            known[token] = name
        else:
            known[token] = _readable(name)
    return [known[token] for token in ids]


def token_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Gives the id of the one token that is `text`, a leading space included.

    Raises:
        ValueError: if `text` is not exactly one token.
    """
    added = tokenizer.get_added_vocab()
    ids = [added[text]] if text in added else text_ids(tokenizer, text)
    if len(ids) != 1:
        parts = ", ".join(repr(part) for part in token_strings(tokenizer, ids)) or "nothing"
        near = _nearby_token(tokenizer, text)
        hint = f"{near!r} is one token." if near else "Choose a word that is one token, or use the first of these."
        raise ValueError(f"A single token was asked for by {text!r}.\nIt is {len(ids)} tokens: {parts}.\n{hint}")
    return ids[0]


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encodes text in which control tokens are text like any other; nothing is added in front."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


def _nearby_token(tokenizer: PreTrainedTokenizerFast, text: str) -> str | None:
    bare = text.strip()
    for candidate in (f" {bare}", bare, bare.capitalize(), f" {bare.capitalize()}"):
        if bare and candidate != text and len(text_ids(tokenizer, candidate)) == 1:
            return candidate
    return None


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _readable(name: str) -> str:
    # Byte-level vocabularies write every byte as a printable character: 'Ġ' for a space.
    byte_of = _byte_of()
    if not all(character in byte_of for character in name):
        return name
    return bytes(byte_of[character] for character in name).decode("utf-8", errors="backslashreplace")
