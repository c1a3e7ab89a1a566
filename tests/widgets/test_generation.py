"""A text that is generated as one watches, without a browser."""

import asyncio
import threading

import pandas as pd
import pytest
import torch
from traitlets import TraitError

import llama4lab as lab
from llama4lab.run.listening import is_hooked
from llama4lab.tables import generation
from llama4lab.widgets.generation import SHOWS, Generation
from llama4lab.widgets.turns import Turns

TEXTS = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
ENDLESS = {"max_new_tokens": 5, "eos_token_id": None}


@pytest.fixture(scope="module")
def tiny():
    return lab.load()


@pytest.fixture(autouse=True)
def _no_hook_or_thread_left(tiny):
    yield
    assert not is_hooked(tiny)


@pytest.fixture
def view(tiny):
    own = Generation(tiny, TEXTS, **ENDLESS)
    yield own
    own.close()
    assert not any(thread.name == "llama4lab turns" and thread.is_alive() for thread in threading.enumerate())


def run_to_the_end(view, each=lambda: None) -> None:
    async def go() -> None:
        view.run()
        while view.state == "running":
            await asyncio.sleep(0)
            each()
        await view._task

    asyncio.run(go())


def test_all_ways_of_going_on_write_what_generate_gives(view, tiny):
    run = lab.generate(tiny, TEXTS, at="layers.*.feed_forward.router.*", **ENDLESS)
    expected = run.prompt.input_ids[:, -5:]
    view.generate()
    assert (view.state, torch.equal(view.pace.new, expected)) == ("ended", True)
    pd.testing.assert_frame_equal(view.tables.tokens, generation.tokens(run), atol=1e-4)
    run_to_the_end(view)
    assert (view.state, torch.equal(view.pace.new, expected)) == ("ended", True)
    for count in range(1, 6):
        view.step()
        assert view.pace.new.shape[1] == count
    assert (view.state, torch.equal(view.pace.new, expected)) == ("ended", True)


def test_a_text_that_was_stopped_leaves_the_model_free_and_goes_on(view, tiny):
    def stop_at_three() -> None:
        if view.pace.new.shape[1] == 3:
            view.stop()
            assert not is_hooked(tiny)

    run_to_the_end(view, stop_at_three)
    assert (view.state, view.pace.new.shape[1]) == ("resting", 3)
    elsewhere = lab.record(tiny, TEXTS[1], at="layers.3.feed_forward.router.indices")
    run_to_the_end(view)
    alone = lab.generate(tiny, TEXTS, **ENDLESS)
    assert torch.equal(view.pace.new, alone.prompt.input_ids[:, -5:])
    again = lab.record(tiny, TEXTS[1], at="layers.3.feed_forward.router.indices")
    assert torch.equal(*(run["layers.3.feed_forward.router.indices"] for run in (elsewhere, again)))


def test_the_seed_decides_and_other_random_numbers_are_left_alone(tiny):
    options = {**ENDLESS, "do_sample": True, "temperature": 3.0}
    view = Generation(tiny, TEXTS[1], seed=7, **options)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    view.step()
    view.generate()
    whole = view.pace.new
    view.again()
    for _ in range(5):
        view.step()
        torch.manual_seed(0)
        torch.rand(1)
    assert torch.equal(view.pace.new, whole)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    other = Generation(tiny, TEXTS[1], seed=8, **options)
    other.generate()
    assert not torch.equal(other.pace.new, whole)
    view.close()
    other.close()


def test_colors_notes_and_the_closer_look_are_of_the_tables(view):
    view.generate()
    table = view.tables.decisions.query("row == 0 and layer == 3")
    view.layer = 3
    classes = list(view.tokens.cells)
    known = dict(zip(table["position"], table["expert"], strict=True))
    for place, position in enumerate(view.tokens.positions):
        assert classes[place] == known.get(position, 255)
    assert classes[-1] == 255  # the newest token was not read
    line = view.tables.tokens.query("row == 0").iloc[0]
    assert f"probability {line['prob']:.3g}" in view.tokens.notes[view.tokens.positions.index(line["position"])]
    view.tokens.selected = view.tokens.positions.index(15)
    assert view.selection == {"row": 0, "position": 15}
    assert view._below.value.count("<tr>") == 1 + 8
    assert "NoPE" in view._below.value
    view.selection = {"row": 0, "position": 19}
    assert "has not been read" in view._below.value


@pytest.mark.parametrize("show", SHOWS)
def test_every_color_can_be_shown_before_and_after(show, view):
    view.show = show
    assert view.draw() is not None
    view.generate()
    view.row = 1
    assert len(view.tokens.tokens) == 15 + 5
    bundle = view._repr_mimebundle_()[0]
    assert {"text/html", "image/png"} <= bundle.keys()


def test_shares_are_means_over_heads(view):
    view.generate()
    view.show, view.layer = "first_token", 7
    table = view.tables.attention.query("row == 0 and layer == 7")
    shown = torch.frombuffer(bytearray(view.tokens.numbers), dtype=torch.float32)
    for position, values in table.groupby("position"):
        own = shown[view.tokens.positions.index(position)].item()
        assert own == pytest.approx(values["first_token"].mean(), abs=1e-5)


def test_an_intervention_acts_on_a_text_that_is_waited_for_and_is_refused_live(view, tiny):
    with lab.patched(tiny, {"layers.3.feed_forward.router.indices": 1}):
        view.generate()
        with pytest.raises(ValueError, match=r"view\.generate"):
            view.step()
    assert (view.tables.decisions.query("layer == 3")["expert"] == 1).all()
    assert (view.tables.decisions.query("layer == 5")["expert"] != 1).any()


def test_an_error_is_shown_where_a_button_was_pressed(tiny):
    view = Generation(tiny, TEXTS[0], max_new_tokens=3, num_beams=2)
    view._buttons["step"].click()
    assert "Beams" in view._said.value
    with pytest.raises(ValueError, match="Beams"):
        view.generate()


def test_choices_that_are_not_there_are_refused(view):
    for name, value in (("layer", 8), ("row", 2), ("slot", 1), ("selection", {"row": 0, "position": 99})):
        with pytest.raises(TraitError, match=r"there is|no token"):
            setattr(view, name, value)


def test_a_model_without_a_tokenizer_with_two_experts_a_token_and_padding(new_text_model):
    model = new_text_model(num_experts_per_tok=2)
    view = Generation(model, [[5, 6, 7, 8], [5, 6]], max_new_tokens=4)
    view.generate()
    view.slot = 1
    assert set(view.tables.decisions["slot"]) == {0, 1}
    assert len(view.tokens.tokens) == 8


def test_turns_end_with_their_work_and_give_its_errors():
    def work(rest) -> None:
        rest()
        raise KeyError("gone")

    turns = Turns(work)
    assert turns.turn()
    with pytest.raises(KeyError, match="gone"):
        turns.turn()
    assert turns.ended
    assert not turns.turn()
