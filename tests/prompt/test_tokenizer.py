"""Tokens as a reader sees them, and tokenizers as they lie in a folder."""

import json
import shutil

import pytest

from llama4lab.prompt.control_tokens import ControlTokens
from llama4lab.prompt.tokenizer import load_tokenizer, text_ids, token_id, token_strings

TEXTS = [
    "The capital of France is Paris.",
    "  two spaces,\ttab\n\n\nand lines  ",
    "naïve café — 東京 🙂 👩‍🚀",
    "def f(x):\n    return x ** 2",
    "<|eot|>",
    "a<|eot|>b<|patch|><|image|>",
    "<|eo<|eot|>t|>",
    "<|begin_of_text|>",
    "<|not_a_token|>",
    " <|eot|> \n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_encode_to_what_the_tokenizer_gives_for_the_whole_text(tokenizer, text):
    control = ControlTokens(tokenizer)
    ids = [token for piece in control.split(text) for token in control.encode(piece)]
    assert ids == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_text_ids_hold_no_control_token_and_decode_to_the_text(tokenizer, text):
    ids = text_ids(tokenizer, text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert not set(ids) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_token_strings_of_plain_text_join_to_the_text(tokenizer, text):
    strings = token_strings(tokenizer, text_ids(tokenizer, text))
    joined = "".join(strings)
    if "\\x" not in joined:
        assert joined == text
    else:
        assert joined.encode("latin-1", "backslashreplace")  # single bytes of a character are written as \xe2


def test_bytes_that_are_no_character_alone_can_be_told_apart(tokenizer):
    strings = token_strings(tokenizer, text_ids(tokenizer, "🙂"))
    assert len(set(strings)) == len(strings)
    assert all(string.startswith("\\x") for string in strings)


def test_without_a_tokenizer_a_token_is_shown_as_its_id():
    assert token_strings(None, [3, 17]) == ["<3>", "<17>"]


def test_an_id_that_no_token_has_is_shown_as_its_id(tokenizer):
    assert token_strings(tokenizer, [len(tokenizer) + 5]) == [f"<{len(tokenizer) + 5}>"]


def test_the_id_of_one_token_is_found_by_its_text(tokenizer):
    assert tokenizer.decode([token_id(tokenizer, " Paris")]) == " Paris"
    assert token_id(tokenizer, "<|eot|>") == tokenizer.convert_tokens_to_ids("<|eot|>")


def test_a_text_of_several_tokens_has_no_id_and_the_error_names_them(tokenizer):
    with pytest.raises(ValueError, match="2 tokens: ' Paris', '!'"):
        token_id(tokenizer, " Paris!")
    with pytest.raises(ValueError, match="It is 0 tokens: nothing"):
        token_id(tokenizer, "")


def test_the_error_for_a_word_without_its_space_offers_the_word_with_it(tokenizer):
    assert len(text_ids(tokenizer, "Paris")) > 1
    with pytest.raises(ValueError, match="' Paris' is one token"):
        token_id(tokenizer, "Paris")


def test_a_folder_without_a_tokenizer_is_an_error_that_names_both_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor Meta's tokenizer.model"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_class_of_published_checkpoints_is_accepted(tiny_folder, tmp_path, tokenizer):
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(tiny_folder / name, tmp_path)
    settings = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizer"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    assert loaded.chat_template == tokenizer.chat_template


def test_a_disguise_hides_control_tokens_even_across_strings_and_gives_them_back(tokenizer):
    control = ControlTokens(tokenizer)
    content = [{"a": "<|eo", "<|eot|>": ["t|>", 3, None]}, "\ue000 is taken, and so is \\ue001"]
    disguised, disguise = control.disguise(content)
    assert control.split(disguised[0]["a"] + disguised[0][disguise.put_on("<|eot|>")][0]) != [control.ids["<|eot|>"]]
    assert disguise.take_off(disguised[1]) == content[1]
    assert disguise.take_off(disguised[0]["a"]) == "<|eo"
    assert disguise.take_off(json.dumps(disguised[0]["a"])) == '"<|eo"'
    assert content[0]["a"] == "<|eo", "what was given stays as it is"
