"""The arrays of routed experts that serving engines return, brought into one form.

* vLLM (`enable_return_routed_experts`, pull requests 28284 and 50721): `routed_experts` of a completion, the tokens of
  the prompt and of the output but the last one, as an array `[token, layer, slot]` with a column for every layer;
  those of dense layers are 0. Over HTTP it is the base64 text of a `.npy` file. Version 0.21 split it in two,
  `prompt_routed_experts` beside the `routed_experts` of the output, with columns for layers with a router only and -1
  for tokens whose keys and values were cached.
* SGLang (`return_routed_experts`, pull request 17434): `meta_info["routed_experts"]`, the base64 text of the int32
  numbers of `[token, layer, slot]`, with a column for every layer. It covers the tokens from
  `routed_experts_start_len` to the last but one.

Neither gives the gates, which follow from the experts and the model. The last token of an output has no route, as it
was never read by the model.
"""

import base64
import binascii
import io
from typing import Any

import numpy as np
from jaxtyping import Integer
from torch import Tensor

UNKNOWN = -1


def vllm_array(routed_experts: Any, prompt: Any = None) -> Integer[np.ndarray, "token column slot"]:
    """The array of one completion, with the part of the prompt before it where that is apart.

    Raises:
        ValueError: if these are no arrays `[token, layer, slot]`.
    """
    parts = [_npy(part) for part in (prompt, routed_experts) if part is not None]
    for part in parts:
        if part.ndim != 3 or part.shape[1:] != parts[0].shape[1:]:
            shapes = " and ".join(str(list(part.shape)) for part in parts)
            raise ValueError(f"Routes of shape {shapes} were given; vLLM gives [token, layer, slot].")
    return np.concatenate(parts)


def sglang_array(
    routed_experts: Any, shape: tuple[int, int], start: int = 0
) -> Integer[np.ndarray, "token column slot"]:
    """The array of one request; tokens before `start` are unknown.

    Args:
        routed_experts: The base64 text, or its numbers, flat or in shape.
        shape: Layers of the model, dense ones counted, and experts a token: the shape of a token in a flat array.
        start: The first token that it is about.

    Raises:
        ValueError: if it does not have that shape.
    """
    text = isinstance(routed_experts, str | bytes)
    array = np.frombuffer(_decoded(routed_experts), dtype="<i4") if text else whole_numbers(routed_experts)
    if array.ndim == 1:
        layers, slots = shape
        if array.size % (layers * slots):
            raise ValueError(
                f"{array.size} numbers were given; for {layers} layers and {slots} experts a token SGLang gives a "
                f"multiple of {layers * slots}."
            )
        array = array.reshape(-1, layers, slots)
    if array.ndim != 3:
        raise ValueError(f"Routes of shape {list(array.shape)} were given; SGLang gives [token, layer, slot].")
    before = np.full((start, *array.shape[1:]), UNKNOWN, dtype=np.int32)
    return np.concatenate([before, array])


def router_columns(
    array: Integer[np.ndarray, "token column slot"], layers: list[int], num_layers: int
) -> Integer[np.ndarray, "token layer slot"]:
    """The columns of the layers with a router.

    Args:
        array: With a column for every layer, or for those with a router only.
        layers: The layers with a router.
        num_layers: How many layers there are, dense ones counted.

    Raises:
        ValueError: for another number of columns, or routes in dense layers.
    """
    columns = array.shape[1]
    if columns == num_layers:
        dense = [layer for layer in range(num_layers) if layer not in layers]
        if not np.isin(array[:, dense], (0, UNKNOWN)).all():
            raise ValueError(f"Routes in some of the layers {dense} were given, which are dense in this model.")
        return array[:, layers]
    if columns != len(layers):
        raise ValueError(
            f"Routes of {columns} layers were given; the model has {num_layers}, {len(layers)} of them with a router."
        )
    return array


def with_last(
    columns: Integer[np.ndarray, "known layer slot"], token_ids: Integer[np.ndarray, " token"] | None
) -> Integer[np.ndarray, "token layer slot"]:
    """Adds an unknown route for the last token, where the text is known and has one token more."""
    if token_ids is None or len(token_ids) != len(columns) + 1:
        return columns
    return np.concatenate([columns, np.full((1, *columns.shape[1:]), UNKNOWN, dtype=np.int32)], dtype=np.int32)


def whole_numbers(array: Any) -> Integer[np.ndarray, "..."]:
    """An array, tensor or nested list as an array of whole numbers."""
    array = array.cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"An array of {array.dtype} was given; routes and token ids are whole numbers.")
    return array


def _npy(array: Any) -> np.ndarray:
    if isinstance(array, str | bytes):
        try:
            array = np.load(io.BytesIO(_decoded(array)), allow_pickle=False)
        except (ValueError, EOFError) as problem:
            raise ValueError(f"The text is no base64 of a .npy file, which vLLM sends: {problem}.") from problem
    return whole_numbers(array)


def _decoded(text: str | bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as problem:
        raise ValueError(f"The text given as routes is no base64: {problem}.") from problem
