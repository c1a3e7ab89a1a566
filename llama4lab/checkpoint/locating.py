"""Where a checkpoint is: a name -> a folder on this machine."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from llama4lab.checkpoint.spelling import near_misses

TINY = Path(__file__).parent.parent / "tiny"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
NOT_OURS = ["original/*", "metal/*", "onnx/*"]  # other formats of the same weights


def locate(name: str | Path) -> Path:
    """Gives the folder of a checkpoint, after downloading it where needed.

    Args:
        name: `"tiny"`, the trained checkpoint that comes with the package; a folder; or an id on the Hugging Face hub,
            `"owner/name"` or, at a branch, tag or commit, `"owner/name@revision"`. A folder that exists comes before an
            id of the same name; a folder named tiny is `"./tiny"`. With `HF_HUB_OFFLINE=1` the hub is not asked: only
            what is in its cache already is used.

    Raises:
        FileNotFoundError: if there is no such folder, and no such id on the hub or in its cache.
        PermissionError: if the owner of the hub repository has to grant access first.
        ValueError: if the name is that of a file.
    """
    folder = TINY if name == "tiny" else Path(name).expanduser()
    if folder.is_dir() or name == "tiny":
        return folder
    if folder.is_file():
        raise ValueError(f"{name} is a file; a checkpoint is the folder with config.json and the weights.")
    hub_id, _, revision = ("", "", "") if isinstance(name, Path) else name.partition("@")
    if not HUB_ID.fullmatch(hub_id):
        raise FileNotFoundError(_no_folder(folder))
    return _fetch(hub_id, revision or None)


def _fetch(hub_id: str, revision: str | None) -> Path:
    wanted = hub_id + (f" at revision {revision}" if revision else "")
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=FILES,
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
