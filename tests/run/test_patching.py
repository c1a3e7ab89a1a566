import pytest
import torch

import llama4lab as lab

TEXT = "When Mary and John went to the store, John gave a drink to"
SHORT = "The capital of France is"

pytestmark = pytest.mark.usefixtures("no_hooks_left")
OTHER = "When Mary and John went to the store, Mary gave a drink to"


def test_patching_a_run_with_itself_changes_nothing(tiny):
    names = ["embed_merged", "layers.2.self_attn.z", "layers.3.feed_forward.experts.out", "layers.4.resid_mid"]
    run = lab.record(tiny, TEXT, at=names)
    with lab.patched(tiny, dict(run)):
        assert torch.equal(lab.record(tiny, TEXT).logits, run.logits)


def test_patching_the_last_residual_with_another_run_gives_its_logits(tiny):
    other = lab.record(tiny, OTHER, at="layers.7.resid_post")
    with lab.patched(tiny, {"layers.7.resid_post": other["layers.7.resid_post"]}):
        assert torch.equal(lab.record(tiny, TEXT).logits, other.logits)


def test_a_function_gets_the_tensor_and_gives_the_new_one(tiny):
    seen = []

    def double(x):
        seen.append(x.shape)
        return 2 * x

    before = lab.record(tiny, TEXT, at="layers.3.feed_forward.out")["layers.3.feed_forward.out"]
    with lab.patched(tiny, {"layers.3.feed_forward.out": double}):
        after = lab.record(tiny, TEXT, at="layers.3.feed_forward.out")["layers.3.feed_forward.out"]
    assert torch.equal(after, 2 * before)
    assert seen == [before.shape]


def test_patches_nest_and_the_inner_sees_the_outer(tiny):
    with lab.patched(tiny, {"layers.1.resid_post": 1.0}), lab.patched(tiny, {"layers.1.resid_post": lambda x: x + 2}):
        assert (lab.record(tiny, SHORT, at="layers.1.resid_post")["layers.1.resid_post"] == 3).all()


def test_one_glob_patches_every_layer(tiny):
    with lab.patched(tiny, {"layers.*.feed_forward.router.indices": 5}):
        run = lab.record(tiny, SHORT, at="layers.*.feed_forward.router.indices")
    assert all((indices == 5).all() for indices in run.values())


def test_forcing_an_expert_keeps_the_gate_rule(tiny):
    plain = lab.record(tiny, SHORT, at="layers.3.feed_forward.router.*")
    with lab.patched(tiny, {"layers.3.feed_forward.router.indices": 2}):
        forced = lab.record(tiny, SHORT, at="layers.3.feed_forward.router.*")
    logits = plain["layers.3.feed_forward.router.logits"]
    assert torch.equal(forced["layers.3.feed_forward.router.gates"], torch.sigmoid(logits[..., 2:3]))


def test_raising_a_router_logit_re_routes(tiny):
    def prefer(x):
        return torch.where(torch.arange(x.shape[-1]) == 6, x.max() + 1, x)

    with lab.patched(tiny, {"layers.5.feed_forward.router.logits": prefer}):
        run = lab.record(tiny, SHORT, at="layers.5.feed_forward.router.indices")
    assert (run["layers.5.feed_forward.router.indices"] == 6).all()


@pytest.mark.parametrize(
    ("name", "patch", "error", "message"),
    [
        ("layers.1.resid_post", torch.zeros(3), ValueError, r"has shape \[3\].*shape \[1, 6, 128\]"),
        ("layers.1.resid_post", torch.full((128,), float("nan")), ValueError, "holds NaN"),
        ("layers.1.resid_pst", 0.0, ValueError, "matches none of the 210 hook points"),
        ("layers.1.resid_post", lambda x: None, TypeError, "returned NoneType; return the new tensor"),
        ("layers.1.resid_post", lambda x: x[:, :1], ValueError, r"returned shape \[1, 1, 128\]"),
        ("layers.1.resid_post", lambda x: x.mul_(2), RuntimeError, "edited its tensor in place"),
        ("layers.1.feed_forward.router.indices", 8, ValueError, "Expert indices are integers from 0 to 7"),
        ("layers.1.feed_forward.router.indices", 0.5, ValueError, "dtype torch.float32; the hook point has"),
    ],
)
def test_a_bad_patch_is_refused_with_what_would_work(tiny, name, patch, error, message):
    with pytest.raises(error, match="(?s)" + message), lab.patched(tiny, {name: patch}):
        lab.record(tiny, SHORT)


def test_two_names_for_one_hook_point_are_refused(tiny):
    with (
        pytest.raises(ValueError, match=r"'layers.1.resid_post' is patched twice, by 'layers.\*.resid_post' too"),
        lab.patched(tiny, {"layers.1.resid_post": 0.0, "layers.*.resid_post": 1.0}),
    ):
        pass


def test_a_patch_that_is_never_applied_is_an_error(tiny):
    with pytest.raises(RuntimeError, match="no pass of the model ran"), lab.patched(tiny, {"embed": 0.0}):
        pass
    with (
        pytest.raises(RuntimeError, match=r"1 passes of the model ran\): image_features"),
        lab.patched(tiny, {"image_features": 0.0}),
    ):
        lab.record(tiny, SHORT)


def test_an_error_inside_the_block_is_not_hidden(tiny):
    with pytest.raises(ZeroDivisionError), lab.patched(tiny, {"image_features": 0.0}):
        raise ZeroDivisionError


def test_zeroed_image_features_change_the_answer(tiny, asked):
    plain = lab.record(tiny, asked).logits[0, -1]
    with lab.patched(tiny, {"image_features": 0.0}):
        blind = lab.record(tiny, asked).logits[0, -1]
    assert (plain - blind).abs().max() > 0.1
