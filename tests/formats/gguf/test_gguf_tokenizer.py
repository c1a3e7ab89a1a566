"""The tokenizer inside a GGUF file gives the ids, and the chats, of the tokenizer that was written into it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import llama4lab as lab
from llama4lab.checkpoint.locating import TINY
from llama4lab.prompt.tiktoken_file import WORD_PATTERN

CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>"]
CONTROL += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", "<|image_start|>", "<|image_end|>"]
CONTROL += ["<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>"]
CORPUS = ["When Mary and John went to the store, John gave a drink to Mary. It cost 1234 dollars; they're GLAD!"] * 3
CORPUS += [
    "def f(x):\n    return x ** 2\n\n",
    "Der Fluß fließt über 12.000 Steine.",
    "東京は日本の首都です。",
    "naïve café 🙂",
]
TEXTS = [
    *CORPUS, "", " ", "  two  spaces ", "\n\n\n", "tabs\tand\r\nline ends", "12345678901", "They'LL've it's", "ÄÖÜ äöü",
    "\u0000\u200b\ufeff", "🙂🙃👩‍👩‍👧", "مرحبا بالعالم", "<|eot|>typed<|nothing|>", "a/b//c\n/d", "MixedCASE",
    "the" + " " * 50, "x" * 300, "camelCase", "e\u0301 combining", "don't DON'T Don'T",
]  # fmt: skip


@pytest.fixture(scope="module")
def original() -> PreTrainedTokenizerFast:
    """A tokenizer built as that of Llama 4 is, with fewer merges."""
    backend = Tokenizer(BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROL])
    begin = CONTROL[0]
    backend.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        chat_template=(TINY / "chat_template.jinja").read_text(),
        padding_side="left",
    )


def metadata(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What llama.cpp's converter writes of a tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens, special = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), set(tokenizer.all_special_tokens)
    special |= {token.content for token in tokenizer.added_tokens_decoder.values()}
    said = {
        "model": "gpt2",
        "pre": "llama4",
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]] or ["a b"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": True,
    }
    chat = {"tokenizer.chat_template": tokenizer.chat_template}
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()} | chat


@pytest.fixture(scope="module")
def written(original, gguf_saved, new_text_model, new_model):
    """A model without config.json, with that tokenizer; changes replace entries, None takes one away."""

    def save(vision: bool = False, config: bool = False, **changes) -> Path:
        entries = metadata(original) | {f"tokenizer.{key}": value for key, value in changes.items()}
        kept = {key: value for key, value in entries.items() if value is not None}
        large = {"vocab_size": len(original), "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
        model = (new_model if vision else new_text_model)(**large)
        return gguf_saved(model, "F32", config=config, **kept)

    return save


def test_ids_and_words_are_those_of_the_original(written, original):
    ours = lab.load(written()).prompt("x").tokenizer
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text), text
        assert ours.encode(text, split_special_tokens=True) == original.encode(text, split_special_tokens=True)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    assert ours.encode("a", "b") == original.encode("a", "b")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "padding_side", "all_special_ids"):
        assert getattr(ours, name) == getattr(original, name)


def test_chats_are_those_of_the_original(written, original):
    ours = lab.load(written()).prompt("x").tokenizer
    for text in TEXTS[:8]:
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        for generate in (True, False):
            both = [each.apply_chat_template(chat, add_generation_prompt=generate) for each in (ours, original)]
            assert both[0]["input_ids"] == both[1]["input_ids"]


def test_the_config_takes_its_tokens_from_the_file(written, original):
    config: Any = lab.load(written()).config
    ids = original.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>"])
    assert [config.bos_token_id, *config.eos_token_id, config.pad_token_id] == ids


def test_images_are_prepared_as_the_vision_tower_says(written):
    model = lab.load(written(vision=True))
    picture = np.arange(30 * 50 * 3, dtype=np.uint8).reshape(30, 50, 3)
    prompt = model.prompt("<|image|>What is it?", images=picture)
    assert prompt.pixel_values.shape[1:] == (3, 24, 24)
    assert model(**prompt.inputs()).logits.isfinite().all()


def test_a_tokenizer_beside_the_file_comes_first(written, original):
    file = written()
    original.save_pretrained(file.parent)
    assert lab.load(file).prompt("x").tokenizer.name_or_path == str(file.parent)


def test_a_file_with_a_whole_tokenizer_json_uses_that(gguf_saved):
    """The packaged checkpoint cuts words by a rule of its own, which no name in GGUF stands for."""
    model = lab.load()
    tiny = model.prompt("x").tokenizer
    said = metadata(tiny) | {"tokenizer.huggingface.json": tiny.backend_tokenizer.to_str()}
    ours = lab.load(gguf_saved(model, "F32", **said))
    for text in TEXTS:
        assert ours.prompt(text or "x").input_ids.tolist() == model.prompt(text or "x").input_ids.tolist()
        chat = [{"role": "user", "content": text}]
        ids = [each.prompt(chat, add_generation_prompt=True).input_ids.tolist() for each in (ours, model)]
        assert ids[0] == ids[1]


def test_a_file_without_a_vocabulary_takes_ids_only(written):
    gone = {f"ggml.{key}": None for key in ("tokens", "token_type", "merges", "model", "pre")}
    file = written(**gone, **{"ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.padding_token_id": 0})
    model = lab.load(file)
    assert model.prompt([[5, 6]]).input_ids.tolist() == [[5, 6]]
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        model.prompt("text")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ggml.model", "llama", "of kind 'llama' with words cut as for 'llama4'"),
        ("ggml.pre", "qwen2", "words cut as for 'qwen2'"),
        ("ggml.token_type", [1, 2], "have 2 types"),
        ("ggml.token_type", None, "token_type is no list of int"),
        ("ggml.tokens", [1, 2], "tokens is no list of strings"),
        ("ggml.tokens", ["a", "a"], "tokens, 1 of them different"),
        ("ggml.merges", ["a b c"], "a merge is two tokens and a space"),
        ("ggml.merges", ["zz yy"], "merges do not fit the vocabulary"),
        ("ggml.bos_token_id", 10**6, "bos_token_id is 1000000"),
        ("huggingface.json", "{}", "cannot be read as a tokenizer"),
    ],
)
def test_a_tokenizer_that_is_damaged_is_refused(written, key, value, message):
    file = written(**{key: value})
    with pytest.raises(ValueError, match=message) as error:
        lab.load(file).prompt("text")
    assert "model.gguf" in str(error.value)
