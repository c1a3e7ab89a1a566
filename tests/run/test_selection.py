import pytest

from llama4lab.run.selection import selected


def test_a_star_stands_for_one_part_of_a_name(tiny):
    names = selected(tiny.hook_points(), "layers.*.resid_post")
    assert names == [f"layers.{layer}.resid_post" for layer in range(8)]


def test_two_stars_stand_for_any_number_of_parts(tiny):
    names = selected(tiny.hook_points(), "layers.3.**")
    assert "layers.3.resid_pre" in names
    assert "layers.3.feed_forward.router.gates" in names
    assert all(name.startswith("layers.3.") for name in names)
    assert len(selected(tiny.hook_points(), "**")) == len(tiny.hook_points())


def test_names_come_once_and_in_the_order_of_the_forward_pass(tiny):
    names = selected(tiny.hook_points(), ["logits", "layers.1.resid_pre", "layers.*.resid_pre", "embed"])
    assert names == ["embed", *(f"layers.{layer}.resid_pre" for layer in range(8)), "logits"]


def test_a_range_of_layers_can_be_given_in_brackets(tiny):
    assert selected(tiny.hook_points(), "layers.[2-4].resid_mid") == [f"layers.{i}.resid_mid" for i in (2, 3, 4)]


@pytest.mark.parametrize("pattern", ["layers.9.resid_post", "layers.0.feed_forward.router.logits", "resid_post", ""])
def test_a_name_that_matches_nothing_is_an_error_with_near_names(tiny, pattern):
    with pytest.raises(ValueError, match=r"matches none of the 210 hook points.*\nNear names: ") as problem:
        selected(tiny.hook_points(), ["embed", pattern])
    if pattern == "layers.9.resid_post":
        assert "layers.0.resid_post" in str(problem.value) or "resid_post" in str(problem.value)
