"""Opening a checkpoint in whatever format it is: its config, and its tensors by their names."""

from pathlib import Path

from transformers import Llama4Config, Llama4TextConfig

from llama4lab.checkpoint.gguf.files import GgufFiles
from llama4lab.checkpoint.gguf.settings import gguf_config
from llama4lab.checkpoint.meta.files import MetaFiles
from llama4lab.checkpoint.meta.ranks import is_meta
from llama4lab.checkpoint.meta.settings import meta_config
from llama4lab.checkpoint.settings import read_config
from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.tensor_files import TensorFiles

GGUF = ".gguf"


def settings_of(path: Path) -> Llama4Config | Llama4TextConfig:
    """Gives the config of a checkpoint.

    Args:
        path: Where it is, as `locate` gives it.

    Raises:
        FileNotFoundError: if it has none.
        ValueError: if it is not the config of a Llama 4, or not a valid one.
    """
    if path.suffix == GGUF and not path.is_dir():
        return gguf_config(path)
    return meta_config(path) if is_meta(path) else read_config(path)


def files_of(path: Path) -> TensorFiles:
    """Gives the tensors of a checkpoint; only headers are read.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one is malformed, or two contradict each other.
    """
    if path.suffix == GGUF and not path.is_dir():
        return GgufFiles(path)
    return MetaFiles(path) if is_meta(path) else Shards(path)
