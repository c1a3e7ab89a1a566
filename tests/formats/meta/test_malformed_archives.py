"""Files that are no whole archive of tensors: each is refused by name, and no code that a pickle names is run."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint.meta.archive import read_pth

RANKS = ("consolidated.00.pth", "consolidated.01.pth")


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    held = torch.load(file, weights_only=False)
    change(held)
    torch.save(held, file)


def rezipped(file: Path, change: Callable[[str, bytes], bytes | None], kind: int = zipfile.ZIP_STORED) -> None:
    """Writes an archive anew, each entry as `change` gives it; None leaves one out."""
    with zipfile.ZipFile(file) as archive:
        entries = [(name, change(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in entries:
            if content is not None:
                archive.writestr(name, content)


class Hostile:
    """Says in its pickle that a function is to be called."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, open, getattr, torch.load, pickle.loads, struct.pack])
def test_no_code_of_a_pickle_is_run(folder, tmp_path, function):
    marker = tmp_path / "ran"
    commands = {os.system: f"touch {marker}", eval: f"open({str(marker)!r}, 'w')", exec: f"open({str(marker)!r}, 'w')"}
    arguments = (commands[function],) if function in commands else (str(marker), "w")
    changed(folder / RANKS[1], lambda held: held.update({"norm.weight": Hostile(function, *arguments)}))
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth cannot be read: its pickle names .+, which no tensor"):
        lab.load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_code_of_a_bare_pickle_is_run(folder, tmp_path, protocol):
    marker = tmp_path / "ran"
    (folder / RANKS[0]).write_bytes(pickle.dumps(Hostile(os.system, f"touch {marker}"), protocol))
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth"):
        lab.load(folder)
    assert not marker.exists()


INSTRUCTIONS = {
    "an object built in another way": (b"(ios\nsystem\n.", "instruction INST"),
    "a code of an extension": (b"\x82\x01.", "instruction EXT1"),
    "a number for too many objects": (b"}r\xff\xff\xff\x7f.", "numbers an object"),
    "bytes that are not there": (b"\x8e" + b"\xff" * 8 + b".", "damaged"),
    "no end": (b"}", "damaged"),
    "nothing": (b"", "damaged"),
    "a list": (b"].", "it holds a list"),
    "a number under a name": (b"}U\x01aK\x01s.", "instruction SHORT_BINSTRING"),
    "a name of torch": (b"ctorch\nload\n.", r"names torch\.load"),
    "attributes of what stands for a function": (
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb.",
        "damaged",
    ),
    "a tensor of nothing": (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
    "a storage of another kind": (b"X\x01\0\0\0aQ.", "something else than a storage"),
}


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_a_pickle_of_other_instructions_is_refused(folder, kind):
    content, expected = INSTRUCTIONS[kind]
    file = folder / RANKS[0]
    rezipped(file, lambda name, old: content if name.endswith("data.pkl") else old)
    with pytest.raises(ValueError, match=rf"consolidated\.00\.pth cannot be read: [^\n]*{expected}"):
        read_pth(file)


def _storage(name: str) -> bool:
    return name.endswith("data/3")


ARCHIVES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle of old": (
        lambda file: torch.save(torch.load(file, weights_only=False), file, _use_new_zipfile_serialization=False),
        "a bare pickle, as torch before 1.6 wrote it",
    ),
    "a pointer": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "another format": (lambda file: file.write_bytes(b"GGUF" + bytes(90)), "a GGUF file"),
    "nothing": (lambda file: file.write_bytes(b""), "truncated or damaged"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-40]), "truncated or damaged"),
    "cut in half": (
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "truncated or damaged",
    ),
    "compressed": (lambda file: rezipped(file, lambda _, old: old, zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "without a storage": (
        lambda file: rezipped(file, lambda name, old: None if _storage(name) else old),
        r"lies in its storage '3', which is not there",
    ),
    "a short storage": (
        lambda file: rezipped(file, lambda name, old: old[:-4] if _storage(name) else old),
        r"is said to have [\d,]+ bytes; it has",
    ),
    "of another machine": (
        lambda file: rezipped(file, lambda name, old: b"big" if name.endswith("byteorder") else old),
        "byte order of another machine",
    ),
    "without a pickle": (
        lambda file: rezipped(file, lambda name, old: None if name.endswith("data.pkl") else old),
        r"it has 0 entries data\.pkl",
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_what_is_no_whole_archive_of_tensors_is_refused(folder, kind):
    damage, expected = ARCHIVES[kind]
    damage(folder / RANKS[1])
    with pytest.raises(ValueError, match=rf"(?s)consolidated\.01\.pth .*{expected}"):
        lab.load(folder)


def test_changed_bytes_of_a_header_are_refused_or_change_nothing_else(folder, tmp_path):
    """Every cut, and many changed bytes, of the list of entries and of the pickle; none crashes or hangs."""
    file, copy = folder / RANKS[0], tmp_path / "consolidated.00.pth"
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        pickled = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        places = range(pickled.header_offset, pickled.header_offset + pickled.file_size + 80)
        tail = range(archive.start_dir, len(whole))
    generator = torch.Generator().manual_seed(0)
    refused: list[str] = []
    for turn in range(400):
        among = places if turn % 2 else tail
        place = among[int(torch.randint(len(among), (), generator=generator))]
        value = int(torch.randint(256, (), generator=generator))
        copy.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            found = read_pth(copy)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert all(spec.start + spec.nbytes <= len(whole) for spec in found.values())
    assert len(refused) > 130
    assert all(str(copy) in message for message in refused)
