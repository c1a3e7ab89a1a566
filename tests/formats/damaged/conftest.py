"""Checkpoints with the settings that published ones have in config.json, and damage to their tensors and settings."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama4lab as lab
from llama4lab.checkpoint.weights import Weights
from llama4lab.model.loading import empty_model, opened

WEIGHTS = "model.safetensors"


def compressed_tensors(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | more
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*router"],
        "quantization_status": "compressed",
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "int4": compressed_tensors(4, "int", "group", group_size=128),
    "int4 with zero points": compressed_tensors(4, "int", "group", group_size=128, symmetric=False),
    "int8": compressed_tensors(8, "int", "group", group_size=128),
    "int8 by row": compressed_tensors(8, "int", "channel", group_size=None),
    "fp8 by row": compressed_tensors(8, "float", "channel", group_size=None),
    "fp8 by block": compressed_tensors(8, "float", "block", block_structure=[128, 128]),
    "nvfp4": compressed_tensors(4, "float", "tensor_group", group_size=16),
    "modelopt fp8": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "modelopt nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}


@dataclass
class Damaged:
    """Makes damaged copies of checkpoints. Tests get it as the fixture `damaged`."""

    saved_as: Callable[[str], Path]
    folder: Path
    good: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def settings(self, format: str) -> dict[str, Any]:
        """The config.json of a checkpoint as it is published in a format."""
        document = json.loads((self.saved_as(format) / "config.json").read_text())
        if format in PUBLISHED:
            document["quantization_config"] = PUBLISHED[format]
        return json.loads(json.dumps(document))

    def tensors(self, format: str) -> dict[str, Tensor]:
        """Its tensors; they may be changed."""
        if format not in self.good:
            self.good[format] = load_file(self.saved_as(format) / WEIGHTS)
        return dict(self.good[format])

    def copy(self, format: str, change: Callable | None = None, settings: Callable | None = None) -> Path:
        """A checkpoint after changes to the dict of its tensors and to its config."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        tensors, document = self.tensors(format), self.settings(format)
        if change is not None:
            change(tensors)
        if settings is not None:
            settings(document)
        save_file(tensors, self.folder / WEIGHTS)
        (self.folder / "config.json").write_text(json.dumps(document))
        return self.folder

    def weights(self, folder: Path) -> Weights:
        """Opens a checkpoint as loading does."""
        return opened(folder, empty_model(folder))

    def numbers(self, folder: Path) -> dict[str, Tensor]:
        """Every tensor of the model in float32."""
        weights = self.weights(folder)
        return {name: weights.read(name, dtype=torch.float32) for name in weights.in_file_order()}

    def refusal(self, folder: Path, *names: str, **options: Any) -> str:
        """What loading says, after making sure that it names file and tensor."""
        with pytest.raises((ValueError, OSError)) as error:
            lab.load(folder, **options)
        text = str(error.value)
        assert len(text.splitlines()) <= 3
        assert all(name in text for name in (str(folder), *names)), text
        return text


@pytest.fixture
def damaged(saved_as, tmp_path, good_tensors) -> Damaged:
    return Damaged(saved_as, tmp_path / "damaged", good_tensors)


@pytest.fixture(scope="session")
def good_tensors() -> dict[str, dict[str, Tensor]]:
    """The tensors of checkpoints that are not damaged, by format."""
    return {}
