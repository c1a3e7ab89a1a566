"""The prompter of a loaded model: its tokenizer and image processor, read from the checkpoint."""

from pathlib import Path
from typing import Any

from transformers import Llama4Config, PreTrainedTokenizerFast

from llama4lab.checkpoint.gguf.header import read_gguf
from llama4lab.checkpoint.gguf.pieces import beside, parts_of, read_vision
from llama4lab.checkpoint.gguf.vision_settings import image_settings
from llama4lab.checkpoint.meta.ranks import is_meta
from llama4lab.prompt.gguf_tokenizer import gguf_tokenizer
from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompter import Prompter
from llama4lab.prompt.tokenizer import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def prompter_for(model: Any) -> Prompter:
    """Makes the prompter of a model.

    Args:
        model: has a `config`, the `folder` that `load` found it in (of a GGUF checkpoint the file) or None, and the
            `name_or_path` that transformers' `from_pretrained` was given. Without a folder, or with one that has no
            tokenizer, the prompter takes token ids only.
    """
    folder: Path | None = model.folder
    name = getattr(model, "name_or_path", "")
    if folder is None and name and Path(name).is_dir():
        folder = Path(name)
    if folder is None:
        return Prompter(None, None, model.config)
    if folder.suffix == ".gguf" and folder.is_file():
        processor = _gguf_images(folder) if isinstance(model.config, Llama4Config) else None
        return Prompter(_gguf_text(folder), processor, model.config, folder)
    tokenizer = load_tokenizer(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
    processor = load_image_processor(folder)
    vision = getattr(model.config, "vision_config", None)
    if processor is None and vision is not None and is_meta(folder):
        side = vision.image_size
        processor = ImageProcessor(size={"height": side, "width": side}, normalize="meta")
    return Prompter(tokenizer, processor, model.config, folder)


def load_image_processor(folder: Path) -> ImageProcessor | None:
    """Reads the image settings of a checkpoint; None if it has none."""
    if not any((folder / name).is_file() for name in IMAGE_FILES):
        return None
    return ImageProcessor.from_pretrained(folder, local_files_only=True)


def _gguf_text(file: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer beside a GGUF file comes before the one inside."""
    found = next((path for name in TOKENIZER_FILES if (path := beside(file, name)) is not None), None)
    return gguf_tokenizer(read_gguf(parts_of(file)[0])) if found is None else load_tokenizer(found.parent)


def _gguf_images(file: Path) -> ImageProcessor | None:
    found = next((path for name in IMAGE_FILES if (path := beside(file, name)) is not None), None)
    if found is not None:
        return load_image_processor(found.parent)
    vision = read_vision(file)
    return None if vision is None else ImageProcessor(**image_settings(vision))
