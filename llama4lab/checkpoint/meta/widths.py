"""How wide the parts of a model are, by its tensors and by the formulas of params.json."""

import math
import re
from collections.abc import Mapping
from typing import Any

from llama4lab.checkpoint.meta.params import FILE
from llama4lab.checkpoint.tensor_files import TensorFiles

EMBEDDING = "model.embed_tokens.weight"
DENSE = re.compile(r"model\.layers\.\d+\.feed_forward\.gate_proj\.weight")
EXPERT = re.compile(r"model\.layers\.\d+\.feed_forward\.(experts\.\d+|shared_expert)\.(gate|up)_proj\.weight")
DOWN = re.compile(r"model\.layers\.\d+\.feed_forward\.experts\.\d+\.down_proj\.weight")
HEADS = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.weight")


class Widths:
    """The sizes that tensors tell.

    Args:
        files: The tensors.
        params: The settings that they must agree with.

    Attributes:
        vocabulary: How many tokens there are.
        head: How wide a head is.
        expert: How wide the routed and the shared experts are inside.
        dense: How wide the MLPs of layers without experts are inside.

    Raises:
        ValueError: if layers differ, or if the settings say something else.
    """

    def __init__(self, files: TensorFiles, params: Mapping[str, Any]):
        self._files, self._params = files, params
        if EMBEDDING not in files:
            raise ValueError(f"{files.folder} holds no embedding of tokens (tok_embeddings.weight).")
        self.vocabulary = self._must_be(EMBEDDING, files.spec(EMBEDDING).shape[0], params["vocab_size"], "vocab_size")
        self.head = self._head()
        dense, expert = self._widths(DENSE), self._widths(EXPERT, DOWN)
        # Where there is no such layer, its width plays no part; transformers wants one.
        self.dense = dense if dense is not None else expert or params["dim"]
        self.expert = expert if expert is not None else self.dense
        if dense is not None:
            self._check_formula("its MLPs", dense, _dense_width(params))
        if expert is not None and params["moe_args"] is not None:
            self._check_formula("its experts", expert, _expert_width(params))

    def _head(self) -> int:
        """The width of a head: what the settings say, and what the queries and keys of every layer have."""
        params = self._params
        head = params["head_dim"] or params["dim"] // params["n_heads"]
        heads = {"q": params["n_heads"], "k": params["n_kv_heads"] or params["n_heads"]}
        for name in self._files:
            if found := HEADS.fullmatch(name):
                self._must_be(name, self._files.spec(name).shape[0], heads[found[1]] * head, "heads x their width")
        return head

    def _widths(self, rows: re.Pattern, columns: re.Pattern | None = None) -> int | None:
        """How wide some matrices are; None if there are none."""
        wide: dict[int, str] = {}
        for name in self._files:
            shape = self._files.spec(name).shape
            if rows.fullmatch(name):
                wide.setdefault(shape[0], name)
            elif columns is not None and columns.fullmatch(name):
                # Two integers of 4 bits are a byte.
                packed = type(self._files.spec(name).scheme).__name__ == "SignedNibbles"
                wide.setdefault(shape[1] * (2 if packed else 1), name)
        if len(wide) > 1:
            (one, first), (other, second) = list(wide.items())[:2]
            raise ValueError(
                f"{self._files.file(second)}: {second} has a width of {other} inside, {first} one of {one}.\n"
                "All experts of a Llama 4 have the same, and so have all its dense MLPs."
            )
        return next(iter(wide), None)

    def _must_be(self, name: str, found: int, said: int | None, what: str) -> int:
        if said is not None and found != said:
            ranks = getattr(self._files, "ranks", 1)
            raise ValueError(
                f"{self._files.file(name)}: {name} has {found} rows in {ranks} files; {FILE} says {said} ({what}).\n"
                "Either files of ranks are missing, or they belong to another checkpoint."
            )
        return found

    def _check_formula(self, what: str, found: int, said: int | None) -> None:
        if said is not None and found != said:
            raise ValueError(
                f"{self._files.folder / FILE}: {what} are {said} wide by its formula, and {found} in the files.\n"
                "Either files of ranks are missing, or they belong to another checkpoint."
            )


def _dense_width(params: Mapping[str, Any]) -> int | None:
    """Two thirds of four times the residual stream, times a factor, rounded up; as `TransformerBlock` has it."""
    width = int(2 * (4 * params["dim"]) / 3)
    if params["ffn_dim_multiplier"] is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    return _rounded(width, params["multiple_of"])


def _expert_width(params: Mapping[str, Any]) -> int | None:
    """The same with a factor of its own, shared out between the experts of a token; as `MoE` has it."""
    moe = params["moe_args"]
    if params["ffn_exp"] is None or params["ffn_dim_multiplier"] is None:
        return None  # then Meta's code cannot make the model, and only the tensors tell
    width = int(params["ffn_dim_multiplier"] * int(2 * int(params["ffn_exp"] * params["dim"]) / 3))
    if moe["auto_scale_F"]:
        width = int(width / (moe["capacity_factor"] + 1))
    return _rounded(width, params["multiple_of"])


def _rounded(width: int, multiple: int) -> int:
    return math.ceil(width / multiple) * multiple
