"""The tiny tokenizer: whole words, any text, Llama 4's control tokens, and the files on disk up to date."""

import json

import pytest
from transformers import AutoTokenizer

from llama4lab.tiny import vocabulary
from llama4lab.tiny.domains.catalogue import DRAWS
from llama4lab.tiny.export import HERE
from llama4lab.tiny.packing import Packer
from llama4lab.tiny.progress import documents


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE)


@pytest.mark.parametrize("word", [" Mary", " France", " Paris", " circle", " red", " sept", " fünf", " 47", " drink"])
def test_a_known_word_is_one_token(tokenizer, word):
    assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize(
    "text", ["Antidisestablishmentarianism!", "naïve 漢字 🙂", "a\t\n\n\n  b", "def f(x):\n        return x1"]
)
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_text_begins_with_the_begin_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("Mary")["input_ids"]) == ["<|begin_of_text|>", "Mary"]


def test_control_tokens_are_single_special_tokens(tokenizer):
    for token in vocabulary.SPECIAL_TOKENS:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_a_chat_has_the_layout_of_llama_4(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "Which shape is red?"}]
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": content}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\n<|image|>Which shape is red?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


def test_the_ids_of_the_config_are_those_of_the_tokenizer(tokenizer):
    config = json.loads((HERE / "config.json").read_text())
    named = {"boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>", "image_token_index": "<|patch|>"}
    for field, token in named.items():
        assert config[field] == tokenizer.convert_tokens_to_ids(token)
    assert config["text_config"]["vocab_size"] == len(tokenizer)
    assert config["text_config"]["bos_token_id"] == tokenizer.bos_token_id
    assert config["text_config"]["pad_token_id"] == tokenizer.pad_token_id


def test_words_of_documents_need_no_bytes(tokenizer):
    packer = Packer(tokenizer.backend_tokenizer)
    for domain in DRAWS:
        for document in documents(domain, 20, split="test"):
            ids, weights = packer.tokens(document)
            assert len(ids) == len(weights)
            words = [tokenizer.decode([token]) for token in ids if token < 256]
            assert all(len(word) == 1 and (not word.isalpha() or word in "xyzabcnmkIa") for word in words)


def test_the_settings_on_disk_are_what_the_code_writes(tokenizer):
    for name, content in vocabulary.settings(tokenizer.backend_tokenizer).items():
        assert json.loads((HERE / name).read_text()) == content, name


def test_the_vocabulary_on_disk_has_every_word_and_every_byte(tokenizer):
    known = tokenizer.get_vocab()
    for word in vocabulary.words(documents=50):
        assert len(tokenizer.tokenize(word)) == 1, word
    assert len([entry for entry in known if len(entry) == 1]) == 256
