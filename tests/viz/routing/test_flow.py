# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pytest
from matplotlib.patches import PathPatch, Rectangle

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.flow import REST, transitions
from llama4lab.viz.routing.flow_layout import OTHER, lay_out

TWO = {(1, 3): {(0, 2): 6, (0, 5): 2, (4, 5): 8}}


def ribbons(ax) -> list[PathPatch]:
    return [patch for patch in ax.patches if isinstance(patch, PathPatch)]


def bars(ax) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def test_bars_are_as_high_as_the_shares_of_the_tokens(flow_table, written):
    ax = transitions(flow_table(TWO))
    heights = np.array([bar.get_height() for bar in bars(ax)])
    assert heights / heights[:2].sum() == pytest.approx([0.5, 0.5, 6 / 16, 10 / 16])
    assert written(ax) == ["0", "4", "2", "5"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "3"]


def test_ribbons_have_the_colour_of_their_source_and_the_height_of_their_tokens(flow_table):
    ax = transitions(flow_table(TWO))
    found = {}
    for ribbon in ribbons(ax):
        corners = ribbon.get_path().vertices
        found.setdefault(tuple(ribbon.get_facecolor()[:3]), []).append(abs(corners[7, 1] - corners[0, 1]))
    whole = sum(map(sum, found.values()))
    assert sorted(np.array(found[tuple(expert_color(0))]) / whole) == pytest.approx([2 / 16, 6 / 16])
    assert np.array(found[tuple(expert_color(4))]) / whole == pytest.approx([0.5])


def test_ribbons_fill_the_bars_where_they_start_and_end(flow_table):
    rng = np.random.default_rng(0)
    flows = {(a, a + 1): {(e, f): int(rng.integers(1, 9)) for e in range(5) for f in range(5)} for a in range(3)}
    # What leaves an expert is what came: otherwise bars are as high as the larger of both.
    for step in (1, 2):
        for e in range(5):
            coming = sum(tokens for (_, f), tokens in flows[step - 1, step].items() if f == e)
            flows[step, step + 1] |= {(e, f): 0 for f in range(5)} | {(e, e): coming}
    flow = lay_out(flow_table(flows), 9, 0.0)
    for step, nodes in enumerate(flow.nodes):
        for node in nodes.itertuples():
            for side, at in (("from", step), ("to", step - 1)):
                own = flow.links[(flow.links["step"] == at) & (flow.links[f"{side}_expert"] == node.expert)]
                if len(own):
                    starts = own.sort_values(f"{side}_top")
                    assert starts[f"{side}_top"].iloc[0] == pytest.approx(node.top)
                    assert starts["height"].sum() == pytest.approx(node.height)
                    ends = (starts[f"{side}_top"] + starts["height"]).to_numpy()
                    assert ends[:-1] == pytest.approx(starts[f"{side}_top"].to_numpy()[1:])


def test_experts_are_ordered_so_that_plain_flows_do_not_cross(flow_table):
    flow = lay_out(flow_table({(0, 1): {(0, 7): 5, (1, 3): 5, (2, 5): 5}}), 9, 0.0)
    assert [list(nodes["expert"]) for nodes in flow.nodes] == [[0, 1, 2], [7, 3, 5]]


def test_small_experts_share_a_grey_bar_and_the_plot_says_so(flow_table, written):
    table = flow_table({(1, 3): {(0, 0): 50, (1, 1): 40, (2, 2): 6, (3, 3): 4}})
    ax = transitions(table, most=2)
    assert written(ax) == ["0", "1", "other"] * 2
    assert bars(ax)[2].get_facecolor()[:3] == pytest.approx((float(REST),) * 3)
    assert "up to 10% of a layer's tokens" in ax.get_xlabel()
    flow = lay_out(table, 2, 0.0)
    assert all(nodes["expert"].iloc[-1] == OTHER for nodes in flow.nodes)
    assert flow.links["tokens"].sum() == pytest.approx(1)


def test_weak_ribbons_are_left_out_and_the_plot_says_how_much(flow_table):
    ax = transitions(flow_table({(1, 3): {(0, 0): 90, (0, 1): 4, (1, 1): 6}}), least=0.05)
    assert len(ribbons(ax)) == 2
    assert "left out: ribbons below 5.0%, together 4% of the tokens" in ax.get_xlabel()


def test_layers_that_are_no_chain_are_refused(flow_table):
    with pytest.raises(ValueError, match=r"1 to 3, 1 to 5.*\n.*layers="):
        transitions(flow_table({(1, 3): {(0, 0): 1}, (1, 5): {(0, 0): 1}}))
    with pytest.raises(ValueError, match="no token"):
        transitions(flow_table({(1, 3): {(0, 0): 0}}))
    with pytest.raises(ValueError, match="most=0"):
        transitions(flow_table(TWO), most=0)
