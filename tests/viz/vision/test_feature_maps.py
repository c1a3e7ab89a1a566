# matplotlib declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import vision
from llama4lab.viz.expert_colors import expert_color

RED = {"red": 1.0, "green": 0.5, "blue": np.linspace(0, 1, 12)}


def test_components_are_the_colours_of_cells(image_tokens, picture):
    table = image_tokens(**RED)
    table.attrs["explained"] = [0.5, 0.3, 0.1]
    ax = vision.pca(table, picture)
    assert ax.collections[0].get_facecolors()[:, :3] == pytest.approx(table[["red", "green", "blue"]].to_numpy()[:8])
    assert ax.get_legend().get_texts()[0].get_text() == "component 1: 50%"


def test_several_images_have_a_panel_each(image_tokens, picture, panels):
    table = pd.concat([image_tokens(**RED), image_tokens(**RED).assign(image=1, red=0.0)])
    first, second = panels(vision.pca(table, [picture, picture]))
    assert first.get_title() == "image 0"
    assert second.collections[0].get_facecolors()[0, 0] == 0
    with pytest.raises(ValueError, match="2 images"):
        vision.pca(table, picture)


def test_the_same_image_of_several_runs_has_a_panel_each(image_tokens, picture, panels):
    table = pd.concat([image_tokens(**RED, source=0), image_tokens(**RED, source=1)])
    assert [panel.get_title() for panel in panels(vision.pca(table, [picture] * 2))] == [
        "source 0, image 0",
        "source 1, image 0",
    ]


def test_a_segment_has_its_colour_in_all_pictures(image_tokens, picture):
    ax = vision.segments(image_tokens(segment=np.arange(12) % 3), picture, alpha=1)
    assert ax.collections[0].get_facecolors()[2, :3] == pytest.approx(expert_color(2))


def test_the_chosen_place_has_a_frame_even_if_it_is_in_the_other_kind_of_tile(image_tokens, picture):
    table = image_tokens(cosine=np.linspace(-1, 1, 12), chosen=np.arange(12) == 9)
    ax = vision.similarity(table, picture)
    mark = ax.patches[-1]
    assert (*mark.get_xy(), mark.get_width(), mark.get_height()) == (10, 0, 10, 5)


def test_long_vectors_have_a_cross_in_the_middle_of_their_cell(image_tokens, picture):
    table = image_tokens(norm=np.arange(12.0), score=0.0, outlier=np.isin(np.arange(12), [1, 6, 11]))
    ax = vision.norms(table, picture)
    assert ax.lines[-1].get_xydata().tolist() == [[7.5, 2.5], [12.5, 7.5]]
    assert ax.get_title() == "2 unlike the others"
    assert ax.get_xlim() == (0, 20)
    with pytest.raises(ValueError, match="outlier"):
        vision.norms(image_tokens(norm=1.0), picture)


def test_hook_points_keep_their_order_and_get_short_names():
    names = ["vision_model.layers.0.resid_post", "vision_model.adapter", "layers.10.resid_post", "layers.9.resid_post"]
    lines = [(first, second, float(first == second)) for first in names for second in names]
    ax = vision.cka(pd.DataFrame(lines, columns=["first", "second", "cka"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["vision 0", "adapter", "layer 10", "layer 9"]
    assert ax.images[0].get_array().tolist() == np.eye(4).tolist()
