from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from bundle.errors import InputError
from bundle.scoring import POINTS, Calibration, FindLesionsd, operating_points
from bundle.scoring.operating import _TAILS, count_findings


def smooth_noise(seed):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(24, 24, 24)), 1.0)
    return (noise / noise.std()).astype(np.float32)


def test_small_regions_are_no_findings():
    marked = np.zeros((9, 9, 9), bool)
    marked[0, 0, :5] = True
    marked[4, 4, 4] = marked[5, 5, 5] = True  # touch at a corner
    marked[8, 8, 0] = True
    assert [count_findings(marked, n) for n in (1, 2, 3, 6)] == [3, 2, 1, 0]
    assert count_findings(np.zeros((3, 3, 3), bool), 1) == 0


def test_points_keep_to_their_rule_on_healthy_scans():
    scores = [smooth_noise(seed) for seed in range(5)]
    inside = [np.ones(s.shape, bool) for s in scores]
    voxel_mm3 = [8.0, 8.0, 8.0, 4.0, 10.0]
    points = operating_points(scores, inside, voxel_mm3)
    assert points["screening"] < points["specific"] < points["strict"]

    def mean(threshold):
        return np.mean([count_findings(s > threshold, 50 / v) for s, v in zip(scores, voxel_mm3)])

    for name, most in POINTS.items():
        higher = np.quantile(np.concatenate([s.ravel() for s in scores]), 1 - _TAILS)
        allowed = [t for t in higher if t >= points[name]]
        assert max(mean(t) for t in allowed) <= most
        below = higher[len(allowed)]
        assert mean(below) > most  # the lowest that keeps to it


def test_larger_people_have_fewer_findings_of_a_size():
    scores = [smooth_noise(seed) for seed in range(3)]
    inside = [np.ones(s.shape, bool) for s in scores]
    small, large = (operating_points(scores, inside, [v] * 3)["specific"] for v in (2.0, 20.0))
    assert small < large


def test_unknown_points_are_told():
    with pytest.raises(InputError, match="operating_point 'often' is unknown: use one of specific, screening"):
        FindLesionsd("heatmap", "location", None, operating_point="often")


def test_quantile_and_threshold_win_over_the_point():
    points = {"location": {"specific": 3.0, "screening": 1.0}}
    calibration = Calibration("t1", {}, {}, {"location": {"0.99": 2.0}}, {}, {}, points=points)
    file = SimpleNamespace(load=lambda *_: calibration)
    assert FindLesionsd("heatmap", "location", file).threshold() == 3.0
    assert FindLesionsd("heatmap", "location", file, operating_point="screening").threshold() == 1.0
    assert FindLesionsd("heatmap", "location", file, 0.99, operating_point="screening").threshold() == 2.0
    given = FindLesionsd("heatmap", "location", file, 0.99, 7.0)
    assert given.threshold() == 7.0 and given.threshold("location") == 2.0
    assert "2 findings above 50 mm3" in FindLesionsd("heatmap", "location", file).rule() and "0.99" in given.rule()
