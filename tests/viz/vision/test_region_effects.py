import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import vision

ROAD = ["vision_model.layers.0.resid_post", "image_features", "layers.0.resid_post", "layers.1.resid_post"]


@pytest.fixture
def effects() -> pd.DataFrame:
    lines = [
        {"region": region, "hook_point": name, "normalised": sign * place / 3}
        for region, sign in (("star", 1), ("rest", -1))
        for place, name in enumerate(ROAD)
    ]
    table = pd.DataFrame(lines)
    table.attrs = {"metric": "logit difference", "into": "corrupted"}
    return table


def test_each_region_is_a_line_along_the_road(effects):
    ax = vision.region_effects(effects)
    lines = {line.get_label(): line for line in ax.lines if np.size(line.get_xdata()) == len(ROAD)}
    assert list(lines) == ["star", "rest"]
    assert np.allclose(lines["rest"].get_ydata(), [0, -1 / 3, -2 / 3, -1])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["vision 0", "image_features", "layer 0", "layer 1"]
    assert (ax.get_xlabel(), "0: corrupted, 1: clean" in ax.get_ylabel()) == ("hook point (resid_post)", True)


def test_kinds_are_named_where_there_are_several(effects):
    table = effects.replace("layers.1.resid_post", "layers.1.self_attn.z")
    labels = [label.get_text() for label in vision.region_effects(table).get_xticklabels()]
    assert labels[-2:] == ["layer 0 resid_post", "layer 1 z"]


def test_a_column_that_is_missing_is_named(effects):
    with pytest.raises(ValueError, match="patched"):
        vision.region_effects(effects, value="patched")
