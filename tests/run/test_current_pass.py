import torch

import llama4lab as lab
from llama4lab.run.current_pass import following

ROWS = [[5, 9, 17, 3, 8], [7, 2]]


def test_a_pass_over_a_prompt_begins_at_0_and_knows_its_padding(new_text_model):
    model = new_text_model()
    with following(model) as current:
        assert current.shape == (0, 0)
        run = lab.record(model, model.prompt(ROWS), at="embed_merged")
    assert (current.first, current.shape) == (0, (2, 5))
    assert current.input_ids is not None
    assert torch.equal(current.input_ids, run.prompt.input_ids)
    assert torch.equal(current.valid, run.prompt.attention_mask.bool())
    assert torch.equal(torch.as_tensor(current.embedded), run["embed_merged"])
    assert current.is_of(run["embed_merged"])


def test_the_steps_of_a_generation_follow_each_other(new_text_model):
    model = new_text_model()
    seen = {"embed": [], "layers.0.resid_pre": []}

    def noting(name: str):
        def note(x):
            seen[name].append((None if current.layout is None else current.first, current.shape))
            return x

        return note

    with following(model) as current, lab.patched(model, {name: noting(name) for name in seen}):
        lab.generate(model, model.prompt(ROWS), max_new_tokens=4)
    # An embedding is read before the layers are told where its tokens stand; nothing of the pass before is left.
    assert seen["embed"] == [(None, (0, 0))] * 4
    assert seen["layers.0.resid_pre"] == [(0, (2, 5)), (5, (2, 1)), (6, (2, 1)), (7, (2, 1))]
    assert bool(current.valid.all())


def test_what_goes_into_the_layers_has_the_images_in_it(tiny, asked):
    with following(tiny) as current:
        run = lab.record(tiny, asked, at="embed_merged")
    assert torch.equal(torch.as_tensor(current.embedded), run["embed_merged"])


def test_nothing_is_left_when_the_block_ends(tiny, no_hooks_left):
    with following(tiny):
        pass
