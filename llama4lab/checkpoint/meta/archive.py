"""The files of `torch.save`: the tensors in one, and where their bytes are. No value is read, and no code is run."""

import math
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from llama4lab.checkpoint.meta.pickled import Saved, unpickled
from llama4lab.checkpoint.tensor_files import Spec

LARGEST_PICKLE = 64 * 2**20  # bytes; that of the largest published rank is under 1 MB
MOST_ENTRIES = 2**20

# What the first bytes of a file say that is not an archive of torch.save, whatever its name.
FOREIGN = {
    b"\x80": "a bare pickle, as torch before 1.6 wrote it.\nLoad and save it again where you trust it",
    b"version https://git-lfs": "a Git LFS pointer.\nThe weights themselves have not been fetched (git lfs pull)",
    b"GGUF": "a GGUF file",
}


def read_pth(file: Path) -> dict[str, Spec]:
    """Gives the tensors of a file of `torch.save` by their names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, compressed, names code, or is otherwise not a plain archive of tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    with file.open("rb") as opened:
        beginning = opened.read(24)
        for magic, meaning in FOREIGN.items():
            if beginning.startswith(magic):
                raise ValueError(f"{file} is not an archive of torch.save: it is {meaning}.")
        try:
            return _tensors(opened, file.stat().st_size)
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}.") from error


def _tensors(opened: BinaryIO, size: int) -> dict[str, Spec]:
    try:
        with zipfile.ZipFile(opened) as archive:
            entries = _entries(archive, size)
            root = _root(entries)
            data = _content(archive, entries[f"{root}data.pkl"])
            order = entries.get(f"{root}byteorder")
            if order is not None and _content(archive, order) != b"little":
                raise ValueError("its numbers are in the byte order of another machine")
    except ValueError:
        raise
    except Exception as error:  # a damaged one may end in almost any error
        raise ValueError(
            f"it is no whole archive of torch.save ({type(error).__name__} {error!s:.80})\n"
            "It is truncated or damaged; download or save it again"
        ) from error
    found: dict[str, Spec] = {}
    for name, saved in unpickled(data).items():
        entry = entries.get(f"{root}data/{saved.storage}")
        if entry is None:
            raise ValueError(f"{name} lies in its storage {saved.storage!r:.40}, which is not there")
        found[name] = _spec(name, saved, entry, _start(opened, entry, size))
    return found


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Gives the entries by their names, after making sure that each is stored as it is and inside the file."""
    infos = archive.infolist()
    if len(infos) > MOST_ENTRIES:
        raise ValueError(f"it has {len(infos):,} entries")
    entries = {info.filename: info for info in infos}
    if len(entries) < len(infos):
        raise ValueError("two of its entries have the same name")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"{info.filename:.80} is compressed or encrypted, which torch.save never does")
        if info.header_offset + info.file_size > size:
            raise ValueError(f"{info.filename:.80} is said to have {info.file_size:,} bytes, more than there are")
    return entries


def _root(entries: dict[str, zipfile.ZipInfo]) -> str:
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} entries data.pkl; an archive of torch.save has one")
    return roots[0]


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > LARGEST_PICKLE:
        raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes; it has at most {LARGEST_PICKLE:,}")
    return archive.read(entry)


def _start(opened: BinaryIO, entry: zipfile.ZipInfo, size: int) -> int:
    """Gives the position of the first byte of an entry, which stands behind a header of its own."""
    opened.seek(entry.header_offset)
    header = opened.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"its entry {entry.filename:.80} is not where its list of entries says")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > size:
        raise ValueError(f"it ends within {entry.filename:.80}")
    return start


def _spec(name: str, saved: Saved, entry: zipfile.ZipInfo, start: int) -> Spec:
    item, count = saved.dtype.itemsize, math.prod(saved.shape)
    if saved.claimed != entry.file_size:
        raise ValueError(f"the storage of {name} is said to have {saved.claimed:,} bytes; it has {entry.file_size:,}")
    if (saved.offset + count) * item > entry.file_size:
        raise ValueError(f"{name} has shape {list(saved.shape)}, for which its storage is too short")
    stride = 1
    for length, found in zip(reversed(saved.shape), reversed(saved.strides), strict=True):
        if length > 1 and found != stride and count:
            raise ValueError(
                f"{name} has shape {list(saved.shape)} with strides {list(saved.strides)}; tensors that do not lie row "
                "after row are not read.\nSave it again after .contiguous()"
            )
        stride *= length
    return Spec(saved.dtype, saved.shape, start + saved.offset * item, count * item)
