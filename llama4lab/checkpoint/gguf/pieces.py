"""Which GGUF files make up a checkpoint: the parts of a split one, and the file of the vision tower beside it."""

import re
from collections.abc import Iterable
from pathlib import Path

from llama4lab.checkpoint.gguf.header import Header, read_gguf
from llama4lab.checkpoint.spelling import listed

ARCHITECTURE = "llama4"
PROJECTORS = ("clip.projector_type", "clip.vision.projector_type")
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Files of the same vision tower: those that lose nothing of bfloat16 weights come first.
PREFERRED = ("bf16", "f32", "f16")


def is_vision(file: Path) -> bool:
    """Whether a file is, by its name, one of a vision tower."""
    return "mmproj" in file.name.lower()


def parts_of(file: Path) -> list[Path]:
    """Gives all parts of a split model, of which any may be given; for others the file alone.

    Raises:
        FileNotFoundError: if a part is not there.
    """
    found = SPLIT.fullmatch(file.name)
    if found is None:
        return [file]
    count = int(found["count"])
    # Never so many as the name says if they are not there: it may say 99999.
    names = (f"{found['stem']}-{number:05}-of-{found['count']}.gguf" for number in range(1, count + 1))
    parts = [file.with_name(name) for name in names]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise FileNotFoundError(
            f"{file} is one of {count} parts, of which {len(missing)} are missing: {listed(missing)}.\n"
            "All of them have to be in the same folder, under the names that they were published with."
        )
    return parts


def models_in(folder: Path) -> list[Path]:
    """Gives the models in a folder: each file that is not one of a vision tower, of split ones a part."""
    files = (file for file in sorted(folder.glob("*.gguf")) if file.is_file() and not is_vision(file))
    first: dict[str, Path] = {}
    for file in files:
        found = SPLIT.fullmatch(file.name)
        first.setdefault(f"{found['stem']} {found['count']}" if found else file.name, file)
    return list(first.values())


def folders_of(file: Path) -> list[Path]:
    """Gives the folders where other files of the checkpoint may be: its own and, in the hub's cache, the commit's."""
    own = file.parent
    above = [folder for folder in own.parents if folder.parent.name == "snapshots"]
    return [own, *above]


def beside(file: Path, name: str) -> Path | None:
    """Gives a file of the checkpoint; None if there is none of that name."""
    return next((folder / name for folder in folders_of(file) if (folder / name).is_file()), None)


def vision_file(file: Path) -> Path | None:
    """Gives the file of the vision tower that belongs to a model; None if there is none.

    Raises:
        ValueError: if there are several, and none is the obvious one.
    """
    for folder in folders_of(file):
        found = [each for each in sorted(folder.glob("*.gguf")) if is_vision(each) and each.is_file()]
        for kind in PREFERRED:
            # "f16" is also the end of "bf16".
            exact = [each for each in found if re.search(rf"(?<![a-z]){kind}(?![0-9a-z])", each.name.lower())]
            found = exact if exact else found
            if len(exact) == 1:
                break
        if len(found) > 1:
            raise ValueError(f"{folder} holds several vision towers: {listed(each.name for each in found)}. Keep one.")
        if found:
            return found[0]
    return None


def read_model(file: Path) -> list[Header]:
    """Gives the headers of all parts of a text model, the one with the settings first.

    Raises:
        FileNotFoundError: if a part is not there.
        ValueError: if one is malformed, if they do not belong together, or are not those of a Llama 4.
    """
    headers = [read_gguf(part) for part in parts_of(file)]
    _check_split(headers)
    architecture = headers[0].get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{headers[0].file}: general.architecture is {architecture!r:.80}; llama4lab opens {ARCHITECTURE!r} only."
        )
    return headers


def read_vision(file: Path) -> Header | None:
    """Gives the header of the vision tower that belongs to a model; None if there is none.

    Raises:
        ValueError: if it is malformed, or not that of a Llama 4.
    """
    found = vision_file(file)
    if found is None:
        return None
    header = read_gguf(found)
    said = [
        header.metadata[key] for key in ("clip.projector_type", "clip.vision.projector_type") if key in header.metadata
    ]
    if header.get("general.architecture", str) != "clip" or not said or any(kind != ARCHITECTURE for kind in said):
        raise ValueError(
            f"{found} is no vision tower of a Llama 4: its projector is {listed(map(repr, said)) or 'not named'}.\n"
            "Take it away if the model beside it is to be loaded without images."
        )
    return header


def _check_split(headers: Iterable[Header]) -> None:
    headers = list(headers)
    first = headers[0]
    count = first.get("split.count", int, 0)
    if len(headers) == 1 and count <= 1:
        return
    if count != len(headers):
        raise ValueError(
            f"{first.file} says that it is one of {count} parts; by its name it is one of {len(headers)}.\n"
            "Parts keep the names that they were published with."
        )
    for number, header in enumerate(headers):
        found = header.get("split.no", int), header.get("split.count", int)
        if found != (number, count):
            raise ValueError(
                f"{header.file} says that it is part {found[0] + 1} of {found[1]}; "
                f"by its name it is {number + 1} of {count}."
            )
    tensors = sum(len(header.tensors) for header in headers)
    said = first.get("split.tensors.count", int, tensors)
    if said != tensors:
        raise ValueError(f"{first.file} says that all parts have {said:,} tensors; they have {tensors:,}.")
