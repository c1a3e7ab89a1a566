"""Prompts from texts, token ids and images, beside transformers' own processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Llama4Processor, PreTrainedTokenizerFast

from llama4lab.model.promptable import Promptable
from llama4lab.prompt.checkpoint_prompter import prompter_for
from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompter import Prompter

FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def theirs(tokenizer, image_processor) -> Llama4Processor:
    return Llama4Processor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=6, chat_template=tokenizer.chat_template
    )


def asked(*images, text="What is this?") -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# --- Text and ids -------------------------------------------------------------------------------------------------


def test_a_text_has_the_tokens_that_its_tokenizer_gives_it(prompter, tokenizer):
    prompt = prompter(FRANCE)
    assert prompt.input_ids.tolist() == [tokenizer.encode(FRANCE)]
    assert prompt.tokens == [["<|begin_of_text|>", "The", " capital", " of", " France", " is"]]
    assert prompt.modality == [["special", *["text"] * 5]]
    assert prompt.pixel_values is None
    assert prompt.inputs().keys() == {"input_ids", "attention_mask"}


def test_texts_become_a_batch_padded_on_the_left_as_by_transformers(prompter, tokenizer):
    texts = [FRANCE, "one", "one two three"]
    expected = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    prompt = prompter(texts)
    assert torch.equal(prompt.input_ids, expected["input_ids"])
    assert torch.equal(prompt.attention_mask, expected["attention_mask"])
    assert prompt.tokens[1] == ["", "", "", "", "<|begin_of_text|>", "one"]
    assert prompt.modality[1] == ["pad"] * 4 + ["special", "text"]
    assert [span.start for (span,) in prompt.spans] == [0, 4, 2]


def test_control_tokens_in_a_text_act_unless_asked_not_to(prompter, tokenizer):
    text = "a<|eot|>b"
    assert prompter(text).input_ids[0].tolist() == tokenizer.encode(text)
    assert prompter(text).modality[0] == ["special", "text", "special", "text"]
    plain = prompter(text, parse_special=False)
    assert plain.input_ids[0].tolist() == tokenizer.encode(text, split_special_tokens=True)
    assert plain.modality[0].count("special") == 1


def test_a_text_that_begins_with_the_beginning_gets_no_second_one(prompter, tokenizer):
    assert prompter(f"<|begin_of_text|>{FRANCE}").input_ids.tolist() == prompter(FRANCE).input_ids.tolist()


def test_a_text_with_message_headers_has_the_spans_of_its_messages(prompter, tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert prompter(text).spans == prompter(chat).spans
    assert prompter(text).input_ids.tolist() == prompter(chat).input_ids.tolist()


@pytest.mark.parametrize(
    "ids", [[5, 6, 7], (5, 6, 7), [[5, 6, 7]], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), np.array([5, 6, 7])]
)
def test_token_ids_are_taken_as_they_are_in_every_form(prompter, ids):
    prompt = prompter(ids)
    assert prompt.input_ids.tolist() == [[5, 6, 7]]
    assert prompt.attention_mask.tolist() == [[1, 1, 1]]
    assert [span.role for span in prompt.spans[0]] == ["ids"]


def test_rows_of_token_ids_of_several_lengths_are_padded_on_the_left(prompter, tokenizer):
    prompt = prompter([[5, 6, 7], [8], torch.tensor([9, 10])])
    pad = tokenizer.pad_token_id
    assert prompt.input_ids.tolist() == [[5, 6, 7], [pad, pad, 8], [pad, 9, 10]]
    assert prompt.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_padding_at_the_ends_of_token_ids_is_padding(prompter):
    batch = prompter([FRANCE, "one"])
    assert torch.equal(prompter(batch.input_ids).attention_mask, batch.attention_mask)
    assert prompter(batch.input_ids.flip(1)).attention_mask.tolist() == batch.attention_mask.flip(1).tolist()


def test_token_ids_need_no_tokenizer(config):
    prompt = Prompter(None, None, config)([[5, 6], [7]])
    assert prompt.tokens == [["<5>", "<6>"], ["", "<7>"]]
    assert prompt.modality == [["text", "text"], ["pad", "text"]]


def test_a_text_model_takes_texts(tokenizer, config):
    prompt = Prompter(tokenizer, None, config.get_text_config())(FRANCE)
    assert prompt.input_ids.tolist() == [tokenizer.encode(FRANCE)]


# --- Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 20), (48, 48), (60, 130), (130, 60), (96, 96), (300, 40)])
def test_an_image_has_the_tokens_and_values_that_transformers_gives_it(prompter, theirs, noise, size):
    image = noise(*size)
    expected = theirs(text="<|image|>What is this?", images=image, return_tensors="pt")
    prompt = prompter("<|image|>What is this?", images=image)
    assert torch.equal(prompt.input_ids, expected["input_ids"])
    assert torch.equal(prompt.pixel_values, expected["pixel_values"])
    assert prompt.inputs().keys() == {"input_ids", "attention_mask", "pixel_values"}


@pytest.mark.parametrize("answer", [False, True])
def test_a_chat_with_images_has_the_tokens_that_transformers_gives_it(prompter, theirs, noise, answer):
    chat = [{"role": "system", "content": "Look."}, *asked(noise(60, 130), noise(20, 20, seed=1)), *asked()]
    expected = theirs.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=answer
    )
    prompt = prompter(chat, add_generation_prompt=answer)
    assert torch.equal(prompt.input_ids, expected["input_ids"])
    assert torch.equal(prompt.pixel_values, expected["pixel_values"])


def test_a_batch_of_texts_with_images_is_that_of_transformers(prompter, theirs, noise):
    texts, images = ["<|image|> and <|image|>", "none", "this <|image|>"], [noise(60, 130), noise(9, 9), noise(96, 50)]
    expected = theirs(text=texts, images=images, padding=True, return_tensors="pt")
    for given in (images, [images[:2], [], images[2:]]):
        prompt = prompter(texts, images=given)
        assert torch.equal(prompt.input_ids, expected["input_ids"])
        assert torch.equal(prompt.attention_mask, expected["attention_mask"])
        assert torch.equal(prompt.pixel_values, expected["pixel_values"])
        assert [layout.row for layout in prompt.images] == [0, 0, 2]


def test_without_a_mark_images_come_first(prompter, noise):
    images = [noise(60, 130), noise(20, 20)]
    marked = prompter("<|image|><|image|>What?", images=images)
    assert torch.equal(prompter("What?", images=images).input_ids, marked.input_ids)
    assert torch.equal(prompter("What?", images=images[0]).pixel_values, marked.pixel_values[:4])
    rows = prompter(["What?", "And?"], images=[[images[0]], [images[1]]])
    assert [layout.row for layout in rows.images] == [0, 1]


def test_images_without_a_mark_come_after_a_beginning_that_was_typed(prompter, noise):
    image = noise(20, 20)
    typed = prompter("<|begin_of_text|>What?", images=image)
    assert torch.equal(typed.input_ids, prompter("What?", images=image).input_ids)


def test_with_parse_special_off_a_mark_is_text_and_images_come_first(prompter, noise):
    prompt = prompter("the <|image|> token", images=noise(20, 20), parse_special=False)
    assert prompt.tokens[0][1] == "<|image_start|>"
    assert "".join(prompt.tokens[0]).endswith("<|image_end|>the <|image|> token")


def test_image_parts_without_an_image_take_those_given_apart(prompter, noise):
    first, second = noise(20, 20), noise(60, 130)
    whole = prompter(asked(first, second))
    chat = [{"role": "user", "content": [{"type": "image"}, *asked(second)[0]["content"]]}]
    assert torch.equal(prompter(chat, images=[first]).pixel_values, whole.pixel_values)
    assert torch.equal(prompter(chat, images=first).input_ids, whole.input_ids)


def test_token_ids_with_image_tokens_take_images(prompter, noise):
    images = [noise(60, 130), noise(20, 20)]
    whole = prompter("<|image|> and <|image|>", images=images)
    again = prompter(whole.input_ids, images=images)
    assert torch.equal(again.pixel_values, whole.pixel_values)
    assert again.images[1].positions.tolist() == whole.images[1].positions.tolist()
    two = prompter([whole.input_ids[0].tolist(), [5, 6]], images=[images, []])
    assert [layout.row for layout in two.images] == [0, 0]


def test_every_form_of_an_image_gives_the_same_prompt(prompter, noise, tmp_path):
    image = noise(60, 130)
    image.save(tmp_path / "image.png")
    array = np.array(image)
    forms = [array, torch.from_numpy(array).permute(2, 0, 1), tmp_path / "image.png", str(tmp_path / "image.png")]
    expected = prompter("What?", images=image)
    for form in forms:
        prompt = prompter(asked(form, text="What?"))
        assert torch.equal(prompt.pixel_values, expected.pixel_values)
        assert np.array_equal(np.array(prompt.images[0].original), array)


def test_files_are_turned_upright_and_pil_images_are_not_unless_asked(prompter, noise, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 90).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        image.load()

    def sizes(upright):
        return [prompter("?", images=form, upright=upright).images[0].size for form in (tmp_path / "turned.jpg", image)]

    assert sizes(None) == [(90, 40), (40, 90)]
    assert sizes(True) == [(90, 40), (90, 40)]
    assert sizes(False) == [(40, 90), (40, 90)]


def test_the_normalisation_can_be_chosen(prompter, image_processor, noise):
    image = noise(60, 130)
    meta = prompter("?", images=image, normalize="meta").pixel_values
    assert torch.equal(meta, image_processor(image, normalize="meta", return_tensors="pt")["pixel_values"])
    assert not torch.equal(meta, prompter("?", images=image).pixel_values)


def test_layouts_follow_the_chosen_normalisation(tokenizer, config, noise):
    """Meta's code makes this image 352 pixels wide on the canvas, transformers 351."""
    prompter, image = Prompter(tokenizer, ImageProcessor(size=48), config), noise(366, 1342)
    for normalize, width in ((None, 351), ("hf", 351), ("meta", 352)):
        right = prompter("?", images=image, normalize=normalize).images[0].boxes[0, 2]
        assert right.item() == pytest.approx(12 / width * 1342)


