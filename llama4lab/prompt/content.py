"""The kinds of content that a prompt is made from: texts, chats or token ids, one or a batch."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

EXPECTED = "Give a str, a chat (a list of message dicts), token ids, or a list of one of these."


@dataclass
class Content:
    """Rows of one kind.

    Attributes:
        kind: what each row is.
        rows: texts (`str`), chats (lists of messages) or token ids (lists of `int`).
    """

    kind: Literal["text", "chat", "ids"]
    rows: list[Any]

    @classmethod
    def of(cls, given: Any) -> "Content":
        """Sorts out what was given.

        Raises:
            TypeError: if it is none of the kinds, or of several at once.
            ValueError: if it, or a row of it, is empty.
        """
        if isinstance(given, str):
            return cls("text", [given])
        if isinstance(given, (Tensor, np.ndarray)):
            return cls("ids", _array_rows(given))
        if isinstance(given, dict):
            raise TypeError(f"A chat is a list of messages, but a single dict was given.\nWrite [{{...}}]. {EXPECTED}")
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"A prompt cannot be made from a {type(given).__name__}.\n{EXPECTED}")
        if not given:
            raise ValueError(f"A prompt was asked for from an empty {type(given).__name__}.\n{EXPECTED}")
        kinds = sorted({_kind(entry) for entry in given})
        if len(kinds) > 1:
            raise TypeError(f"A prompt was asked for from a mixture of {' and '.join(kinds)}.\n{EXPECTED}")
        return cls._of_list(list(given), kinds[0])

    @classmethod
    def _of_list(cls, given: list[Any], kind: str) -> "Content":
        if kind == "texts":
            return cls("text", given)
        if kind == "messages":
            return cls("chat", [given])
        if kind == "token ids":
            return cls("ids", [[int(token) for token in given]])
        if kind != "lists":
            raise TypeError(f"A prompt cannot be made from a list of {kind}.\n{EXPECTED}")
        rows = [cls.of(row) for row in given]
        found = sorted({row.kind for row in rows})
        if found not in (["chat"], ["ids"]):
            raise TypeError(
                f"The rows of a batch are chats or token ids, here they are {' and '.join(found)}.\n{EXPECTED}"
            )
        if any(len(row.rows) > 1 for row in rows):
            raise ValueError("A batch has one dimension too many: give one list of rows, or a [batch, seq] tensor.")
        return cls(rows[0].kind, [row.rows[0] for row in rows])


def _kind(entry: Any) -> str:
    if isinstance(entry, str):
        return "texts"
    if isinstance(entry, dict):
        return "messages"
    if isinstance(entry, (int, np.integer)) and not isinstance(entry, bool):
        return "token ids"
    if isinstance(entry, (list, tuple)) or (isinstance(entry, (Tensor, np.ndarray)) and entry.ndim > 0):
        return "lists"
    return f"{type(entry).__name__} values"


def _array_rows(given: Tensor | np.ndarray) -> list[list[int]]:
    tensor = torch.as_tensor(given)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"Token ids are whole numbers, but the array has {tensor.dtype}.\n{EXPECTED}")
    if tensor.ndim not in (1, 2) or tensor.numel() == 0:
        raise ValueError(
            f"Token ids of the shape {list(tensor.shape)} were given.\n"
            "Give [seq] or [batch, seq] with at least one token."
        )
    return tensor.reshape(-1, tensor.shape[-1]).tolist()
