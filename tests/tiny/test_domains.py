"""Documents of every domain: seeded, split, with answers that are right by construction."""

import random

import numpy as np
import pytest

from llama4lab.tiny.document import Document, answer, split_of
from llama4lab.tiny.domains import arithmetic, indirect_objects, induction, shapes
from llama4lab.tiny.domains.catalogue import DRAWS, examples, sample
from llama4lab.tiny.drawing import COLOURS, draw_scene, picture


@pytest.mark.parametrize("domain", DRAWS)
def test_the_same_seed_gives_the_same_examples(domain):
    first, again = examples(domain, 3, seed=7), examples(domain, 3, seed=7)
    assert [(one.text, one.answer, one.question) for one in first] == [(o.text, o.answer, o.question) for o in again]
    assert first[0].text != examples(domain, 1, seed=8)[0].text


@pytest.mark.parametrize("domain", DRAWS)
def test_no_held_out_document_is_ever_drawn_for_training(domain):
    rng = random.Random(0)
    keys = {sample(domain, rng, "test").key for _ in range(10)}
    assert not keys & {sample(domain, rng, "train").key for _ in range(100)}


def test_a_tenth_of_the_keys_is_held_out():
    splits = [split_of(("a key", number)) for number in range(2000)]
    assert 0.08 < splits.count("test") / 2000 < 0.12
    assert 0.03 < splits.count("validation") / 2000 < 0.07
    assert split_of(()) == "train"


def test_segments_tell_answers_from_template():
    document = Document("facts", f"a{answer(' b')}.", ())
    assert document.segments == [("a", False), (" b", True), (".", False)]
    assert document.plain == "a b."


def test_an_unknown_domain_is_an_error_that_lists_the_domains():
    with pytest.raises(ValueError, match="domain 'poems' does not exist\nthere are: induction"):
        sample("poems", random.Random(0))
    with pytest.raises(ValueError, match="split 'dev' does not exist"):
        sample("facts", random.Random(0), "dev")


def test_the_receiver_is_the_one_who_does_not_give():
    for giver, receiver in (("Mary", "John"), ("John", "Mary")):
        text = indirect_objects.sentence(indirect_objects.TEMPLATES[0], "Mary", "John", giver, "store", "drink").text
        assert text == f"When Mary and John went to the store, {giver} gave a drink to{answer(f' {receiver}')}."


def test_sums_and_differences_are_right():
    assert arithmetic.calculation("+", 7, 12).plain == "7 + 12 = 19"
    assert arithmetic.calculation("-", 7, 12, words=True).plain == "12 minus 7 is 5."


def test_a_repeated_sequence_asks_for_all_but_the_first_word_of_a_round():
    document = induction.repeated(["cat", "dog", "sun"], 3)
    assert document.plain == " cat dog sun" * 3
    assert [text for text, marked in document.segments if marked] == [" dog", " sun"] * 2


def test_questions_about_a_scene_are_answered_by_the_scene():
    rng = random.Random(3)
    for _ in range(40):
        scene = draw_scene(rng, rng.randint(1, 4))
        for kind in shapes.KINDS:
            turn = shapes.question(scene, kind, rng)
            if turn is None or kind == "place":
                continue
            text, value = turn[0].rstrip("?"), turn[1].strip("⟦⟧")
            if kind == "count":
                assert value == shapes.COUNTS[len(scene.things)]
            elif kind.endswith("_at"):
                thing = scene.at(text.partition("at the ")[2])
                assert thing is not None
                assert value in (thing.shape, thing.colour)
            else:
                word = text.split()[-1]
                fitting = [thing for thing in scene.things if word in (thing.shape, thing.colour)]
                assert len(fitting) == 1
                assert value in (fitting[0].shape, fitting[0].colour)


def test_a_picture_shows_every_thing_in_its_colour():
    rng = random.Random(5)
    for _ in range(10):
        scene = draw_scene(rng, rng.randint(1, 4))
        image = picture(scene)
        assert image.size == (48, 48)
        for thing in scene.things:
            seen = np.asarray(image)[round(thing.y), round(thing.x)].astype(int)
            assert np.abs(seen - COLOURS[thing.colour]).max() < 40