def test_layouts_say_where_every_image_token_stands(prompter, noise):
    prompt = prompter(["one two three four five", "<|image|> and <|image|>"], images=[noise(60, 130), noise(20, 20)])
    first, second = prompt.images
    assert (first.row, first.size, first.aspect_ratio, first.num_tiles, first.global_tile) == (
        1,
        (60, 130),
        (1, 3),
        4,
        3,
    )
    assert (second.tiles, second.aspect_ratio, second.grid) == (slice(4, 5), (1, 1), (4, 4))
    own = torch.cat([first.positions, second.positions])
    assert own.tolist() == [place for place, kind in enumerate(prompt.modality[1]) if kind == "image"]
    assert {prompt.tokens[1][place] for place in own.tolist()} == {"<|patch|>"}
    assert len(first.positions) == len(first.places) == len(first.boxes) == 4 * 16
    # Tiles of one row stand apart by a separator, so the tile changes where positions jump.
    jumps = (first.positions.diff() > 1).nonzero().flatten() + 1
    assert first.places[jumps].tolist() == [[1, 0, 0], [2, 0, 0], [3, 0, 0]]


# --- A model ---------------------------------------------------------------------------------------------------------


class Loaded(Promptable):
    def __init__(self, folder, config):
        self.folder, self.config = folder, config


