from pathlib import Path

import pytest

import llama4lab
from llama4lab.checkpoint.locating import locate


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """A cache with one checkpoint, as downloading it would have left it."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--llama"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_tiny_is_in_the_package():
    assert locate("tiny") == Path(llama4lab.__file__).parent / "tiny"


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llama").mkdir()
    assert locate("~/llama") == tmp_path / "llama"


def test_a_hub_id_is_found_in_the_cache_without_network(hub_cache):
    folder = locate("owner/llama")
    assert folder == hub_cache
    assert (folder / "config.json").read_text() == "{}"


def test_a_revision_is_found_in_the_cache(hub_cache):
    assert locate("owner/llama@main") == hub_cache
    assert locate(f"owner/llama@{'a' * 40}") == hub_cache
    with pytest.raises(FileNotFoundError, match=r"owner/llama at revision v2 is neither a folder here nor complete"):
        locate("owner/llama@v2")


def test_a_hub_id_that_is_not_in_the_cache_says_what_would_work(hub_cache):
    with pytest.raises(FileNotFoundError, match="owner/other is neither a folder here nor complete") as error:
        locate("owner/other")
    assert "HF_HUB_OFFLINE" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("name", ["tinny", "./tiny-2", "a/b/c", "", "/nowhere/at/all", Path("owner/llama")])
def test_a_name_that_is_nothing_says_what_a_checkpoint_is(name, hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        (tmp_path / "hub").rename(tmp_path / "moved")  # "" is the working folder, which exists
        assert locate(name) == Path()
        return
    with pytest.raises(FileNotFoundError, match=r'does not exist\.(\nNear misses: tiny\.)?\nA checkpoint is "tiny"'):
        locate(name)


def test_a_misspelt_folder_is_answered_with_near_misses(tmp_path):
    (tmp_path / "llama-4-scout").mkdir()
    with pytest.raises(FileNotFoundError, match="Near misses: llama-4-scout"):
        locate(tmp_path / "llama-4-scuot")


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file; a checkpoint is the folder"):
        locate(tmp_path / "model.safetensors")


def test_the_packaged_checkpoint_has_no_revision():
    with pytest.raises(FileNotFoundError, match=r"tiny@v2 does not exist.\nNear misses: tiny"):
        locate("tiny@v2")
