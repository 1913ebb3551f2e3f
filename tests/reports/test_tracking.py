"""Heatmaps of validation slices, as a tracked training shows them."""

from __future__ import annotations

import numpy as np
import torch

from bundle.reports import slice_heatmaps, slice_images


def test_heatmaps_are_the_papers_score_where_there_is_brain():
    pred, label = torch.rand(3, 4, 5, 6), torch.rand(3, 3, 5, 6)
    label[:, 2] = torch.rand(3, 5, 6) > 0.3
    label[2, 2] = 0
    shown = slice_heatmaps({"pred": pred, "label": label}).numpy()
    error = ((pred[:, :2] - label[:, :2]) ** 2).sum(1).numpy()
    expected = np.log(error) + np.log(np.exp(pred[:, 2:].numpy()).sum(1))
    inside = label[:, 2].numpy() > 0
    np.testing.assert_allclose(shown[:, 0][inside], expected[inside], rtol=1e-5, atol=1e-5)
    for k in range(2):
        assert (shown[k, 0][~inside[k]] == shown[k, 0][inside[k]].min()).all()
    assert (shown[2] == 0).all()


def test_images_leave_the_slice_position_out():
    image = torch.rand(3, 2, 5, 6)
    shown, labels = slice_images({"image": image})
    assert torch.equal(shown, image[:, :1]) and labels == [None] * 3
