"""Writes a trained model as a checkpoint folder in transformers' layout, in bfloat16."""

import copy
import os
import shutil
import tempfile
from pathlib import Path

from llama4lab.model.llama4 import HookedLlama4

HERE = Path(__file__).parent
# What the folder of a checkpoint needs beside weights and config.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def export(model: HookedLlama4, out: Path) -> None:
    """Saves config, weights and the tokenizer's files; config and weights are replaced at once or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        copy.deepcopy(model).bfloat16().save_pretrained(folder)
        config = Path(folder) / "config.json"
        # On disk the class has transformers' name, so that tools which read only the config find their own.
        config.write_text(config.read_text().replace('"HookedLlama4"', '"Llama4ForConditionalGeneration"'))
        for name in ("config.json", "model.safetensors"):
            (Path(folder) / name).chmod(0o644)  # temporary files are private
            os.replace(Path(folder) / name, out / name)
    for name in FILES:
        if not (out / name).exists():
            shutil.copy(HERE / name, out / name)
