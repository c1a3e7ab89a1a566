"""The prompter of a loaded model: its tokenizer and image processor, read from the folder of the checkpoint."""

from pathlib import Path
from typing import Any

from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompter import Prompter
from llama4lab.prompt.tokenizer import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def prompter_for(model: Any) -> Prompter:
    """Makes the prompter of a model.

    Args:
        model: has a `config`, the `folder` that `load` found it in or None, and the `name_or_path` that transformers'
            `from_pretrained` was given. Without a folder, or with one that has no tokenizer, the prompter takes token
            ids only.
    """
    folder: Path | None = model.folder
    name = getattr(model, "name_or_path", "")
    if folder is None and name and Path(name).is_dir():
        folder = Path(name)
    if folder is None:
        return Prompter(None, None, model.config)
    tokenizer = load_tokenizer(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
    return Prompter(tokenizer, load_image_processor(folder), model.config, folder)


def load_image_processor(folder: Path) -> ImageProcessor | None:
    """Reads the image settings of a checkpoint; None if it has none."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    return ImageProcessor.from_pretrained(folder, local_files_only=True)
