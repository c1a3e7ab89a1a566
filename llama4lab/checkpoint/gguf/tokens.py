"""The ids of control tokens, as a GGUF file states them."""

from typing import Any

from llama4lab.checkpoint.gguf.header import Header

# Of tokens that end an answer.
ENDS = ("eos", "eot", "eom")
IMAGE_TOKENS = {
    "boi_token_index": "<|image_start|>",
    "eoi_token_index": "<|image_end|>",
    "image_token_index": "<|patch|>",
}


def token_ids(header: Header) -> dict[str, Any]:
    """Gives the ids of the tokens that begin, end and fill a text, by their names in config.json."""

    def number(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        return header.get(key, int) if key in header.metadata else None

    ends = [found for found in map(number, ENDS) if found is not None]
    return {
        "bos_token_id": number("bos"),
        "eos_token_id": list(dict.fromkeys(ends)) or None,
        "pad_token_id": number("padding"),
    }


def image_token_ids(header: Header) -> dict[str, int]:
    """Gives the ids of the tokens around and in the place of images, by their names in config.json.

    Raises:
        ValueError: if the vocabulary has no such token.
    """
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return {}  # a file without a vocabulary; the ids are those that config.json has by default
    missing = [token for token in IMAGE_TOKENS.values() if token not in tokens]
    if missing:
        raise ValueError(
            f"{header.file} has no token {missing[0]}, which stands for images, yet a vision tower is there."
        )
    return {key: tokens.index(token) for key, token in IMAGE_TOKENS.items()}
