import matplotlib.image
import numpy as np
import pytest

from bundle.reports import draw_report
from bundle.reports.figure import strongest_finding
from tests.conftest import ellipsoid


@pytest.mark.parametrize("with_label", [True, False])
def test_report_is_drawn_where_the_finding_is(tmp_path, with_label):
    shape = (20, 24, 16)
    image = ellipsoid(shape, (8, 10, 6)) * 0.7
    heatmap = np.where(image > 0, 0.0, -5.0)
    lesion = ellipsoid(shape, (2, 2, 2), (6, 15, 8))
    heatmap[lesion > 0] = 4
    heatmap[6, 16, 8] = 9
    assert strongest_finding(heatmap, lesion, image > 0) == (6, 16, 8)
    heatmap[0, 0, 0] = 99  # never outside the brain
    assert strongest_finding(heatmap, lesion * 0, image > 0) == (6, 16, 8)
    draw_report(tmp_path / "r.png", "title", image, heatmap, lesion, lesion if with_label else None)
    picture = matplotlib.image.imread(tmp_path / "r.png")
    red = (picture[..., 0] > 0.8) & (picture[..., 1] < 0.4) & (picture[..., 2] < 0.4)
    green = (picture[..., 1] > 0.75) & (picture[..., 0] < 0.5) & (picture[..., 2] < 0.6)
    assert red.sum() > 20 and (green.sum() > 20) == with_label
