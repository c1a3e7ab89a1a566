"""Principal components against scikit-learn's, and the colours made of them."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from llama4lab.tables.vision import pca

COMPONENTS = ["pc_1", "pc_2", "pc_3"]
SHOWN = np.r_[0:8, 16:64]  # without the filling of the first picture


@pytest.mark.parametrize("width", [5, 200], ids=["fewer features than places", "more features than places"])
def test_components_are_those_of_scikit_learn_up_to_the_sign(make_features, width):
    values = torch.randn(64, width) * torch.linspace(3, 0.1, width) + 7
    table = pca(make_features(values))
    fitted = PCA(3, svd_solver="full").fit(values[SHOWN].double().numpy())
    expected = fitted.transform(values.double().numpy())
    found = table[COMPONENTS].to_numpy()
    signs = np.sign((found * expected).sum(0))
    assert found == pytest.approx(expected * signs, abs=1e-6)
    assert table.attrs["explained"] == pytest.approx(fitted.explained_variance_ratio_.tolist())


def test_the_sign_does_not_depend_on_that_of_the_solver(make_features):
    """Turned by a permutation of the features, the components stay what they are."""
    values = torch.randn(64, 6) * torch.linspace(3, 0.1, 6)
    table, turned = pca(make_features(values)), pca(make_features(values[:, torch.randperm(6)]))
    assert table[COMPONENTS].to_numpy() == pytest.approx(turned[COMPONENTS].to_numpy(), abs=1e-6)


def test_images_share_one_basis(make_features):
    values = torch.randn(64, 6)
    both = pca([make_features(values), make_features(values + 3)])
    assert both["source"].tolist() == [0] * 64 + [1] * 64
    moved = both[COMPONENTS].to_numpy()[64:] - both[COMPONENTS].to_numpy()[:64]
    assert moved == pytest.approx(np.broadcast_to(moved[0], moved.shape), abs=1e-6)
    assert abs(moved[0, 0]) == pytest.approx(3 * 6**0.5, rel=0.05), "the largest difference is the first component"


def test_colours_run_over_the_components(make_features):
    table = pca(make_features(torch.randn(64, 6)))
    for colour, component in zip(("red", "green", "blue"), COMPONENTS, strict=True):
        assert table[colour].between(0, 1).all()
        assert table[colour].min() == 0
        assert table[colour].max() == 1
        order = table.sort_values(component)[colour]
        assert order.is_monotonic_increasing


def test_a_component_that_there_is_not_is_grey(make_features):
    table = pca(make_features(torch.randn(64, 6)), n=1)
    assert "pc_2" not in table
    assert (table[["green", "blue"]] == 0.5).all().all()
    assert (pca(make_features(torch.ones(64, 6)))[["red", "green", "blue"]] == 0.5).all().all()


def test_what_has_no_components_is_refused(make_features):
    with pytest.raises(ValueError, match="n=7 components were asked for, of 56 places with 6"):
        pca(make_features(torch.randn(64, 6)), n=7)
    with pytest.raises(ValueError, match="one width"):
        pca([make_features(torch.randn(64, 6)), make_features(torch.randn(64, 7), at="image_features")])
    with pytest.raises(ValueError, match="not all finite"):
        pca(make_features(torch.full((64, 6), torch.nan)))