def test_a_model_makes_prompts_from_the_files_of_its_folder(tiny_folder, config, tokenizer, noise):
    model = Loaded(tiny_folder, config)
    assert model.prompt(FRANCE).input_ids.tolist() == [tokenizer.encode(FRANCE)]
    assert model.prompt("?", images=noise(60, 130)).pixel_values.shape == (4, 3, 48, 48)


def test_a_model_without_a_folder_takes_token_ids_and_says_what_is_missing(config):
    model = Loaded(None, config)
    assert len(model.prompt([[5, 6], [7, 8]])) == 2
    with pytest.raises(ValueError, match=r"no tokenizer.\nThe model was not loaded from a folder.\nGive token ids"):
        model.prompt(FRANCE)


def test_a_folder_without_tokenizer_or_image_settings_is_named(config, tmp_path, noise):
    prompter = prompter_for(Loaded(tmp_path, config))
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer, as tokenizer.json or tokenizer.model is one"):
        prompter([{"role": "user", "content": "Hi"}])
    with pytest.raises(ValueError, match=f"{tmp_path} has no preprocessor_config.json"):
        prompter([5, 6], images=noise(20, 20))


def test_what_tokens_mean_can_be_asked_for_without_their_images(prompter, tokenizer):
    patch = tokenizer.convert_tokens_to_ids("<|patch|>")
    texts, kinds = prompter.describe([patch, tokenizer.pad_token_id, 5])
    assert texts == ["<|patch|>", "", tokenizer.decode([5])]
    assert kinds == ["image", "pad", "text"]


def test_a_tokenizer_that_pads_with_its_end_token_keeps_end_tokens(tokenizer, config):
    shared = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eot|>", pad_token="<|eot|>"
    )
    prompt = Prompter(shared, None, config)(["a<|eot|>", "a b c<|eot|>"])
    assert prompt.attention_mask.tolist()[1] == [1] * prompt.input_ids.shape[1]
    assert prompt.attention_mask[0, -1] == 1
    assert prompt.attention_mask[0, 0] == 0
