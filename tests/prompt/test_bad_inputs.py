"""What a prompt cannot be made from, and what the error says. Nothing bad gives a prompt silently."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import Llama4Config, PreTrainedTokenizerFast

from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompter import Prompter

NOT_CONTENT = [
    (None, "cannot be made from a NoneType"),
    (3, "cannot be made from a int"),
    (b"text", "cannot be made from a bytes"),
    ({"role": "user", "content": "Hi"}, "a single dict was given"),
    ([1.0, 2.0], "cannot be made from a list of float values"),
    ([True, False], "cannot be made from a list of bool values"),
    (["text", 5], "a mixture of texts and token ids"),
    (["text", {"role": "user", "content": "Hi"}], "a mixture of messages and texts"),
    ([[5, 6], [{"role": "user", "content": "Hi"}]], "here they are chat and ids"),
    ([["one"], ["two"]], "here they are text"),
    (torch.tensor([1.0, 2.0]), "the array has torch.float32"),
    (torch.tensor([True]), "the array has torch.bool"),
    (np.array([0.5]), "the array has torch.float64"),
]

BAD_VALUES = [
    ("", "from an empty text"),
    (["one", ""], "from an empty text"),
    ([], "from an empty list"),
    ([[]], "from an empty list"),
    ([[5, 6], []], "from an empty list"),
    (torch.zeros(1, 0, dtype=torch.long), r"shape \[1, 0\]"),
    (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \[1, 2, 3\]"),
    (torch.tensor(5), r"shape \[\]"),
    ([[[5, 6], [7, 8]]], "one dimension too many"),
    ([5, -1, 6], "Token -1 at position 1 of row 0"),
    ([[5], [6, 10**9]], "Token 1000000000 at position 1 of row 1.*\nIds are 0 to"),
]


@pytest.mark.parametrize(("content", "text"), NOT_CONTENT)
def test_what_is_no_content_is_a_type_error_that_names_it(prompter, content, text):
    with pytest.raises(TypeError, match=text) as error:
        prompter(content)
    assert str(error.value).count("\n") < 3


@pytest.mark.parametrize(("content", "text"), BAD_VALUES)
def test_content_of_bad_values_is_an_error_that_names_them(prompter, content, text):
    with pytest.raises(ValueError, match=text) as error:
        prompter(content)
    assert str(error.value).count("\n") < 3


def test_padding_alone_or_between_tokens_is_an_error(prompter, tokenizer):
    pad = tokenizer.pad_token_id
    with pytest.raises(ValueError, match="Row 1 of the ids has no token but padding"):
        prompter([[5, 6], [pad, pad]])
    with pytest.raises(ValueError, match="padding between its tokens, at position 2"):
        prompter([pad, 5, pad, 6])


def test_a_text_or_ids_cannot_end_with_an_answer_header(prompter):
    for content in ("Hi", [5, 6]):
        with pytest.raises(ValueError, match="add_generation_prompt=True needs a chat"):
            prompter(content, add_generation_prompt=True)


def test_an_unknown_normalisation_is_an_error_with_or_without_images(prompter, noise):
    for images in (None, noise(20, 20)):
        with pytest.raises(ValueError, match=r"'hf' .* or 'meta' .*, not 'none'"):
            prompter("Hi", images=images, normalize="none")


@pytest.mark.parametrize(
    ("content", "count", "text"),
    [
        ("<|image|> and <|image|>", 1, "1 images were given, but the prompt has a place for 2"),
        ("<|image|>", 2, "2 images were given, but the prompt has a place for 1"),
        ("<|image|>", 0, "0 images were given, but the prompt has a place for 1"),
        (["one", "two"], 2, "2 images were given, but the prompt has a place for 0"),
        ([{"role": "user", "content": "Hi"}], 1, "1 images were given, but the prompt has a place for 0"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            0,
            "0 images were given, but the prompt has a place for 1",
        ),
    ],
)
def test_more_or_fewer_images_than_places_is_an_error_with_both_counts(prompter, noise, content, count, text):
    with pytest.raises(ValueError, match=text):
        prompter(content, images=[noise(20, 20)] * count)


def test_lists_of_images_must_be_one_for_each_row(prompter, noise):
    image = noise(20, 20)
    with pytest.raises(ValueError, match="Images for 3 rows were given, but the prompt has 2 rows"):
        prompter(["<|image|>", "two"], images=[[image], [], []])
    with pytest.raises(ValueError, match="Row 0 was given 0 images, but it has a place for 1"):
        prompter(["<|image|>", "two <|image|>"], images=[[], [image]])


def test_image_tokens_without_their_image_are_an_error_with_both_counts(prompter, tokenizer, noise):
    patch = tokenizer.convert_tokens_to_ids("<|patch|>")
    with pytest.raises(ValueError, match=r"Row 0 has 3 <\|patch\|> tokens, but its images make 0 image tokens"):
        prompter([5, patch, patch, patch])
    with pytest.raises(ValueError, match=r"Row 0 has 1 <\|patch\|> tokens, but its images make 0"):
        prompter("a <|patch|>")
    with pytest.raises(ValueError, match=r"Row 1 has 15 <\|patch\|> tokens, but its images make 16"):
        prompter([[5], [patch] * 15], images=noise(20, 20))
    with pytest.raises(ValueError, match=r"Row 0 has 17 <\|patch\|> tokens, but its images make 16"):
        prompter("<|patch|><|image|>", images=noise(20, 20))
    with pytest.raises(ValueError, match="2 images were given, but the image tokens of the ids are filled by 1"):
        prompter([patch] * 16, images=[noise(20, 20), noise(20, 20)])
    with pytest.raises(ValueError, match="given for other rows"):
        prompter([[5], [patch] * 16], images=[[noise(20, 20)], []])


def test_an_image_token_typed_in_a_chat_with_parse_special_is_one_too_many(prompter, noise):
    content = [{"type": "image", "image": noise(20, 20)}, {"type": "text", "text": "<|image|>"}]
    with pytest.raises(ValueError, match=r"wrote 2 <\|image\|> for row 0, whose messages have 1 images"):
        prompter([{"role": "user", "content": content}], parse_special=True)


@pytest.mark.parametrize(
    ("image", "kind", "text"),
    [
        ("https://example.org/a.png", ValueError, "is on the web"),
        ("nowhere/a.png", FileNotFoundError, "No image at nowhere/a.png.\nThere is no folder nowhere"),
        (5, TypeError, "cannot be made from a int"),
        (b"bytes", TypeError, "cannot be made from a bytes"),
        (np.zeros((20, 20, 3)), ValueError, "float64"),
        (torch.zeros(3, 20, 20), ValueError, "float32"),
        (np.zeros((3, 20, 20), dtype=np.uint8), ValueError, r"shape \(3, 20, 20\)"),
        (torch.zeros(20, 20, 3, dtype=torch.uint8), ValueError, r"shape \(20, 20, 3\)"),
        (np.zeros((2, 20, 20, 3), dtype=np.uint8), ValueError, "shape"),
        (Image.new("RGB", (0, 5)), ValueError, "at least one pixel"),
        (
            Image.fromarray(np.full((9, 9), 4000, dtype=np.uint16)),
            ValueError,
            "mode I;16 with values from 4000 to 4000",
        ),
        (Image.fromarray(np.full((9, 9), -1.5, dtype=np.float32)), ValueError, "mode F with values from -1.5"),
    ],
)
def test_what_is_no_image_is_an_error_that_says_what_it_is(prompter, image, kind, text):
    with pytest.raises(kind, match=text) as error:
        prompter("What?", images=[image])
    assert str(error.value).count("\n") < 3


def test_a_file_that_is_no_image_or_is_cut_off_is_named(prompter, noise, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"notes.png is not an image that Pillow can read"):
        prompter("What?", images=tmp_path / "notes.png")
    noise(90, 90).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cut.jpg cannot be read.\nPillow says"):
        prompter("What?", images=tmp_path / "cut.jpg")
    with pytest.raises(FileNotFoundError, match=r"The folder has cut.jpg, notes.png"):
        prompter("What?", images=tmp_path / "note.png")


def test_an_image_for_a_text_model_is_an_error(tokenizer, config, noise):
    with pytest.raises(ValueError, match="this model is for text only"):
        Prompter(tokenizer, None, config.get_text_config())("<|image|>", images=noise(20, 20))


def test_parts_of_different_checkpoints_are_an_error(tokenizer, image_processor, config, noise):
    with pytest.raises(ValueError, match="makes tiles of 336 x 336 pixels, the model reads 48 x 48"):
        Prompter(tokenizer, ImageProcessor(), config)
    other = Llama4Config(**{**config.to_dict(), "image_token_index": 7})
    with pytest.raises(ValueError, match=r"is token \d+ of the tokenizer, but the model takes images at token 7"):
        Prompter(tokenizer, image_processor, other)("What?", images=noise(20, 20))
    vocabulary = {token: place for place, token in enumerate("abcdefgh")}
    text_only = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [])))
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|image_start\|> token"):
        Prompter(text_only, image_processor, config)("abc", images=noise(20, 20))


def test_an_image_processor_with_another_rule_is_an_error(tokenizer, image_processor, config, noise):
    class Wrong(ImageProcessor):
        def preprocess(self, images, *args, **kwargs):
            made = super().preprocess(images, *args, **kwargs)
            made["aspect_ratios"] = made["aspect_ratios"].flip(1)
            return made

    with pytest.raises(ValueError, match="the processor is of another model"):
        Prompter(tokenizer, Wrong(size=48, max_patches=4), config)("What?", images=noise(60, 130))
