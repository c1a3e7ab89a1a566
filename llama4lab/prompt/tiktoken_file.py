"""Meta's `tokenizer.model` -> a tokenizer of the tokenizers library, converted once and kept in the user's cache.

Checkpoints as Meta publishes them hold the vocabulary in tiktoken's format: a line per token with its bytes in base64
and its rank. The split pattern, the control tokens and the begin-of-text rule are not in the file; they stand here.
"""

import base64
import binascii
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.llama4.processing_llama4 import chat_template

NUM_CONTROL_TOKENS = 2048
# Control tokens in the order of their ids; (family, first, stop) stands for a run of reserved names.
CONTROL_TOKENS = (
    *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
    *("header_start", "header_end", "eom", "eot", "step", ("text_post_train_", 0, 6)),
    *("python_start", "python_end", "finetune_right_pad", ("text_post_train_", 8, 69)),
    *("image_start", "image_end", ("vision_", 0, 2), "tile_x_separator", "tile_y_separator", ("vision_", 2, 6)),
    *("image", ("vision_", 6, 7), "patch", ("vision_", 7, 1048)),
    *(("reasoning_", 0, 8), "reasoning_thinking_start", "reasoning_thinking_end", ("", 0, 904)),
)

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Text is cut into words before merging: a word in title or lower case, a word in capitals, up to three digits,
# punctuation, line ends, other white space.
WORD_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def control_token_names() -> list[str]:
    """Gives the 2,048 control tokens of Llama 4 in the order of their ids."""
    names: list[str] = []
    for entry in CONTROL_TOKENS:
        if isinstance(entry, str):
            names.append(f"<|{entry}|>")
        else:
            family, first, stop = entry
            names += [f"<|{family}reserved_special_token_{number}|>" for number in range(first, stop)]
    return names


def read_tiktoken_file(path: Path) -> dict[bytes, int]:
    """Reads the rank of every token of a file in tiktoken's format.

    Raises:
        ValueError: if the file is in another format or its ranks are not 0, 1, 2, ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path} was read as Meta's tokenizer.model of Llama 4.\nLine {number} is not '<base64> <rank>': "
                f"{line[:40]!r}.\nA SentencePiece model (Llama 2) or a Git LFS pointer is none; get tokenizer.json."
            ) from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} holds {len(ranks)} tokens whose ranks are not 0, 1, 2, ...: the file is damaged.")
    return ranks


class _Converter(TikTokenConverter):
    """transformers' converter, reading the file itself so that the tiktoken package is not needed."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_tiktoken_file(Path(tiktoken_url))


def convert(path: Path) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from `tokenizer.model`; takes about ten seconds for the published file."""
    names = control_token_names()
    backend = _Converter(vocab_file=str(path), pattern=WORD_PATTERN, extra_special_tokens=names).converted()
    begin = names[0]
    backend.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def cache_folder() -> Path:
    """Gives the folder for converted tokenizers: below LLAMA4LAB_CACHE, or else the user's cache directory."""
    chosen = os.environ.get("LLAMA4LAB_CACHE")
    cache = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama4lab"
    return cache / "tokenizers"


def load_tiktoken_file(path: Path) -> PreTrainedTokenizerFast:
    """Loads a `tokenizer.model`, from the cache where the same file (by its sha256) was converted before."""
    kept = cache_folder() / hashlib.sha256(path.read_bytes()).hexdigest()
    if not kept.is_dir():
        tokenizer = convert(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".unfinished-"))
        try:
            tokenizer.save_pretrained(fresh)
            # Renamed when complete: a second process, or an interrupt, never sees half a tokenizer.
            fresh.rename(kept)
        except OSError:
            # Another process may have been faster; its copy is as good. Otherwise the disk is the problem.
            if not kept.is_dir():
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return PreTrainedTokenizerFast.from_pretrained(kept)
