import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import verification


def found(*errors: float) -> pd.DataFrame:
    table = pd.DataFrame({"layer": [*range(len(errors)), None], "relative_error": [*errors, 0.5]})
    return table.astype({"layer": "Int64"})


def test_each_model_is_a_line_over_layers_without_the_logits():
    ax = verification.parity({"int8": found(0.01, 0.02), "int4": found(0.1, 0.2)})
    assert [line.get_label() for line in ax.lines] == ["int8", "int4"]
    assert np.array(ax.lines[1].get_xydata()).tolist() == [[0, 0.1], [1, 0.2]]
    assert (ax.get_yscale(), ax.get_xlabel()) == ("log", "layer")


def test_a_layer_without_any_difference_is_left_out():
    ax = verification.parity({"same": found(0.0, 0.02)})
    assert np.isnan(np.array(ax.lines[0].get_ydata())).tolist() == [True, False]


def test_nothing_and_unknown_columns_are_refused():
    with pytest.raises(ValueError, match=r"lab.verify"):
        verification.parity({})
    with pytest.raises(ValueError, match="max_abs_difference"):
        verification.parity({"int8": found(0.1)}, value="max_abs_difference")
