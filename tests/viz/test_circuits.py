import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import PathPatch

from llama4lab.viz import circuits
from llama4lab.viz.circuit_layout import spots, ties

COLUMNS = ["sender_part", "sender_layer", "sender_index", "receiver_part", "receiver_layer", "receiver_index"]
EDGES = [
    ("embed", -1, 0, "v", 2, 1, "2, 3", 2.0),
    ("embed", -1, 0, "q", 2, 3, "3", -1.0),
    ("head", 2, 2, "router", 3, 0, "", 0.5),
    ("head", 2, 3, "expert", 3, 5, "", 0.4),
    ("expert", 3, 5, "logits", 8, 0, "", 4.0),
    ("expert", 3, 1, "logits", 8, 0, "", 0.1),
]


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(EDGES, columns=[*COLUMNS, "receiver_heads", "score"])


def test_every_edge_is_a_line_as_wide_as_its_score_is_large(table):
    ax = circuits.graph(table)
    lines = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
    assert len(lines) == len(table)
    widths = [line.get_linewidth() for line in lines]  # weakest first
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_signs_have_their_own_colours(table):
    ax = circuits.graph(table)
    colors = [patch.get_edgecolor() for patch in ax.patches if isinstance(patch, PathPatch)]
    blue = [rgb[2] > rgb[0] for rgb in map(to_rgb, colors)]
    assert blue == [score < 0 for score in sorted(table["score"], key=abs)]


def test_every_node_is_named_once(table, written):
    names = sorted(written(circuits.graph(table)))
    assert names == sorted(["embedding", "logits", "v1", "2.2", "2.3", "router", "5", "1"])


def test_a_shared_value_is_tied_to_all_its_heads_and_a_router_to_its_experts(table):
    placed = spots(table)
    tied = {((a.part, a.index), (b.part, b.index)) for a, b in ties(table, placed)}
    assert tied == {
        (("v", 1), ("head", 2)),
        (("v", 1), ("head", 3)),
        (("router", 0), ("expert", 5)),
        (("router", 0), ("expert", 1)),
    }


def test_later_nodes_stand_higher_and_none_on_another(table):
    placed = spots(table)
    for edge in EDGES:
        receiver = ("head" if edge[3] == "q" else edge[3], edge[4], edge[5])
        assert placed[edge[:3]].y < placed[receiver].y
    assert len({(spot.x, spot.y) for spot in placed.values()}) == len(placed)


def test_layers_without_nodes_are_left_out(table):
    ax = circuits.graph(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "3"]


def test_a_circuit_without_edges_is_refused(table):
    with pytest.raises(ValueError, match="no edge"):
        circuits.graph(table[:0])


def test_a_curve_has_its_points_and_says_where_it_is_faithful():
    curve = pd.DataFrame({"edges": [0, 10, 40, 100], "faithfulness": [0.0, 0.5, 0.85, 1.0]})
    _, ax = plt.subplots()
    assert circuits.faithfulness({"EAP": curve, "EAP-IG": curve.head(2)}, ax=ax) is ax
    lines = {line.get_label(): line for line in ax.lines if line.get_marker() == "o"}
    assert np.asarray(lines["EAP: 80% with 40 edges"].get_ydata()).tolist() == curve["faithfulness"].tolist()
    assert "EAP-IG" in lines
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("edges in the circuit", "faithfulness")
    with pytest.raises(ValueError, match="no curve"):
        circuits.faithfulness({})
