"""The safetensors files of a checkpoint, one or many, as a mapping from names on disk to tensors."""

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from jaxtyping import Shaped
from torch import Tensor

from llama4lab.checkpoint.header import read_header
from llama4lab.checkpoint.spelling import listed, near_misses
from llama4lab.checkpoint.strict_json import read_json
from llama4lab.checkpoint.tensor_files import Spec, TensorFiles, no_tensor, read_extremes, read_slice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FOREIGN_WEIGHTS = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5", "*.npz")


class Shards(TensorFiles):
    """Every tensor of a checkpoint by its name on disk. Values are mapped from the file when they are asked for.

    Opening reads the index and the headers only, and checks that they agree. A tensor shares memory with its file
    until it is written to (the file itself is never changed) and gives its pages back when it is dropped.

    Raises:
        FileNotFoundError: if the weights, or one of the files the index names, are not there.
        ValueError: if the index or a header is malformed, or the two disagree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._headers = {file: read_header(file) for file in _shard_files(folder)}
        self._file: dict[str, Path] = {}
        for file, header in self._headers.items():
            for name in header:
                if name in self._file:
                    raise ValueError(f"{name} is stored twice: in {self._file[name]} and in {file}.")
                self._file[name] = file
        if (folder / INDEX).is_file():
            self._check_index(_weight_map(folder / INDEX))

    def spec(self, name: str) -> Spec:
        return self._headers[self.file(name)][name]

    def file(self, name: str) -> Path:
        if name not in self._file:
            raise no_tensor(self.folder, name, self._file)
        return self._file[name]

    def __getitem__(self, name: str) -> Shaped[Tensor, "..."]:
        spec = self.spec(name)
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        # One mapping a tensor: its pages go when the tensor goes, and pickling it takes no more than its own bytes.
        start = spec.start - spec.start % mmap.ALLOCATIONGRANULARITY
        with self.file(name).open("rb") as opened:
            stop = spec.start + spec.nbytes
            pages = mmap.mmap(opened.fileno(), stop - start, access=mmap.ACCESS_COPY, offset=start)
        values = memoryview(pages)[spec.start - start :]
        if spec.start % spec.dtype.itemsize:
            values = bytearray(values)
        return torch.frombuffer(values, dtype=spec.dtype).view(spec.shape)

    def read(self, name: str, index: int | None = None) -> Shaped[Tensor, "..."]:
        return read_slice(self.spec(name), self.file(name), name, index)

    def extremes(self, name: str) -> tuple[Shaped[Tensor, ""], Shaped[Tensor, ""]]:
        return read_extremes(self.spec(name), self.file(name))

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.folder / INDEX
        for name, shard in weight_map.items():
            if name not in self._file:
                near = near_misses(name, self._headers[self.folder / shard])
                raise ValueError(
                    f"{index} places {name} in {shard}, which does not hold it."
                    + (f"\nNear misses there: {near}." if near else "")
                )
            if self._file[name] != self.folder / shard:
                raise ValueError(f"{index} places {name} in {shard}; it is in {self._file[name].name}.")
        extra = [name for name in self._file if name not in weight_map]
        if extra:
            raise ValueError(f"{self._file[extra[0]]} holds tensors that {index.name} does not list: {listed(extra)}.")


def _shard_files(folder: Path) -> list[Path]:
    """Gives the files that make up the checkpoint, in the order of their names."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file() and set(_weight_map(index).values()) != {SINGLE}:
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that does not belong.")
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not _contained(folder, name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{index} names {len(names)} files, of which {len(missing)} are missing: {listed(missing)}.\n"
                "Download the checkpoint again; what is there already is not fetched twice."
            )
        return [folder / name for name in names]
    if single.exists():
        _contained(folder, SINGLE)
        return [single]
    raise FileNotFoundError(_no_weights(folder))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map that says which file holds which tensor.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "\0" in shard:
            raise ValueError(f"{index} places {name} in {shard!r}, which is not the name of a safetensors file.")
    return weight_map


def _contained(folder: Path, name: str) -> Path:
    """Gives the file of that name, after making sure that it lies inside the checkpoint.

    Links may lead around inside the folder and, in the cache of the Hugging Face hub, from `snapshots/<commit>/` to the
    `blobs/` of the same repository or to those that the whole cache shares. A link that leaves them is refused: a
    downloaded checkpoint could otherwise make any file of the machine part of the model.
    """
    steps = PurePosixPath(name)
    if steps.is_absolute() or ".." in steps.parts or PureWindowsPath(name).drive or "\\" in name:
        raise ValueError(f"{folder / INDEX} names the file {name!r}, which is outside the folder {folder}.")
    target = (folder / name).resolve()
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        repository = roots[0].parent.parent
        roots += [repository / "blobs", repository.parent / "blobs"]
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{folder / name} is a link to {target}, which is outside the folder {folder}.\n"
            "Put the file itself into the folder, or load the folder the link leads to."
        )
    return folder / name


def _no_weights(folder: Path) -> str:
    loose = sorted(file.name for file in folder.glob("*.safetensors"))
    foreign = sorted(file.name for pattern in FOREIGN_WEIGHTS for file in folder.glob(pattern))
    message = f"{folder} holds no {SINGLE} and no {INDEX}.\n"
    if loose:
        return message + f"It holds {listed(loose)}; the index that says which file holds which tensor is missing."
    if foreign:
        return message + (
            f"It holds {listed(foreign)}, which are not safetensors files: pickles can run any code and are not read.\n"
            "Ask for the safetensors version of this checkpoint, or save it again with save_pretrained."
        )
    return message + "A checkpoint is a folder with config.json and safetensors files, as save_pretrained writes it."
