from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llama4lab.run.corpus.batches import MOST_TILES, batch_of, bucketed, windows
from llama4lab.run.corpus.items import Row, labelled, rows_of


def one(model, item, **options) -> Row:
    (row,) = rows_of(model, item, "x", 0, **options)
    return row


def row(length: int, tiles: int = 0, number: int = 0) -> Row:
    pixels = torch.zeros(tiles, 3, 2, 2) if tiles else None
    return Row(torch.arange(length), pixels, "x", number, first=True)


@dataclass
class Question:
    text: str
    image: Image.Image | None = None
    topic: str = "shapes"


def test_every_kind_of_item_is_the_prompt_that_the_model_would_make(tiny, picture):
    chat = [{"role": "user", "content": "Which shape is red?"}]
    seen = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Which?"}]}]
    ids = tiny.prompt("one two").input_ids
    pairs = [
        ("one two", tiny.prompt("one two")),
        (ids[0].tolist(), tiny.prompt("one two")),
        (ids[0], tiny.prompt("one two")),
        (ids[0].numpy(), tiny.prompt("one two")),
        (chat, tiny.prompt(chat)),
        (seen, tiny.prompt(seen)),
        (tiny.prompt(chat), tiny.prompt(chat)),
        ({"text": "one two", "id": 7}, tiny.prompt("one two")),
        ({"messages": chat, "text": None}, tiny.prompt(chat)),
        ({"prompt": tiny.prompt(seen)}, tiny.prompt(seen)),
        ({"text": "<|image|>What?", "images": [picture]}, tiny.prompt("<|image|>What?", images=[picture])),
        ({"text": "What?", "image": None}, tiny.prompt("What?")),
        (Question("<|image|>What?", picture), tiny.prompt("<|image|>What?", images=picture)),
        (Question("What?"), tiny.prompt("What?")),
    ]
    for item, prompt in pairs:
        found = one(tiny, item)
        assert found.ids.tolist() == prompt.input_ids[0].tolist()
        assert (found.pixels is None) == (prompt.pixel_values is None)
        if found.pixels is not None and prompt.pixel_values is not None:
            assert found.pixels.equal(prompt.pixel_values)


def test_the_rows_of_a_batch_are_cut_out_of_their_padding_with_their_own_images(tiny, picture):
    texts = ["<|image|>a", "b and c and d and many more words than the others have", "<|image|>e<|image|>f"]
    wide = picture.resize((96, 48))
    rows = rows_of(tiny, tiny.prompt(texts, images=[[wide], [], [picture, wide]]), "x", 5)
    apart = [tiny.prompt(texts[0], images=[wide]), tiny.prompt(texts[1]), tiny.prompt(texts[2], images=[picture, wide])]
    assert [own.first for own in rows] == [True, False, False]
    for own, prompt in zip(rows, apart, strict=True):
        assert own.ids.tolist() == prompt.input_ids[0].tolist()
        assert own.num_tiles == (0 if prompt.pixel_values is None else len(prompt.pixel_values))
        if own.pixels is not None and prompt.pixel_values is not None:
            assert own.pixels.equal(prompt.pixel_values)


def test_cutting_keeps_what_comes_first_and_whole_images_only(tiny, picture):
    prompt = tiny.prompt("a b c<|image|>d e<|image|>f", images=[picture, picture])
    first, second = prompt.images
    whole = prompt.input_ids[0].tolist()
    for length in range(1, len(whole) + 2):
        cut = one(tiny, prompt, max_length=length)
        inside = [layout for layout in (first, second) if int(layout.positions.max()) < length]
        assert cut.ids.tolist() == whole[: len(cut.ids)]
        assert len(cut.ids) <= length
        assert cut.num_tiles == sum(layout.num_tiles for layout in inside)
        assert (cut.ids == tiny.config.image_token_id).sum() == sum(len(layout.positions) for layout in inside)


def test_an_error_says_which_item_it_was(tiny):
    with pytest.raises(ValueError, match="empty list") as raised:
        rows_of(tiny, [], "x", 12)
    assert "item 12 of the prompts" in raised.value.__notes__[0]
    for item, says in [({"text": "a", "prompt": "b"}, "has prompt and text"), ({"words": "a"}, "has only words")]:
        with pytest.raises(ValueError, match=says):
            rows_of(tiny, item, "x", 0)


def test_labels():
    rows = [{"text": "a", "domain": "facts"}, {"text": "b", "domain": 3}]
    assert [label for label, _ in labelled(rows, "domain")] == ["facts", "3"]
    assert [label for label, _ in labelled(rows, None)] == ["all", "all"]
    assert [label for label, _ in labelled(["ab", "c"], len)] == ["2", "1"]
    assert [label for label, _ in labelled([Question("x")], "topic")] == ["shapes"]
    assert list(labelled({"a": iter("xy"), 2: "one text"}, None)) == [("a", "x"), ("a", "y"), ("2", "one text")]
    assert list(labelled("one text", None)) == [("all", "one text")]
    with pytest.raises(KeyError, match="it is a str"):
        list(labelled(["text"], "count"))  # a method of str is no label
    with pytest.raises(KeyError, match="SimpleNamespace"):
        list(labelled([SimpleNamespace(text="x")], "domain"))


def test_batches_hold_every_row_once_within_the_limits():
    window = [[row(1 + 13 * n % 29, tiles=int(n % 5 == 0), number=n)] for n in range(60)]
    batches = bucketed(window, 64)
    assert sorted(own.item for rows in batches for own in rows) == list(range(60))
    for rows in batches:
        lengths = [len(own.ids) for own in rows]
        assert lengths == sorted(lengths, reverse=True)
        assert len(rows) == 1 or len(rows) * lengths[0] <= 64
        assert len({own.num_tiles > 0 for own in rows}) == 1
        assert len(rows) == 1 or sum(own.num_tiles for own in rows) <= MOST_TILES
    padded = sum(len(rows) * len(rows[0].ids) for rows in batches)
    assert sum(len(own.ids) for rows in batches for own in rows) > 0.8 * padded


def test_a_window_ends_before_it_grows_too_large():
    found = list(windows(([row(100)] for _ in range(100)), 64))
    assert [len(window) for window in found] == [11] * 9 + [1]
    many = list(windows(([row(1, tiles=17)] for _ in range(40)), 64))
    assert max(sum(own.num_tiles for rows in window for own in rows) for window in many) <= 16 * MOST_TILES + 17


def test_a_batch_is_padded_on_the_left():
    batch = batch_of([row(4), row(2)], filler=9)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [9, 9, 0, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert (batch.labels, batch.items, batch.pixel_values) == (["x", "x"], 2, None)
