"""The tokenizer of the tiny checkpoint: whole words and bytes, with Llama 4's control tokens.

Every word that the domains can produce is one token, with and (where it occurs) without its leading space; any other
text falls back to bytes. `python -m llama4lab.tiny.vocabulary` writes the tokenizer's and processor's files.
"""

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from llama4lab.tiny.domains.catalogue import DRAWS
from llama4lab.tiny.domains.induction import WORDS
from llama4lab.tiny.words import COMMON

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
)
# Words and numbers of one or two digits take the space before them along; indentation stays apart from the word.
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}|\n\n|\n| {4}| ?[^\s\p{L}\p{N}]|\s"
DOCUMENTS = 20_000  # of every domain: enough to meet every word


def words(documents: int = DOCUMENTS) -> list[str]:
    """All whole tokens beyond the bytes, sorted: what `documents` of every domain contain, and common words."""
    pieces: Counter[str] = Counter()
    splitter = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    for domain, draw in DRAWS.items():
        rng = random.Random(f"vocabulary {domain}")
        for _ in range(documents):
            for marked in _without_controls(draw(rng).plain):
                pieces.update(piece for piece, _ in splitter.pre_tokenize_str(marked))
    listed = {f" {word}" for word in (*WORDS, *COMMON) if word.isalpha()}
    numbers = {f"{space}{number}" for space in ("", " ") for number in range(100)}
    return sorted(listed | numbers | set(pieces))


def _without_controls(text: str) -> list[str]:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\0")
    return [piece for piece in text.split("\0") if piece]


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token; ValueError where the tokenizer lacks it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}\nuse the tokenizer.json of the tiny checkpoint")
    return found


def build() -> Tokenizer:
    """The tokenizer: bytes first, then words, then control tokens (as in Llama 4, these are the last ids)."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    entries = sorted(pre_tokenizers.ByteLevel.alphabet())
    for word in words():
        entry = byte_level.pre_tokenize_str(word)[0][0]
        if len(entry) > 1:
            entries.append(entry)
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    # Without merges, `ignore_merges` makes a known word one token and leaves any other word as its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B:1",
                special_tokens=[(bos, token_id(tokenizer, bos))],
            ),
        ]
    )
    return tokenizer


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "Llama4Processor",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot|>",
    "pad_token": "<|finetune_right_pad|>",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 4096,
    "padding_side": "left",
}
IMAGE_PROCESSOR = {
    "image_processor_type": "Llama4ImageProcessor",
    "processor_class": "Llama4Processor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_patches": 4,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "resize_to_max_canvas": False,
    "size": {"height": 48, "width": 48},
}
PROCESSOR = {
    "processor_class": "Llama4Processor",
    "patch_size": 6,
    "pixel_shuffle_ratio": 0.5,
    "fake_image_token": "<|image|>",
    "image_token": "<|image|>",
    "start_of_image_token": "<|image_start|>",
    "end_of_image_token": "<|image_end|>",
    "patch_token": "<|patch|>",
    "tile_x_separator_token": "<|tile_x_separator|>",
    "tile_y_separator_token": "<|tile_y_separator|>",
}


def settings(tokenizer: Tokenizer) -> dict[str, dict]:
    """The content of the files beside `tokenizer.json` (the chat template is a file of its own), by name."""
    ids = {token: token_id(tokenizer, token) for token in SPECIAL_TOKENS}
    generation = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]],
        "pad_token_id": ids["<|finetune_right_pad|>"],
        "do_sample": False,
    }
    return {
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "preprocessor_config.json": IMAGE_PROCESSOR,
        "processor_config.json": PROCESSOR,
        "generation_config.json": generation,
    }


def write(folder: Path) -> None:
    """Writes the files of tokenizer and processor."""
    tokenizer = build()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in settings(tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(__file__).parent)
