"""The files of a checkpoint of Meta's: one for each rank, and beside them those with the scales of its experts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama4lab.checkpoint.meta.archive import read_pth
from llama4lab.checkpoint.meta.joins import Piece
from llama4lab.checkpoint.meta.params import FILE as PARAMS
from llama4lab.checkpoint.settings import FILE as CONFIG
from llama4lab.checkpoint.shards import INDEX
from llama4lab.checkpoint.shards import SINGLE as SAFETENSORS
from llama4lab.checkpoint.spelling import listed

RANK = re.compile(r"consolidated\.(\d{2,3})\.pth")
SINGLE = "consolidated.pth"
SCALES = re.compile(r"(fp8|int4)_scales_(\d{1,3})\.pt")
METHODS = ("fp8", "int4")

Pieces = dict[str, tuple[Piece, ...]]


def is_meta(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in Meta's format, and none of the same weights as safetensors."""
    if any((folder / name).exists() for name in (SAFETENSORS, INDEX)) or not _weight_files(folder):
        return False
    return (folder / PARAMS).is_file() or not (folder / CONFIG).is_file()


def read_ranks(folder: Path) -> Pieces:
    """Gives what each rank has under each name.

    Raises:
        FileNotFoundError: if the file of a rank is not there.
        ValueError: if a file is malformed, or ranks differ in names, dtypes or shapes.
    """
    files = _weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no consolidated.00.pth.")
    return _together([*files.values()], _numbered(folder, files, "consolidated.{:02d}.pth"))


def read_scales(folder: Path, ranks: int) -> tuple[str | None, Pieces]:
    """Gives the method by which experts are quantized, and the scales of each rank under each name.

    Args:
        folder: Where the checkpoint is.
        ranks: How many there are.

    Raises:
        FileNotFoundError: if the scales of a rank are not there.
        ValueError: if a file is malformed, if ranks differ, or if there are scales of two methods.
    """
    found: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.glob("*_scales_*.pt")):
        if match := SCALES.fullmatch(file.name):
            found.setdefault(match[1], {})[int(match[2])] = file
    if not found:
        return None, {}
    if len(found) > 1:
        raise ValueError(f"{folder} holds scales of {' and of '.join(sorted(found))}; remove those that do not belong.")
    method, files = next(iter(found.items()))
    if max(files) >= ranks:
        raise ValueError(
            f"{files[max(files)]} belongs to rank {max(files)}; there are {ranks} files consolidated.NN.pth."
        )
    names = _numbered(folder, files, method + "_scales_{}.pt", ranks)
    return method, _together([*files.values()], names)


def _weight_files(folder: Path) -> dict[int, Path]:
    found = {int(match[1]): file for file in folder.glob("*.pth") if (match := RANK.fullmatch(file.name))}
    if not found and (folder / SINGLE).is_file():
        return {0: folder / SINGLE}
    return dict(sorted(found.items()))


def _numbered(folder: Path, files: Mapping[int, Path], name: str, count: int | None = None) -> int:
    """Makes sure that no rank is left out; gives how many there are."""
    count = max(files) + 1 if count is None else count
    missing = [name.format(rank) for rank in range(count) if rank not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {count} files: {listed(missing)}.\n"
            "Each has a share of every matrix; download those that are missing."
        )
    return count


def _together(files: Sequence[Path], count: int) -> Pieces:
    """Gives the tensors of all ranks by their names, after making sure that all ranks have the same."""
    files = sorted(files, key=lambda file: int("".join(re.findall(r"\d+", file.name)[-1:]) or 0))
    read = [read_pth(file) for file in files]
    for file, specs in zip(files[1:], read[1:], strict=True):
        lacking, extra = [n for n in read[0] if n not in specs], [n for n in specs if n not in read[0]]
        if lacking or extra:
            found = f"lacks {listed(lacking)}" if lacking else f"has {listed(extra)}"
            raise ValueError(f"{file} {found}, unlike {files[0].name}; all ranks have tensors of the same names.")
        for name, spec in specs.items():
            first = read[0][name]
            if (spec.dtype, spec.shape) != (first.dtype, first.shape):
                raise ValueError(
                    f"{file}: {name} is {spec.dtype} {list(spec.shape)}; in {files[0].name} it is {first.dtype} "
                    f"{list(first.shape)}.\nThe files belong to different checkpoints."
                )
    assert len(read) == count
    return {name: tuple(Piece(file, each[name]) for file, each in zip(files, read, strict=True)) for name in read[0]}
