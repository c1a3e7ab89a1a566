"""A folder whose files are all written before the first of them takes the place of an older one."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama4lab.checkpoint.quantization import CONFIG_FILES
from llama4lab.checkpoint.settings import FILE
from llama4lab.checkpoint.shards import INDEX, SINGLE

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write a checkpoint into. When the block ends, what is in it moves to `folder`.

    Tensors that share memory with an older file keep its values, since that file is replaced and never written to. If
    the block raises, `folder` is as it was. While files move, it has no config.json, so that an interruption leaves a
    folder that does not load, not one that is half of each. Other files in it, such as those of a tokenizer, stay.
    A process that is killed leaves a hidden folder `.saving-...` in it, which nothing reads.

    Args:
        folder: Where the checkpoint is to be; it is made if it is not there.

    Raises:
        NotADirectoryError: if that is a file.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; a checkpoint is a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield fresh
        _move(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _move(fresh: Path, folder: Path) -> None:
    # The index says which weights belong together and the config that it is a checkpoint: they come last.
    names = sorted((file.name for file in fresh.iterdir()), key=lambda name: (name == FILE, name == INDEX, name))
    if FILE in names:
        (folder / FILE).unlink(missing_ok=True)
    if SINGLE in names or INDEX in names:
        for old in list(folder.iterdir()):
            weights = old.name in (SINGLE, INDEX, *CONFIG_FILES) or SHARD.fullmatch(old.name)
            if weights and old.name not in names:
                old.unlink()
    for name in names:
        os.replace(fresh / name, folder / name)
