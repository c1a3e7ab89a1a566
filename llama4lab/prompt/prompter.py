"""Text, chats, token ids and images -> `Prompt`."""

from pathlib import Path
from typing import Any

import torch
from transformers import Llama4Config, Llama4TextConfig, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from llama4lab.model.config_parts import vision_part
from llama4lab.prompt.content import Content
from llama4lab.prompt.control_tokens import ControlTokens
from llama4lab.prompt.draft import Draft, chat_drafts, text_drafts
from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.image_set import ImageSet, check_image_tokens, is_nested, share_by_tokens
from llama4lab.prompt.image_tokens import ImageTokens
from llama4lab.prompt.picture import Picture
from llama4lab.prompt.prompt import Prompt
from llama4lab.prompt.spans import row_spans
from llama4lab.prompt.vocabulary import Vocabulary


class Prompter:
    """Makes prompts for one model.

    Args:
        tokenizer: of the checkpoint; None for a model that takes token ids only.
        image_processor: `ImageProcessor`, or transformers' own; None for a model without images.
        config: of the model; vocabulary, tile size and image tokens are checked against the other two.
        folder: where the checkpoint lies; errors name it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        image_processor: BaseImageProcessor | None,
        config: Llama4Config | Llama4TextConfig,
        folder: Path | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.folder = folder
        self.vocabulary = Vocabulary.of(tokenizer, config)
        self.image_tokens = ImageTokens.of(config)
        self._control = None if tokenizer is None else ControlTokens(tokenizer)
        if self.image_tokens and image_processor is not None:
            self.image_tokens.check_processor(image_processor)

    def __call__(
        self,
        content: Any,
        *,
        images: Any = None,
        normalize: str | None = None,
        parse_special: bool | None = None,
        add_generation_prompt: bool = False,
        upright: bool | None = None,
    ) -> Prompt:
        """Makes a prompt.

        Args:
            content: a text, a chat (a list of messages) or token ids, or a list of one of these, which becomes a batch
                padded on the left.
            images: one image, a list for all rows in order, or a list of lists. Each is a path, a PIL image, a uint8
                array [height, width, channel] or tensor [channel, height, width]. In a text `<|image|>` marks their
                places, without a mark they come first. In token ids their `<|patch|>` tokens must be there already.
            normalize: "hf" or "meta", whose pixel values to make; None leaves it to the image processor ("hf").
            parse_special: whether control tokens in the text act as such. None: yes in a text, which is the whole
                prompt, as in transformers; no inside the messages of a chat, as in Meta's code, so that nobody can end
                a turn by typing `<|eot|>`.
            add_generation_prompt: end each chat with the header of the assistant's answer.
            upright: turn images as their EXIF orientation says. None: files yes, PIL images no, as in transformers.

        Raises:
            TypeError: if the content or an image is of no known kind.
            ValueError: if the parts do not fit each other or the model.
        """
        given = Content.of(content)
        if add_generation_prompt and given.kind != "chat":
            raise ValueError("add_generation_prompt=True needs a chat: a text, or token ids, end as they are written.")
        if given.kind == "ids":
            rows = given.rows
            image_set = self._image_set(_flat(images), upright, normalize)
            of_row = self._rows_of_images(rows, image_set, images)
        else:
            control = self._need_tokenizer(given.kind)
            if given.kind == "chat":
                drafts = chat_drafts(control, given.rows, images, bool(parse_special), add_generation_prompt)
            else:
                drafts = text_drafts(control, given.rows, images, parse_special is not False)
            image_set = self._image_set([image for draft in drafts for image in draft.images], upright, normalize)
            of_row = [row for row, draft in enumerate(drafts) for _ in draft.images]
            rows = self._written_out(control, drafts, image_set)
        return self._assembled(rows, image_set, of_row, given.kind)

    def describe(self, ids: list[int]) -> tuple[list[str], list[str]]:
        """Gives the text and the kind of every token, as in `tokens` and `modality` of a prompt, and checks nothing."""
        return self.vocabulary.describe(ids)

    def _need_tokenizer(self, kind: str) -> ControlTokens:
        if self._control is None:
            where = "The model was not loaded from a folder."
            if self.folder is not None:
                where = f"{self.folder} has no tokenizer, as tokenizer.json or tokenizer.model is one."
            raise ValueError(
                f"A {kind} was given, but this model has no tokenizer.\n{where}\n"
                "Give token ids instead: a list of int, or a [batch, seq] tensor."
            )
        return self._control

    def _image_set(self, sources: list[Any], upright: bool | None, normalize: str | None) -> ImageSet:
        if normalize not in (None, "hf", "meta"):
            raise ValueError(f"normalize is 'hf' (as transformers) or 'meta' (as Meta's code), not {normalize!r}.")
        if not sources:
            return ImageSet([], [], None)
        if self.image_tokens is None:
            raise ValueError(
                f"{len(sources)} images were given, but this model is for text only: it has no vision tower."
            )
        if self.image_processor is None:
            where = f"{self.folder} has no preprocessor_config.json." if self.folder else "None was given."
            raise ValueError(
                f"{len(sources)} images were given, but there is no image processor.\n{where}\n"
                "Make one: llama4lab.prompt.ImageProcessor(size=..., max_patches=...) in a Prompter of your own."
            )
        if self.tokenizer is not None:
            self.image_tokens.check_tokenizer(self.tokenizer)
        return ImageSet.of([Picture.of(source, upright) for source in sources], self.image_processor, normalize)

    def _rows_of_images(self, rows: list[list[int]], image_set: ImageSet, images: Any) -> list[int]:
        if self.image_tokens is None:
            return []
        places = [ids.count(self.image_tokens.patch_id) for ids in rows]
        of_row = share_by_tokens([self.image_tokens.count(tiling) for tiling in image_set.tilings], places)
        if is_nested(images) and of_row != [row for row, own in enumerate(images) for _ in own]:
            raise ValueError(
                "The images were given for other rows than those whose ids have <|patch|> tokens for them."
            )
        return of_row

    def _written_out(self, control: ControlTokens, drafts: list[Draft], image_set: ImageSet) -> list[list[int]]:
        before, after = control.added_around()
        tilings = iter(image_set.tilings)
        rows = []
        for draft in drafts:
            ids: list[int] = []
            for piece in draft.pieces:
                if piece is not None:
                    ids += control.encode(piece)
                elif self.image_tokens is not None:
                    ids += self.image_tokens.text(control.tokenizer, next(tilings))
            rows.append([*before, *ids, *after] if draft.bare else ids)
        return rows

    def _assembled(self, rows: list[list[int]], image_set: ImageSet, of_row: list[int], kind: str) -> Prompt:
        self.vocabulary.check(rows)
        length = max(map(len, rows))
        described = [self.vocabulary.describe(ids) for ids in rows]
        tokens = [[""] * (length - len(texts)) + texts for texts, _ in described]
        modality = [["pad"] * (length - len(kinds)) + kinds for _, kinds in described]
        filler = self.vocabulary.filler
        return Prompt(
            input_ids=torch.tensor([[filler] * (length - len(ids)) + ids for ids in rows]),
            attention_mask=torch.tensor([[int(kind != "pad") for kind in kinds] for kinds in modality]),
            pixel_values=image_set.pixel_values,
            tokens=tokens,
            modality=modality,
            images=self._layouts(modality, image_set, of_row),
            spans=[row_spans(*row, otherwise=kind) for row in zip(tokens, modality, strict=True)],
            tokenizer=self.tokenizer,
        )

    def _layouts(self, modality: list[list[str]], image_set: ImageSet, of_row: list[int]) -> list[ImageLayout]:
        if self.image_tokens is None or not isinstance(self.config, Llama4Config):
            return []
        layouts, first_tile = [], 0
        free = [[position for position, kind in enumerate(row) if kind == "image"] for row in modality]
        counts = [self.image_tokens.count(tiling) for tiling in image_set.tilings]
        for row, places in enumerate(free):
            expected = sum(count for count, own in zip(counts, of_row, strict=True) if own == row)
            check_image_tokens(row, len(places), expected)
        grid, group = self.image_tokens.grid, round(1 / vision_part(self.config).pixel_shuffle_ratio)
        for picture, tiling, row, count in zip(image_set.pictures, image_set.tilings, of_row, counts, strict=True):
            own, free[row] = free[row][:count], free[row][count:]
            layouts.append(ImageLayout.of(tiling, grid, row, first_tile, own, picture.original, group))
            first_tile += tiling.num_tiles
        return layouts


def _flat(images: Any) -> list[Any]:
    if is_nested(images):
        return [image for own in images for image in own]
    return [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
