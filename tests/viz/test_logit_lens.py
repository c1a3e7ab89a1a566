# matplotlib and pandas declare what they give as wide unions.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import style
from llama4lab.viz.logit_lens import (
    divergence,
    hook_points,
    place_labels,
    places_label,
    scale,
    top_tokens,
    trajectories,
)

POSTS = [f"layers.{layer}.resid_post" for layer in range(4)]
MIXED = ["embed_merged", "layers.0.resid_mid", "layers.0.resid_post", "layers.10.resid_mid", "final_norm"]


def lines(names: list[str], positions: int, lens: str = "logit") -> pd.DataFrame:
    """One line for each place and position, as `tables.logit_lens` gives them."""
    depth, position = (axis.ravel() for axis in np.indices((len(names), positions)))
    name = [names[each] for each in depth]
    table = pd.DataFrame({"lens": lens, "row": 0, "hook_point": name, "depth": depth, "position": position + 2})
    table["kind"] = [each.rsplit(".", 1)[-1] for each in name]
    layers = [int(each.split(".")[1]) if each.startswith("layers.") else None for each in name]
    table["layer"] = pd.array(layers, dtype="Int64")
    table["input"] = [f" in{each}" for each in position]
    return table


def best(names=POSTS, positions: int = 3, lens: str = "logit") -> pd.DataFrame:
    table = lines(names, positions, lens)
    prob = np.linspace(0.1, 0.9, len(table))
    table = table.assign(rank=0, token=[f" t{each}" for each in range(len(table))], prob=prob, log_prob=np.log(prob))
    return table.assign(entropy=4 - 4 * prob, kl=3 - 3 * prob)


def chosen(tokens=(" Paris", "\n"), names=POSTS, lens: str = "logit") -> pd.DataFrame:
    one = lines(names, 1, lens)
    parts = [one.assign(token=token, rank=[900, 30, 2, 0][: len(one)] * 1) for token in tokens]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(prob=np.linspace(0, 1, len(table)), log_prob=-1.0, logit=2.0)


def test_cells_have_their_best_token_and_the_colour_of_its_probability(written):
    ax = top_tokens(best())
    picture = ax.images[0]
    assert np.allclose(np.asarray(picture.get_array()), np.linspace(0.1, 0.9, 12).reshape(4, 3))
    assert picture.get_clim() == (0, 1)
    assert written(ax) == [f"·t{each}" for each in range(12)]
    assert [tuple(text.get_position()) for text in ax.texts[:4]] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert not ax.yaxis_inverted()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "2", "3"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["·in0", "·in1", "·in2"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("token", "layer (resid_post)", "logit lens")
    assert picture.colorbar.ax.get_ylabel() == "probability\nof the best token"


@pytest.mark.parametrize("column", ["log_prob", "entropy", "kl"])
def test_other_measures_can_colour_the_cells(column):
    picture = top_tokens(best(), column=column).images[0]
    assert np.allclose(np.asarray(picture.get_array()).ravel(), best()[column])
    low, high = picture.get_clim()
    assert (high if column == "log_prob" else low) == 0


def test_the_scale_has_two_ends_whatever_the_numbers():
    for values in ([0.0, 0.0], [np.nan, np.nan]):
        norm = scale(best().head(2).assign(kl=values), "kl")
        assert norm.vmin is not None
        assert norm.vmax is not None
        assert norm.vmin < norm.vmax


def test_lower_ranks_are_not_drawn(written):
    both = pd.concat([best(), best().assign(rank=1, token="no")])
    assert written(top_tokens(both)) == written(top_tokens(best()))


def test_places_of_several_kinds_are_named_by_both():
    shuffled = best(MIXED).sample(frac=1, random_state=0)
    assert hook_points(shuffled) == MIXED
    ax = top_tokens(shuffled)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["embed", "0 mid", "0 post", "10 mid", "norm"]
    assert ax.get_ylabel() == "place in the residual stream"
    assert place_labels(["embed_merged", *POSTS[:1]]) == ["embed", "0"]
    assert places_label(POSTS) == "layer (resid_post)"


def test_tokens_without_room_are_not_written(written):
    ax = plt.subplots(figsize=(4, 3))[1]
    assert written(top_tokens(best(positions=60), ax=ax)) == []
    long = best().assign(token=" internationalisation")
    assert {text[-1] for text in written(top_tokens(long))} == {"…"}


def test_what_a_map_cannot_show_is_refused():
    with pytest.raises(ValueError, match="column='probability' was to be drawn; the table has prob, log_prob"):
        top_tokens(best(), column="probability")
    with pytest.raises(ValueError, match="row=3"):
        top_tokens(best(), row=3)
    with pytest.raises(ValueError, match=r"One lens .* logit, tuned"):
        top_tokens(pd.concat([best(), best(lens="tuned")]))


def test_each_chosen_token_has_a_line_with_the_best_rank_on_top():
    ax = trajectories(chosen())
    assert [list(line.get_ydata()) for line in ax.lines] == [[900, 30, 2, 0]] * 2
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 900))[1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["·Paris", "↵"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "10", "100"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer (resid_post)", "rank")


def test_a_token_that_is_always_the_best_can_be_drawn():
    ax = trajectories(chosen().assign(rank=0))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]


def test_probabilities_of_two_lenses_are_drawn_together():
    ax = trajectories(pd.concat([chosen(), chosen(lens="tuned")]), column="prob")
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
    assert ax.lines[0].get_color() == ax.lines[1].get_color() != ax.lines[2].get_color()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["·Paris", "↵", "logit lens", "tuned lens"]
    assert ax.get_ylabel() == "probability"


def test_places_that_one_lens_does_not_have_leave_a_gap():
    ax = trajectories(pd.concat([chosen([" Paris"]), chosen([" Paris"], POSTS[2:], "tuned")]), column="prob")
    assert np.isnan(ax.lines[1].get_ydata()).tolist() == [True, True, False, False]


def test_lines_of_one_position_are_drawn_at_a_time():
    with pytest.raises(ValueError, match="One position can be drawn at a time; the table has 2, 3"):
        trajectories(pd.concat([chosen(), chosen().assign(position=3)]))
    with pytest.raises(ValueError, match="column='kl'"):
        trajectories(chosen(), column="kl")


def test_the_distance_from_the_model_is_a_mean_with_its_middle_half():
    table = best(positions=5)
    ax = divergence(pd.concat([table, table.assign(lens="tuned", kl=table["kl"] / 2)]))
    mean = np.asarray(table.groupby("hook_point")["kl"].mean())
    assert np.allclose([line.get_ydata() for line in ax.lines], [mean, mean / 2])
    band = np.asarray(ax.collections[0].get_paths()[0].vertices)[:, 1]
    quartiles = table.groupby("hook_point")["kl"].quantile([0.25, 0.75]).to_numpy()
    assert set(np.round(quartiles, 9)) <= set(np.round(band, 9))
    assert [line.get_color() for line in ax.lines] == [style.BLUE, style.ORANGE]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["logit lens", "tuned lens"]
    assert divergence(table).get_legend() is None
    assert divergence(table, column="entropy").get_ylabel() == "entropy (nats)"


def test_a_table_without_divergences_is_refused():
    with pytest.raises(ValueError, match="the run has no logits"):
        divergence(best().assign(kl=np.nan))
