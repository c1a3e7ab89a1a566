"""Verifying checkpoints in Meta's own format, whose files are opened by torch for the second time."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import pytest
import torch

import llama4lab as lab
from llama4lab.tables.verifying import verify


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", [None, "fp8", "int4"])
def test_every_number_is_that_of_the_ranks(write, wide_model, ranks, method):
    model = lab.load(write(wide_model(dtype=torch.bfloat16), ranks, method, kept=(1,) if ranks == 2 else ()))
    found = verify(model, matrices=None)
    assert found.ok, str(found)
    assert found.matrices["equal"].all()
    kinds = {"fp8": {"float8_e4m3fn by row"}, "int4": {"signed int4, groups of 128"}, None: {"plain"}}[method]
    assert set(found.matrices.dropna(subset="expert")["scheme"]) == (kinds | {"plain"} if ranks == 2 else kinds)


def test_ranks_in_another_order_are_caught(write, small_text_model):
    folder = write(small_text_model(), 2)
    model = lab.load(folder)
    (folder / "consolidated.00.pth").rename(folder / "consolidated.tmp")
    (folder / "consolidated.01.pth").rename(folder / "consolidated.00.pth")
    (folder / "consolidated.tmp").rename(folder / "consolidated.01.pth")
    found = verify(model, matrices=None)
    assert not found.matrices.dropna(subset="expert")["ok"].any()
    assert found.matrices[found.matrices["name"].str.contains("norm|router")]["ok"].all()
