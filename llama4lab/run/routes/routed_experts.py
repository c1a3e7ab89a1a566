"""Routes as serving engines record them: the experts of every token of one text."""

import base64
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Integer

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.routes.engine_formats import (
    UNKNOWN,
    router_columns,
    sglang_array,
    vllm_array,
    whole_numbers,
    with_last,
)
from llama4lab.run.run import Run

FORMAT = "llama4lab.routed_experts/1"
ROUTER = "feed_forward.router.indices"


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """The experts that every token of one text was sent to. Padding has no place: token 0 is the first of the text.

    Attributes:
        experts: Index of the expert in each slot; -1 in all slots of a token whose route is not known.
        layers: The layer of each column; layers without a router have none.
        num_layers: How many layers the model has, dense ones counted.
        num_experts: How many experts a layer has.
        token_ids: The text, if it is known; a replay then refuses other texts.
    """

    experts: Integer[np.ndarray, "token layer slot"]
    layers: list[int]
    num_layers: int
    num_experts: int
    token_ids: Integer[np.ndarray, " length"] | None = None

    def __post_init__(self) -> None:
        tokens, columns, slots = self.experts.shape
        if columns != len(self.layers) or not slots or not all(0 <= layer < self.num_layers for layer in self.layers):
            raise ValueError(
                f"Routes of shape {list(self.experts.shape)} were given for the layers {self.layers} of "
                f"{self.num_layers}.\nThe shape is [token, layer, slot], with a column for each of these layers."
            )
        if self.token_ids is not None and len(self.token_ids) != tokens:
            raise ValueError(f"Routes of {tokens} tokens were given with {len(self.token_ids)} token ids.")
        _check_experts(self.experts, self.layers, self.num_experts)

    def __len__(self) -> int:
        return len(self.experts)

    def __repr__(self) -> str:
        missing = int((self.experts[..., 0] == UNKNOWN).any(-1).sum())
        unknown = f", {missing} tokens with unknown routes" if missing else ""
        return (
            f"RoutedExperts({len(self)} tokens, {len(self.layers)} layers, {self.top_k} of {self.num_experts}{unknown})"
        )

    @property
    def top_k(self) -> int:
        """How many experts a token has."""
        return self.experts.shape[2]

    @classmethod
    def from_run(cls, run: Run, row: int = 0) -> "RoutedExperts":
        """Takes the routes of one row of a run; padding before and behind its text is left out.

        Args:
            run: A run with `router.indices`, from the first token of the row on.
            row: Which row of the batch.

        Raises:
            KeyError: if router indices were not recorded.
            ValueError: if the run was cut so that it lacks tokens of the row.
        """
        mask = run.prompt.attention_mask.cpu().bool()[run.rows[row]]
        text = mask.nonzero().flatten().tolist()
        last = text.index(run.positions[-1]) if run.positions[-1] in text else len(text) - 1
        wanted = text[: last + 1]
        index = {position: place for place, position in enumerate(run.positions)}
        lacking = [position for position in wanted if position not in index]
        if lacking:
            raise ValueError(
                f"The run was cut: it lacks position {lacking[0]} of row {row}. Routes start at the first."
            )
        places = torch.tensor([index[position] for position in wanted])
        found = run.layers(ROUTER)
        experts = torch.stack([tensor[row].cpu()[places] for tensor in found.values()], dim=1)
        ids = run.prompt.input_ids.cpu()[run.rows[row], wanted]
        return cls(experts.numpy(), list(found), run.meta["num_layers"], run.meta["num_experts"], ids.numpy())

    @classmethod
    def from_vllm(
        cls, routed_experts: Any, model: HookedPreTrainedModel, *, prompt: Any = None, token_ids: Any = None
    ) -> "RoutedExperts":
        """Reads what vLLM returned for one completion.

        Args:
            routed_experts: `CompletionOutput.routed_experts`: an array, nested lists, or the text from its server.
            model: The model.
            prompt: `prompt_routed_experts`, where vLLM gives the prompt apart.
            token_ids: The tokens of prompt and output, if known. If they are one more than the routes, which lack the
                last token, its route is noted as unknown.

        Raises:
            ValueError: if the array is not one of this model.
        """
        return cls._of_model(vllm_array(routed_experts, prompt), model, token_ids)

    @classmethod
    def from_sglang(
        cls, routed_experts: Any, model: HookedPreTrainedModel, *, start: int = 0, token_ids: Any = None
    ) -> "RoutedExperts":
        """Reads what SGLang returned for one request.

        Args:
            routed_experts: `meta_info["routed_experts"]`: the base64 text, or its int32 numbers, flat or in shape.
            model: The model, with the layers and the experts a token of the one that was served.
            start: The request's `routed_experts_start_len`; the routes of the tokens before are unknown.
            token_ids: As in `from_vllm`.

        Raises:
            ValueError: if the array is not one of this model.
        """
        known = facts(model.config)
        array = sglang_array(routed_experts, (known["num_layers"], known["top_k"]), start)
        return cls._of_model(array, model, token_ids)

    def to_vllm(self) -> Integer[np.ndarray, "token model_layer slot"]:
        """The array that vLLM would give for these tokens: a column for every layer, 0 where it is dense.

        The numbers are the narrowest unsigned ones that fit, or int16 if there are unknown routes, which are -1.
        """
        unknown = bool((self.experts == UNKNOWN).any())
        return self._columns("int16" if unknown else "uint8" if self.num_experts <= 256 else "uint16")

    def to_sglang(self) -> str:
        """The base64 text that SGLang would give for these tokens."""
        return base64.b64encode(self._columns("<i4").tobytes()).decode("ascii")

    def save(self, path: str | Path) -> None:
        """Writes a `.npz` file; one that is there already is replaced only when all is written."""
        path = Path(path)
        ids: dict[str, Any] = {} if self.token_ids is None else {"token_ids": self.token_ids}
        sizes = np.array([self.num_layers, self.num_experts])
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                layers = np.array(self.layers)
                np.savez_compressed(file, format=FORMAT, experts=self.experts, layers=layers, sizes=sizes, **ids)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "RoutedExperts":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                stored = {name: file[name] for name in file.files}
        except (BadZipFile, ValueError, EOFError, AttributeError) as problem:
            raise ValueError(f"{path} holds no routed experts: it is no .npz file.") from problem
        if str(stored.get("format")) != FORMAT:
            raise ValueError(f"{path} holds no routed experts: its format is {stored.get('format')}, not {FORMAT}.")
        num_layers, num_experts = stored["sizes"].tolist()
        return cls(stored["experts"], stored["layers"].tolist(), num_layers, num_experts, stored.get("token_ids"))

    @classmethod
    def _of_model(cls, array: np.ndarray, model: HookedPreTrainedModel, token_ids: Any) -> "RoutedExperts":
        known = facts(model.config)
        layers, num_layers = known["moe_layers"], known["num_layers"]
        ids = None if token_ids is None else whole_numbers(token_ids)
        columns = with_last(router_columns(array, layers, num_layers), ids)
        return cls(columns, list(layers), num_layers, known["num_experts"], ids)

    def _columns(self, dtype: str) -> Integer[np.ndarray, "token model_layer slot"]:
        columns = np.zeros((len(self), self.num_layers, self.top_k), dtype=dtype)
        columns[:, self.layers] = self.experts
        return columns


def _check_experts(experts: Integer[np.ndarray, "token layer slot"], layers: list[int], num_experts: int) -> None:
    experts = experts.astype(np.int64)
    unknown = (experts == UNKNOWN).all(-1)
    bad = ((experts < 0) | (experts >= num_experts)).any(-1) & ~unknown
    ordered = np.sort(experts, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1) & ~unknown
    for wrong, fault in ((bad, f"the experts are 0 to {num_experts - 1}"), (twice, "its slots need different experts")):
        if wrong.any():
            token, column = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"Token {token} goes to {experts[token, column].tolist()} in layer {layers[column]}; {fault}.\n"
                "A route that is not known is -1 in every slot."
            )
