"""Where a checkpoint is: a name -> a folder on this machine, or the GGUF file that it is."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from llama4lab.checkpoint.gguf.pieces import SPLIT, is_vision, models_in, parts_of
from llama4lab.checkpoint.shards import INDEX, SINGLE
from llama4lab.checkpoint.spelling import listed, near_misses

TINY = Path(__file__).parent.parent / "tiny"
HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(/(?P<file>[\w][\w./ -]*\.gguf))?(@(?P<revision>.+))?")
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
FILES += ["consolidated.*.pth", "*_scales_*.pt"]  # of repositories in Meta's own format
NOT_OURS = ["original/*", "metal/*", "onnx/*"]  # other formats of the same weights
# What may lie beside a GGUF file: the vision tower, the config and the tokenizer.
BESIDE_GGUF = ["*mmproj*.gguf", "*.json", "*.jinja"]


def locate(name: str | Path) -> Path:
    """Gives where a checkpoint is, after downloading it where needed: its folder or, of a GGUF checkpoint, its file.

    Args:
        name: `"tiny"`, the trained checkpoint that comes with the package; a folder; a GGUF file (of a split one any
            part); or an id on the Hugging Face hub, `"owner/name"` or, for one GGUF file of many,
            `"owner/name/file.gguf"`, either of them at a branch, tag or commit with `"@revision"` behind it. What
            exists here comes before an id of the same name; a folder named tiny is `"./tiny"`. With `HF_HUB_OFFLINE=1`
            the hub is not asked: only what is in its cache already is used.

    Raises:
        FileNotFoundError: if there is no such folder or file, and no such id on the hub or in its cache.
        PermissionError: if the owner of the hub repository has to grant access first.
        ValueError: if the name is that of another file, or of a folder with several GGUF models.
    """
    folder = TINY if name == "tiny" else Path(name).expanduser()
    if name == "tiny":
        return folder
    if folder.is_dir():
        return _in_folder(folder)
    if folder.is_file():
        return _file(folder)
    found = None if isinstance(name, Path) else HUB_ID.fullmatch(name)
    if found is None or _is_path(found["id"], found["file"], folder):
        raise FileNotFoundError(_no_folder(folder))
    snapshot = _fetch(found["id"], found["revision"], found["file"])
    if found["file"] is not None:
        return _in_snapshot(snapshot, found["file"], name)
    if "gguf" in found["id"].lower() and not any(snapshot.glob("*.safetensors")) and not any(snapshot.glob("*.gguf")):
        raise ValueError(
            f'{name} has no safetensors; give one of its GGUF files, for example "{name}/model-Q4_K_M.gguf".'
        )
    return _in_folder(snapshot)


def _is_path(hub_id: str, file: str | None, folder: Path) -> bool:
    """Whether what looks like the name of a repository, or of a file in it, is a path that leads nowhere."""
    return hub_id.endswith(".gguf") or (file is not None and (".." in file or folder.parent.is_dir()))


def _in_folder(folder: Path) -> Path:
    """Gives the folder, or the one GGUF model in it if it has no weights in another format."""
    files = list(folder.glob("*.gguf"))
    if not files or any((folder / name).exists() for name in (SINGLE, INDEX)):
        return folder
    models = models_in(folder)
    if not models:
        raise ValueError(f"{folder} holds {listed(file.name for file in files)}, a vision tower without its model.")
    if len(models) > 1:
        raise ValueError(
            f"{folder} holds {len(models)} GGUF models: {listed((file.name for file in models), most=8)}.\n"
            f'Give one of them by its file, for example "{models[0]}".'
        )
    return _file(models[0])


def _file(file: Path) -> Path:
    if file.suffix != ".gguf":
        raise ValueError(
            f"{file} is a file; a checkpoint is the folder with config.json and the weights, or a .gguf file."
        )
    if is_vision(file):
        raise ValueError(
            f"{file} is a vision tower; give the model that it belongs to, and it will be found beside it."
        )
    return parts_of(file)[0]


def _in_snapshot(snapshot: Path, file: str, name: str | Path) -> Path:
    if (snapshot / file).is_file():
        return _file(snapshot / file)
    near = near_misses(file, (str(each.relative_to(snapshot)) for each in snapshot.rglob("*.gguf")))
    raise FileNotFoundError(
        f"{name}: the repository has no file {file}, or it is not in the cache of the Hugging Face hub."
        + (f"\nNear misses: {near}." if near else "")
    )


def _fetch(hub_id: str, revision: str | None, file: str | None) -> Path:
    wanted = hub_id + (f" at revision {revision}" if revision else "")
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=FILES if file is None else [_all_parts(file), *BESIDE_GGUF],
            ignore_patterns=NOT_OURS,
        )
    except GatedRepoError as error:
        raise PermissionError(
            f"{wanted} is open only to people its owner has granted access.\n"
            "Ask for access on the page of the model, then log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{wanted} is neither a folder here nor complete in the cache of the Hugging Face hub.\n"
            f"The hub was not asked, or did not answer: {_first_line(error)}\n"
            "Load it once with a network connection and without HF_HUB_OFFLINE, or give the path of a folder."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{wanted} is neither a folder here nor on the Hugging Face hub: {_first_line(error)}\n"
            'Check the spelling; the packaged checkpoint is "tiny".'
        ) from error
    return Path(folder)


def _all_parts(file: str) -> str:
    """Gives the pattern of a GGUF file and, if it is split, of all its parts."""
    found = SPLIT.fullmatch(file)
    return f"{found['stem']}-*-of-{found['count']}.gguf" if found else file


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _no_folder(folder: Path) -> str:
    siblings = [sibling.name for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = near_misses(folder.name, [*siblings, "tiny"])
    return (
        f"{folder} does not exist."
        + (f"\nNear misses: {near}." if near else "")
        + ('\nA checkpoint is "tiny", the path of a folder, or an id on the Hugging Face hub such as "owner/name".')
    )
