"""Types of blocks: bytes become the numbers that the gguf package, and transformers, make of them."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from llama4lab.checkpoint.gguf.blocks import GgmlBlocks, dequant, ggml_type


def test_the_numbers_are_those_of_the_gguf_package(kind, blocks):
    stored = blocks(kind, (6, 512))
    expected = torch.from_numpy(gguf.quants.dequantize(stored, Kind[kind]))
    scheme = GgmlBlocks(ggml_type(Kind[kind]))
    made = scheme.dense({"weight": torch.from_numpy(stored)}, (6, 512))
    assert torch.equal(made, expected)
    assert 0.02 < made.std() < 2
    assert scheme.stored_shape((6, 512)) == stored.shape
    assert scheme.is_finite(torch.from_numpy(stored))


def test_without_the_code_of_transformers_the_numbers_are_the_same(kind, blocks, monkeypatch):
    stored, scheme = {"weight": torch.from_numpy(blocks(kind, (6, 512)))}, GgmlBlocks(ggml_type(Kind[kind]))
    made = scheme.dense(stored, (6, 512))
    monkeypatch.setattr("llama4lab.checkpoint.gguf.blocks.dequant", None)
    assert torch.equal(made, scheme.dense(stored, (6, 512)))


def test_a_large_matrix_is_made_piece_by_piece(blocks, monkeypatch):
    stored, scheme = {"weight": torch.from_numpy(blocks("Q4_K", (7, 512)))}, GgmlBlocks(ggml_type(Kind.Q4_K))
    whole = scheme.dense(stored, (7, 512))
    monkeypatch.setattr("llama4lab.checkpoint.gguf.blocks.PIECE", 768)
    assert torch.equal(whole, scheme.dense(stored, (7, 512)))


def test_the_numbers_are_those_of_transformers_where_it_knows_the_type(kind, blocks):
    if dequant is None or Kind[kind] not in dequant.GGML_BLOCK:
        pytest.skip(f"transformers does not decode {kind}")
    stored = torch.from_numpy(blocks(kind, (6, 512)))
    theirs = dequant.dequantize(stored.flatten(), int(Kind[kind]), torch.float32).view(6, 512)
    assert torch.equal(theirs, GgmlBlocks(ggml_type(Kind[kind])).dense({"weight": stored}, (6, 512)))
