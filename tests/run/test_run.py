import os

import pytest
import torch

import llama4lab as lab

TEXT = "When Mary and John went to the store, John gave a drink to"
SHORT = "The capital of France is"


@pytest.fixture(scope="module")
def run(tiny) -> lab.Run:
    at = ["layers.*.feed_forward.router.*", "layers.3.self_attn.pattern", "layers.[12].resid_post"]
    return lab.record(tiny, [TEXT, SHORT], at=at)


def test_a_run_is_a_mapping_in_the_order_of_the_forward_pass(run):
    assert list(run) == run.names
    assert run.names[0] == "layers.1.feed_forward.router.logits"
    assert len(run) == 15
    assert dict(run)["layers.1.resid_post"] is run["layers.1.resid_post"]


def test_an_unrecorded_name_is_an_error_with_near_names(run):
    with pytest.raises(KeyError, match=r"'layers.3.resid_post' was not recorded.*layers.1.resid_post"):
        run["layers.3.resid_post"]


def test_layers_gathers_one_hook_point_of_all_layers(run):
    assert list(run.layers("feed_forward.router.gates")) == [1, 3, 5, 7]
    with pytest.raises(KeyError, match=r"Record it with at=.layers\.\*\.resid_mid"):
        run.layers("resid_mid")


def test_nbytes_counts_every_tensor_and_the_logits(run):
    assert run.nbytes == sum(t.numel() * t.element_size() for t in [*run.values(), run.logits])


def test_cutting_takes_rows_and_positions_and_keeps_axes(run):
    cut = run.cut(rows=1, positions=slice(-3, None))
    assert cut["layers.1.resid_post"].shape == (1, 3, 128)
    assert torch.equal(cut["layers.1.resid_post"][0], run["layers.1.resid_post"][1, -3:])
    assert torch.equal(cut["layers.3.self_attn.pattern"], run["layers.3.self_attn.pattern"][1:2, :, -3:])
    assert torch.equal(cut.logits, run.logits[1:2, -3:])
    seq = run.prompt.input_ids.shape[1]
    assert (cut.rows, cut.positions) == ([1], list(range(seq - 3, seq)))
    turned = run.cut(positions=[5, 2])
    assert torch.equal(turned["layers.1.resid_post"], run["layers.1.resid_post"][:, [5, 2]])
    assert torch.equal(turned.logits, run.logits[:, [5, 2]])
    assert turned.logit_positions == turned.positions == [5, 2]
    again = cut.cut(positions=[-1])
    assert again.positions == [seq - 1]
    with pytest.raises(IndexError, match=r"rows holds 2, but the run has 2 rows"):
        run.cut(rows=2)


def test_a_saved_run_comes_back_the_same(run, tmp_path):
    run.save(tmp_path / "a.safetensors")
    back = lab.Run.load(tmp_path / "a.safetensors")
    assert back.names == run.names
    assert all(torch.equal(back[name], run[name]) for name in run)
    assert torch.equal(back.logits, run.logits)
    assert (back.shapes, back.meta, back.rows, back.positions) == (run.shapes, run.meta, run.rows, run.positions)
    assert (back.prompt.tokens, back.prompt.modality) == (run.prompt.tokens, run.prompt.modality)
    assert back.prompt.spans == run.prompt.spans
    assert torch.equal(back.prompt.attention_mask, run.prompt.attention_mask)


def test_a_saved_run_keeps_its_image(tiny, asked, picture, tmp_path):
    run = lab.record(tiny, asked, at="image_features")
    run.save(tmp_path / "a.safetensors")
    layout = lab.Run.load(tmp_path / "a.safetensors").prompt.images[0]
    assert torch.equal(layout.boxes, asked.images[0].boxes)
    assert layout.tiles == asked.images[0].tiles
    assert layout.original is not None
    assert layout.original.tobytes() == picture.tobytes()


def test_a_failed_save_leaves_the_old_file_and_no_rest(run, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(*_args, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr("llama4lab.run.tensor_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_that_is_no_run_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors is not a run: its metadata says 'no format'"):
        lab.Run.load(tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(ValueError, match=r"torn.safetensors is not a run"):
        lab.Run.load(tmp_path / "torn.safetensors")


def test_a_run_shows_itself_in_a_few_lines(run):
    assert repr(run).splitlines()[0].startswith("Run: 2 x 15 tokens, 15 hook points")
    assert "layers.{i}.feed_forward.router.gates [2, 15, 1] 1, 3, 5, 7" in repr(run)
    assert "<table>" in run._repr_html_()
