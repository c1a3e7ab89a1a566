"""The data of a prompt: rows, positions, ids, joining, and how it shows itself."""

import re
from html.parser import HTMLParser

import pytest
import torch

from llama4lab.prompt.joining import joined
from llama4lab.prompt.prompter import Prompter

FRANCE = "The capital of France is"


@pytest.fixture
def batch(prompter, noise):
    """Row 0 has two images, row 1 none, row 2 one."""
    texts = ["<|image|> one <|image|>", FRANCE, "two <|image|> two"]
    return prompter(texts, images=[noise(60, 130), noise(20, 20), noise(96, 50)])


def test_its_length_is_the_number_of_rows(batch):
    assert len(batch) == 3


def test_a_row_keeps_its_padding_and_its_images(batch):
    for index, tiles in ((0, slice(0, 5)), (2, slice(5, 10))):
        row = batch.row(index)
        assert torch.equal(row.input_ids, batch.input_ids[index : index + 1])
        assert torch.equal(row.pixel_values, batch.pixel_values[tiles])
        assert [layout.row for layout in row.images] == [0] * len(row.images)
        assert row.images[0].tiles.start == 0
        assert row.images[-1].tiles.stop == len(row.pixel_values)
        own = [layout for layout in batch.images if layout.row == index]
        assert all(torch.equal(a.positions, b.positions) for a, b in zip(row.images, own, strict=True))
    assert batch.row(1).pixel_values is None
    assert batch.row(-1).tokens == [batch.tokens[2]]


def test_a_row_that_is_not_there_is_an_error(batch):
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"Row {index} was asked for, but the prompt has 3 rows"):
            batch.row(index)


def test_moving_it_moves_what_the_model_reads(batch):
    moved = batch.to("meta")
    assert {name: value.device.type for name, value in moved.inputs().items()} == dict.fromkeys(batch.inputs(), "meta")
    assert batch.input_ids.device.type == "cpu"
    assert moved.tokens is batch.tokens


def test_the_position_of_a_token_is_found_by_its_text(prompter):
    prompt = prompter(["a b", "The cat saw the cat"])
    assert prompt.tokens[1][prompt.position(" saw", row=1)] == " saw"
    first = prompt.position(" cat", row=1, occurrence=0)
    assert prompt.position(" cat", row=-1, occurrence=-1) > first
    assert prompt.position("<|begin_of_text|>") == len(prompt.tokens[0]) - prompt.modality[0][::-1].index("special") - 1


def test_a_token_that_stands_twice_needs_an_occurrence(prompter):
    prompt = prompter("The cat saw the cat")
    with pytest.raises(ValueError, match=r"2 tokens of row 0 are ' cat', at positions \d+, \d+"):
        prompt.position(" cat")
    with pytest.raises(ValueError, match=r"occurrence=2 of ' cat' .*\nIt has 2"):
        prompt.position(" cat", occurrence=2)


def test_a_token_that_is_not_there_is_an_error_that_lists_near_ones(prompter):
    prompt = prompter(FRANCE)
    with pytest.raises(ValueError, match=r"No token of row 0 is 'France'.\nNear ones are ' France'"):
        prompt.position("France")
    with pytest.raises(ValueError, match=r"Its tokens begin '<\|begin_of_text\|>'"):
        prompt.position("zzzzzzzz")
    with pytest.raises(ValueError, match="No token of row 0 is ''"):
        prompt.position("")


def test_it_knows_the_ids_of_tokens_as_long_as_it_has_a_tokenizer(prompter, tokenizer, config):
    assert tokenizer.decode([prompter(FRANCE).token_id(" Paris")]) == " Paris"
    with pytest.raises(ValueError, match="this prompt has no tokenizer"):
        Prompter(None, None, config)([5]).token_id(" Paris")


def test_joined_prompts_are_the_batch_made_at_once(prompter, noise):
    images = [noise(60, 130), noise(20, 20), noise(96, 50)]
    texts = ["<|image|> one <|image|>", FRANCE, "two <|image|> two"]
    at_once = prompter(texts, images=images)
    one_by_one = [prompter(texts[0], images=images[:2]), prompter(texts[1]), prompter(texts[2], images=images[2])]
    whole = joined(one_by_one)
    for name, value in at_once.inputs().items():
        assert torch.equal(whole.inputs()[name], value)
    assert (whole.tokens, whole.modality, whole.spans) == (at_once.tokens, at_once.modality, at_once.spans)
    for mine, theirs in zip(whole.images, at_once.images, strict=True):
        assert (mine.row, mine.tiles) == (theirs.row, theirs.tiles)
        assert torch.equal(mine.positions, theirs.positions)
    assert one_by_one[2].images[0].row == 0, "the parts stay as they were"


def test_nothing_cannot_be_joined():
    with pytest.raises(ValueError, match="there are none"):
        joined([])


def test_its_repr_is_one_readable_line(batch):
    assert re.fullmatch(r"Prompt\(3 x \d+ tokens, 3 images: '<\|begin_of_text\|>.*\)", repr(batch))
    assert repr(batch.images[0]) == "ImageLayout(row 0, 60 x 130 pixels, 1 x 3 tiles, 64 image tokens)"


class Seen(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_its_html_escapes_every_token(prompter):
    seen = Seen(prompter("<script>alert(1)</script> & <b>\"'")._repr_html_())
    assert {tag for tag, _ in seen.tags} <= {"div", "span", "hr", "img", "i"}
    assert "<script>alert(1)</script> & <b>\"'" in seen.text


def test_its_html_folds_padding_and_image_tokens_and_shows_line_ends(batch, prompter):
    text = Seen(batch._repr_html_()).text
    assert text.count("<|patch|> × 16") == 4 + 1 + 5
    assert re.search(r"pad × \d+", text)
    assert "↵" in Seen(prompter([{"role": "user", "content": "Hi"}])._repr_html_()).text


def test_its_html_shows_every_image_small_and_from_within(batch):
    pictures = [attributes["src"] for tag, attributes in Seen(batch._repr_html_()).tags if tag == "img"]
    assert len(pictures) == 3
    assert all(source.startswith("data:image/png;base64,") and len(source) < 60_000 for source in pictures)


def test_its_html_of_a_long_prompt_is_cut(prompter):
    html = prompter([[5, 6] * 1500])._repr_html_()
    assert "1000 more tokens" in html
    assert len(html) < 600_000
