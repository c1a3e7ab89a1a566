"""Where GGUF checkpoints are: a file, a folder, parts of a split one, the hub; and which vision tower belongs to it."""

import shutil
from pathlib import Path

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint.gguf.pieces import vision_file
from llama4lab.checkpoint.locating import locate


@pytest.fixture(scope="module")
def split(gguf_saved, new_text_model):
    """A model in parts, and the model that was written."""
    model = new_text_model()
    return gguf_saved(model, "F32", most=20), model


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A snapshot in the cache of the hub, as downloading it would have left it; a function puts files into it."""
    snapshot = tmp_path / "hub" / "models--owner--llama-GGUF" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(*names: str) -> Path:
        for name in names:
            (snapshot / name).parent.mkdir(exist_ok=True)
            (snapshot / name).write_bytes(b"")
        return snapshot

    return put


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_a_split_model_is_loaded_by_any_of_its_parts(split, random_ids):
    first, _ = split
    parts = sorted(first.parent.glob("model-*.gguf"))
    assert len(parts) > 2
    ids = random_ids(1, 12)
    with torch.no_grad():
        logits = [lab.load(each)(ids).logits for each in (first.parent, parts[0], parts[-1])]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert lab.load(parts[-1]).folder == parts[0]


def test_a_part_that_is_missing_is_named(split, tmp_path):
    first, _ = split
    copied = shutil.copytree(first.parent, tmp_path / "copy")
    parts = sorted(copied.glob("model-*.gguf"))
    parts[1].unlink()
    for name in (copied, parts[0], parts[-1]):
        with pytest.raises(FileNotFoundError, match=rf"of which 1 are missing: {parts[1].name}"):
            lab.load(name)


def test_parts_in_another_order_are_refused(split, tmp_path):
    first, _ = split
    copied = shutil.copytree(first.parent, tmp_path / "copy")
    parts = sorted(copied.glob("model-*.gguf"))
    parts[1].rename(copied / "kept")
    parts[2].rename(parts[1])
    (copied / "kept").rename(parts[2])
    with pytest.raises(ValueError, match=r"says that it is part 3 of \d; by its name it is 2 of"):
        lab.load(copied)


def test_one_part_under_another_name_is_refused(split, tmp_path):
    shutil.copy(split[0], tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"says that it is one of \d parts; by its name it is one of 1"):
        lab.load(tmp_path)


def test_a_folder_with_several_models_lists_them(tmp_path):
    touched(tmp_path, "scout-Q4_K_M.gguf", "scout-Q8_0-00001-of-00002.gguf", "scout-Q8_0-00002-of-00002.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF models: scout-Q4_K_M.gguf, scout-Q8_0-00001-of") as error:
        locate(tmp_path)
    assert "00002-of" not in str(error.value).splitlines()[0]


def test_a_folder_of_safetensors_stays_one(tmp_path):
    assert locate(touched(tmp_path, "model.safetensors", "scout.gguf")) == tmp_path


def test_a_vision_tower_alone_is_no_checkpoint(tmp_path):
    touched(tmp_path, "mmproj-F16.gguf")
    with pytest.raises(ValueError, match="a vision tower without its model"):
        locate(tmp_path)
    with pytest.raises(ValueError, match="is a vision tower; give the model"):
        locate(tmp_path / "mmproj-F16.gguf")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["mmproj.gguf"], "mmproj.gguf"),
        (["mmproj-F16.gguf", "mmproj-BF16.gguf", "mmproj-F32.gguf"], "mmproj-BF16.gguf"),
        (["x-mmproj-f16.gguf", "x-mmproj-f32.gguf"], "x-mmproj-f32.gguf"),
        ([], None),
    ],
)
def test_of_several_files_of_a_vision_tower_the_most_exact_is_taken(tmp_path, names, chosen):
    touched(tmp_path, "model.gguf", *names)
    assert vision_file(tmp_path / "model.gguf") == (chosen and tmp_path / chosen)


def test_several_vision_towers_are_refused(tmp_path):
    touched(tmp_path, "model.gguf", "mmproj-a.gguf", "mmproj-b.gguf")
    with pytest.raises(ValueError, match=r"holds several vision towers: mmproj-a\.gguf, mmproj-b\.gguf"):
        vision_file(tmp_path / "model.gguf")


def test_a_file_on_the_hub_is_found_with_what_belongs_to_it(hub_cache):
    snapshot = hub_cache("scout-Q4.gguf", "Q8/scout-Q8-00001-of-00002.gguf", "Q8/scout-Q8-00002-of-00002.gguf")
    hub_cache("mmproj-F16.gguf", "config.json")
    assert locate("owner/llama-GGUF/scout-Q4.gguf") == snapshot / "scout-Q4.gguf"
    assert locate("owner/llama-GGUF/scout-Q4.gguf@main") == snapshot / "scout-Q4.gguf"
    found = locate("owner/llama-GGUF/Q8/scout-Q8-00002-of-00002.gguf")
    assert found == snapshot / "Q8" / "scout-Q8-00001-of-00002.gguf"
    assert vision_file(found) == snapshot / "mmproj-F16.gguf"


def test_only_the_file_that_was_asked_for_is_downloaded(hub_cache, monkeypatch):
    snapshot, asked = hub_cache("Q8/a-00001-of-00002.gguf", "Q8/a-00002-of-00002.gguf"), {}

    def download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(snapshot)

    monkeypatch.setattr("llama4lab.checkpoint.locating.snapshot_download", download)
    locate("owner/llama-GGUF/Q8/a-00001-of-00002.gguf@v2")
    assert (asked["hub_id"], asked["revision"]) == ("owner/llama-GGUF", "v2")
    assert asked["allow_patterns"] == ["Q8/a-*-of-00002.gguf", "*mmproj*.gguf", "*.json", "*.jinja"]


def test_a_file_that_is_not_on_the_hub_is_answered_with_near_misses(hub_cache):
    hub_cache("scout-Q4_K_M.gguf")
    with pytest.raises(FileNotFoundError, match=r"has no file scout-Q4_K_S.gguf(.|\n)*Near misses: scout-Q4_K_M.gguf"):
        locate("owner/llama-GGUF/scout-Q4_K_S.gguf")
    with pytest.raises(FileNotFoundError, match="neither a folder here nor complete in the cache"):
        locate("owner/other/scout-Q4_K_S.gguf")


def test_a_repository_of_gguf_files_needs_the_name_of_one(hub_cache):
    hub_cache("config.json")
    with pytest.raises(
        ValueError, match=r'give one of its GGUF files, for example "owner/llama-GGUF/model-Q4_K_M\.gguf"'
    ):
        locate("owner/llama-GGUF")


def test_a_file_that_does_not_exist_is_answered_with_near_misses(tmp_path, monkeypatch):
    touched(tmp_path, "scout-Q4_K_M.gguf")
    with pytest.raises(FileNotFoundError, match=r"does not exist.\nNear misses: scout-Q4_K_M.gguf"):
        locate(tmp_path / "scout-Q4_K_S.gguf")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match=r"does not exist.\nNear misses: scout-Q4_K_M.gguf"):
        locate(f"{tmp_path.name}/scout-Q4_K_S.gguf")
