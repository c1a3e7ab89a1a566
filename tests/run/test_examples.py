import pytest
import torch

import llama4lab as lab
from llama4lab.run.examples import ROWS, row_means, runs_over, token_mask, token_values

AT = "layers.2.resid_post"
TEXTS = ["one two three", "four", "five six"]


def test_many_rows_are_run_a_few_at_a_time_in_their_order(tiny):
    many = TEXTS * 7
    runs = list(runs_over(tiny, many, [AT]))
    assert [len(run.prompt) for run in runs] == [ROWS, 21 - ROWS]
    together = lab.record(tiny, many, at=AT)
    joined = torch.cat([run[AT] for run in runs])
    mask = together.prompt.attention_mask.bool()
    torch.testing.assert_close(joined[mask], together[AT][mask], atol=1e-4, rtol=1e-4)


def test_images_of_many_rows_stay_with_their_rows(tiny, picture):
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    prompt = tiny.prompt([chat if i % 5 == 0 else [{"role": "user", "content": "Hello!"}] for i in range(20)])
    runs = list(runs_over(tiny, prompt, [AT]))
    whole = lab.record(tiny, prompt, at=AT)
    mask = prompt.attention_mask.bool()
    torch.testing.assert_close(torch.cat([r[AT] for r in runs])[mask], whole[AT][mask], atol=1e-4, rtol=1e-4)


def test_runs_are_not_run_again(tiny):
    run = lab.record(tiny, TEXTS, at=AT)
    for given, count in ((run, 1), ([run, run], 2)):
        found = list(runs_over(tiny, given, [AT]))
        assert len(found) == count
        assert all(one is run for one in found)


def test_values_and_means_leave_padding_out_also_of_cut_runs(tiny):
    run = lab.record(tiny, TEXTS, at=AT)
    for part in (run, run.cut(rows=[2, 0]), run.cut(positions=[1, 2, 3])):
        mask = token_mask(part)
        values = torch.cat([part[AT][row][mask[row]] for row in range(len(mask))])
        assert torch.equal(token_values(part, AT), values)
        assert len(values) == mask.sum()
    means = row_means(run, AT)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(means[row], lab.record(tiny, text, at=AT)[AT][0].mean(0), atol=1e-4, rtol=1e-4)


def test_the_places_of_tiles_are_values_and_those_of_patterns_are_not(tiny, asked):
    names = ["vision_model.layers.1.self_attn.z", "vision_model.layers.1.self_attn.pattern", "image_features"]
    run = lab.record(tiny, asked, at=names)
    assert token_values(run, names[0]).shape == (run[names[0]].shape[0] * 65, *run[names[0]].shape[2:])
    assert torch.equal(token_values(run, names[2]), run[names[2]].flatten(0, 1))
    with pytest.raises(ValueError, match="no value for each token"):
        token_values(run, names[1])
