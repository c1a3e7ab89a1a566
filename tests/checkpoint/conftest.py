"""Small checkpoints with random weights, as transformers names them, and what the tests do with them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    PreTrainedConfig,
)

from llama4lab.checkpoint.settings import read_config
from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.weights import Weights

TEXT: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 12,
    "intermediate_size_mlp": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_local_experts": 3,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "projector_input_dim": 10,
    "projector_output_dim": 14,
    "vision_output_dim": 14,
    "image_size": 16,
    "patch_size": 4,
}


class Maker:
    """Makes and opens checkpoints. Tests get it as the fixture `make`."""

    def __init__(self) -> None:
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def shapes(self, config: Llama4Config | Llama4TextConfig) -> dict[str, tuple[int, ...]]:
        """The tensors that transformers' model of this config has."""
        key = config.to_json_string()
        if key not in self._shapes:
            with torch.device("meta"):
                with_vision = isinstance(config, Llama4Config)
                model = Llama4ForConditionalGeneration(config) if with_vision else Llama4ForCausalLM(config)
            self._shapes[key] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return dict(self._shapes[key])

    def tensors(self, config: Llama4Config | Llama4TextConfig) -> dict[str, Tensor]:
        """Random bfloat16 values for every tensor of a config."""
        generator = torch.Generator().manual_seed(0)
        shapes = sorted(self.shapes(config).items())
        return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes}

    def unfused(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same weights with one tensor for each expert and projection, in the orientation of a Linear."""
        parts: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            experts, _, projection = name.rpartition(".")
            if projection not in ("gate_up_proj", "down_proj"):
                parts[name] = tensor
                continue
            for expert, weight in enumerate(tensor):
                turned = weight.T
                half = len(turned) // 2
                pieces = {"gate": turned[:half], "up": turned[half:]} if projection != "down_proj" else {"down": turned}
                for part, piece in pieces.items():
                    parts[f"{experts}.{expert}.{part}_proj.weight"] = piece.contiguous()
        return parts

    def saved(self, folder: Path, config: PreTrainedConfig, tensors: dict[str, Tensor], *, shards: int = 1) -> Path:
        """Writes config.json and the weights, over several files with an index if asked."""
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        names = list(tensors)
        weight_map = {}
        for shard in range(shards):
            mine = names[shard::shards]
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def opened(self, folder: Path) -> dict[str, Tensor]:
        """Opens a checkpoint as loading does, and reads every tensor of the model."""
        config = read_config(folder)
        weights = Weights(Shards(folder), self.shapes(config))
        return {name: weights.read(name) for name in weights.in_file_order()}

    def refuses(self, folder: Path, kind: type[Exception], damage: Callable, message: str) -> None:
        """Asserts that a good checkpoint, once damaged, is refused in at most three lines that say where."""
        self.opened(folder)
        damage(folder, self)
        with pytest.raises(kind, match=message) as error:
            self.opened(folder)
        assert str(folder) in str(error.value)
        assert len(str(error.value).splitlines()) <= 3

    def file_bytes(self, header: dict | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
        """The bytes of a safetensors file with this header, true or not."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()


@pytest.fixture
def text_only() -> Llama4TextConfig:
    return Llama4TextConfig(**TEXT)


@pytest.fixture
def multimodal() -> Llama4Config:
    return Llama4Config(text_config=dict(TEXT), vision_config=dict(VISION), image_token_index=20)


@pytest.fixture
def checkpoint(tmp_path: Path, text_only: Llama4TextConfig, make: Maker) -> Path:
    """A good text-only checkpoint in one file."""
    return make.saved(tmp_path / "checkpoint", text_only, make.tensors(text_only))


@pytest.fixture
def sharded(tmp_path: Path, text_only: Llama4TextConfig, make: Maker) -> Path:
    """The same in three files with an index."""
    return make.saved(tmp_path / "sharded", text_only, make.tensors(text_only), shards=3)
