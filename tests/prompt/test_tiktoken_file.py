"""Meta's tokenizer.model: the format on a small file of our own, and the published file where it is installed."""

import base64
import random
import sys
from pathlib import Path

import pytest

from llama4lab.prompt import tiktoken_file
from llama4lab.prompt.tiktoken_file import control_token_names, read_tiktoken_file
from llama4lab.prompt.tokenizer import load_tokenizer

MERGED = [b"th", b"the", b" the", b"in", b"ing", b"\n\n", b" t", b"h" * 2, b"12"]


def lines(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkpoint folder with a small tokenizer.model, and a cache of its own."""
    monkeypatch.setenv("LLAMA4LAB_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.model").write_text(lines([bytes([byte]) for byte in range(256)] + MERGED))
    return checkpoint


def test_the_control_tokens_have_the_ids_of_llama_4():
    names = control_token_names()
    assert len(names) == len(set(names)) == tiktoken_file.NUM_CONTROL_TOKENS
    ids = {name: 200_000 + place for place, name in enumerate(names)}
    assert ids["<|begin_of_text|>"] == 200_000
    assert ids["<|header_start|>"] == 200_005
    assert (ids["<|eom|>"], ids["<|eot|>"]) == (200_007, 200_008)
    assert (ids["<|python_start|>"], ids["<|finetune_right_pad|>"]) == (200_016, 200_018)
    assert (ids["<|image_start|>"], ids["<|image_end|>"]) == (200_080, 200_081)
    assert (ids["<|tile_x_separator|>"], ids["<|tile_y_separator|>"]) == (200_084, 200_085)
    assert (ids["<|image|>"], ids["<|patch|>"]) == (200_090, 200_092)
    assert ids["<|reasoning_thinking_start|>"] == 201_142


def test_a_small_file_becomes_a_tokenizer_with_control_tokens_and_a_chat_template(folder):
    tokenizer = load_tokenizer(folder)
    base = 256 + len(MERGED)
    assert len(tokenizer) == base + 2048
    assert tokenizer.encode("the thing") == [base, 256 + 1, ord(" "), 256 + 0, 256 + 4]
    assert tokenizer.encode("<|eot|>", add_special_tokens=False) == [base + 8]
    assert tokenizer.decode(tokenizer.encode("naïve 東京", add_special_tokens=False)) == "naïve 東京"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|begin_of_text|><|header_start|>user<|header_end|>\n\nthe<|eot|>"


def test_the_file_is_converted_once(folder, monkeypatch):
    first = load_tokenizer(folder)
    monkeypatch.setattr(tiktoken_file, "convert", lambda path: pytest.fail("converted again"))
    again = load_tokenizer(folder)
    assert again.encode("the thing <|eot|>") == first.encode("the thing <|eot|>")
    assert again.pad_token == first.pad_token == "<|finetune_right_pad|>"


def test_the_tiktoken_package_is_not_needed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # what the converter of transformers would import
    assert load_tokenizer(folder).decode([256 + 2]) == " the"


def test_another_file_is_converted_anew(folder):
    short = load_tokenizer(folder)
    (folder / "tokenizer.model").write_text(lines([bytes([byte]) for byte in range(256)]))
    assert len(load_tokenizer(folder)) == len(short) - len(MERGED)


def test_an_interrupted_conversion_leaves_nothing_behind(folder, monkeypatch):
    def interrupted(self, path):
        (Path(path) / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiktoken_file.PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_tokenizer(folder)
    assert list(tiktoken_file.cache_folder().iterdir()) == []
    assert load_tokenizer(folder).encode("the", add_special_tokens=False) == [257]


def test_a_cache_that_cannot_be_written_is_an_error_not_a_loop(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA4LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        load_tokenizer(folder)


def test_the_cache_is_below_the_users_cache_directory_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA4LAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiktoken_file.cache_folder() == tmp_path / "llama4lab" / "tokenizers"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Line 1 is not '<base64> <rank>'"),
        (b"\n\x0f\n\x05<unk>\x15\x00\x00", "Line 1 is not"),
        (b"AA== 0\nAQ== one\n", "Line 2 is not"),
        (b"AA== 0\nA! 1\n", "Line 2 is not"),
        (b"AA== 0\nAQ== 2\n", "ranks are not 0, 1, 2"),
        (b"", "holds 0 tokens"),
    ],
    ids=["git lfs", "sentencepiece", "no number", "no base64", "gap", "empty"],
)
def test_a_file_of_another_kind_is_an_error_that_names_the_line(tmp_path, content, text):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_tiktoken_file(tmp_path / "tokenizer.model")


# --- The published file, where the extra `reference` is installed -----------------------------------------------------

RANGES = [(0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1F00, 0x1FFF)]
RANGES += [(0x2000, 0x206F), (0x2190, 0x22FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]
RANGES += [(0x0, 0x1F), (0x300, 0x36F)]
WRITTEN = [
    "The quick brown fox's 12345 jumps, don't you'Ll see?",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # ok\r\n\r\n",
    "   leading and trailing   ",
    "\n\n\n \n\t \n",
    "HTTPServer ÀÉÎ ǅ ßtraße İstanbul",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é e\u0301",
    "a/b//c ... !!! ???/\n",
    "ﬁ ½ Ⅷ ٣٤ १२",
    "\u200b\u2028\u00a0x",
    "<|eot|> <|not|> <|patch|>",
]


def strings(count: int) -> list[str]:
    chooser = random.Random(0)
    made = list(WRITTEN)
    while len(made) < count:
        low, high = chooser.choice(RANGES)
        words = [
            "".join(chr(chooser.randint(low, high)) for _ in range(chooser.randint(1, 12)))
            for _ in range(chooser.randint(1, 8))
        ]
        made.append(chooser.choice([" ", "  ", "\n", "", "'s ", "\t"]).join(words))
    return made


@pytest.fixture(scope="module")
def metas(tmp_path_factory):
    """Meta's own tokenizer, and the same file through ours."""
    module = pytest.importorskip("llama_models.llama4.tokenizer", reason="the extra `reference` is not installed")
    folder, cache = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("cache")
    published = Path(module.__file__).parent / "tokenizer.model"
    (folder / "tokenizer.model").symlink_to(published)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA4LAB_CACHE", str(cache))
        return module.Tokenizer(published), load_tokenizer(folder)


def test_two_thousand_strings_encode_as_metas_tokenizer_encodes_them(metas):
    theirs, ours = metas
    for text in strings(2000):
        expected = theirs.encode(text, bos=True, eos=False, allowed_special="all")
        assert ours.encode(text) == expected, repr(text)
        assert ours.encode(text, split_special_tokens=True) == theirs.encode(text, bos=True, eos=False), repr(text)
        assert ours.decode(expected[1:]) == text


def test_every_control_token_and_the_split_pattern_are_metas(metas):
    theirs, ours = metas
    assert {name: 200_000 + place for place, name in enumerate(control_token_names())} == theirs.special_tokens
    assert ours.get_added_vocab() == theirs.special_tokens
    assert theirs.O200K_PATTERN == tiktoken_file.WORD_PATTERN
