# matplotlib declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import vision


def test_image_and_text_have_a_map_each_on_one_scale(panels):
    lines = [
        (layer, kind, expert, layer, share)
        for layer in (1, 3)
        for kind, shares in (("image", (0.9, 0.1)), ("text", (0.0, 1.0)))
        for expert, share in enumerate(shares)
    ]
    table = pd.DataFrame(lines, columns=["layer", "modality", "expert", "tokens", "share"])
    image, text = panels(vision.modality_shares(table))
    assert [image.get_title(), text.get_title()] == ["image", "text"]
    assert image.images[0].get_array().tolist() == [[0.9, 0.1]] * 2
    assert image.images[0].norm.vmax == text.images[0].norm.vmax == 1.0


@pytest.mark.parametrize("value", ["information", "share_of_entropy"])
def test_information_is_drawn_between_chance_and_all_there_is(value):
    table = pd.DataFrame({"layer": [3, 1], "information": [0.3, 0.1], "entropy": 0.5, "chance": 0.05})
    table["share_of_entropy"] = table["information"] / table["entropy"]
    ax = vision.modality_information(table, value=value)
    scale = 1 if value == "information" else 0.5
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx(np.array([0.1, 0.3]) / scale)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "3"]
    assert ax.lines[0].get_ydata() == pytest.approx(np.array([0.5, 0.5]) / scale)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["all there is", "by chance", "of the expert"]
