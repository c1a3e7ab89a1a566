"""The pickle inside a file of `torch.save`, taken apart without running anything that it names.

A pickle is a program: it names functions and has them called. Here every name stands for a small stand-in that notes
what it was given, and a name that no tensor needs is refused; nothing outside this file is ever looked up or called.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# What torch.save writes, with any protocol. Others would build objects in ways that no tensor needs.
OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "NEWOBJ",
    "BUILD",
}  # fmt: skip
DTYPES = {
    "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip
MOST_AXES = 8


class Saved(NamedTuple):
    """A tensor as the pickle describes it.

    Attributes:
        storage: The name of what holds its bytes.
        claimed: How many bytes that is said to have.
        dtype: Of the values.
        offset: Values of the storage before the first.
        shape: Of the tensor.
        strides: Values from one to the next along each axis.
    """

    storage: str
    claimed: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def unpickled(data: bytes) -> dict[str, Saved]:
    """Gives the tensors by their names; what the layers of Transformer Engine note beside them is left out.

    Raises:
        ValueError: if the pickle names code, is damaged, or holds anything else than a dict of tensors.
    """
    _check_opcodes(data)
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # a damaged one may end in almost any error
        raise ValueError(f"its pickle is damaged: {type(error).__name__} {error!s:.120}") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Saved | _Note):
            raise ValueError(f"it holds a {type(value).__name__.strip('_')} under {name!r:.80}, not a tensor")
    return {name: value for name, value in found.items() if isinstance(value, Saved)}


def _check_opcodes(data: bytes) -> None:
    try:
        instructions = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]
    except Exception as error:
        raise ValueError(f"its pickle is damaged: {type(error).__name__} {error!s:.120}") from error
    for name, argument in instructions:
        if name not in OPCODES:
            raise ValueError(f"its pickle has the instruction {name}, which no tensor needs")
        # Python reserves room for as many remembered objects as the highest number says.
        if name == "LONG_BINPUT" and argument is not None and argument > len(data):
            raise ValueError(f"its pickle numbers an object {argument:,} and has {len(data):,} bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A fresh stand-in each time: a pickle may set attributes of what it was given.
        if module == "torch" and name in DTYPES:
            return _Kind(DTYPES[name])
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Kind(torch.uint8)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) == ("_io", "BytesIO"):
            return _Note
        if (module, name) in CALLS:
            return _Call(CALLS[module, name])
        raise ValueError(f"its pickle names {module}.{name}".replace("\n", " ")[:160] + ", which no tensor needs")

    def persistent_load(self, pid: Any) -> "_Storage":
        nothing: tuple[Any, ...] = (None,) * 5
        tag, kind, key, _, count = pid if type(pid) is tuple and len(pid) == 5 else nothing
        if tag != "storage" or type(kind) is not _Kind or type(key) is not str or not _are_sizes((count,)):
            raise ValueError("its pickle refers to something else than a storage of values")
        return _Storage(key, kind.dtype, count * kind.dtype.itemsize)


class _Kind(NamedTuple):
    """Stands for a class of storages."""

    dtype: torch.dtype


class _Storage(NamedTuple):
    """Stands for a storage."""

    key: str
    dtype: torch.dtype
    nbytes: int


class _Note:
    """Stands for a `BytesIO`, in which Transformer Engine keeps the state of its layers."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Call:
    """Stands for a function."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Mapping(dict[Any, Any]):
    """Stands for an `OrderedDict`, to which torch gives an attribute."""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Saved:
    """`torch._utils._rebuild_tensor_v2`, or `_v3`, which is given a dtype after two things of no interest here."""
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else None
    if type(storage) is not _Storage or not _are_sizes((offset,)) or not _are_sizes(shape) or not _are_sizes(strides):
        raise ValueError("its pickle makes a tensor of something else than a storage and sizes")
    if len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise ValueError(f"its pickle makes a tensor of {len(shape)} axes with {len(strides)} strides")
    return Saved(storage.key, storage.nbytes, dtype or storage.dtype, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    """`torch._utils._rebuild_parameter`."""
    return tensor


def _are_sizes(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and 0 <= value < 2**63 for value in values)


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): lambda: _Mapping(),
    ("_codecs", "encode"): lambda text, encoding: b"",
}
