import math

import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from bundle.metrics import measure_case
from tests.conftest import ellipsoid

SHAPE = (14, 16, 12)
BRAIN = ellipsoid(SHAPE, (6, 7, 5)) > 0
SPACING = (2.0, 2.0, 3.0)


def scan(lesions=3, seed=0):
    rng = np.random.RandomState(seed)
    label = np.zeros(SHAPE)
    for _ in range(lesions):
        i, j, k = (rng.randint(4, n - 5) for n in SHAPE)
        label[i : i + 2, j : j + 3, k : k + 2] = 1
    heatmap = (rng.randn(*SHAPE) + 2 * label).astype(np.float32)
    return heatmap, label


def surface(mask):
    inner = np.zeros(mask.shape, bool)
    inner[1:-1, 1:-1, 1:-1] = mask[1:-1, 1:-1, 1:-1]
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    return np.argwhere(mask & ~inner) * SPACING


def test_figures_equal_independent_ones():
    heatmap, label = scan()
    found = BRAIN & (heatmap > 1.5)
    measures = measure_case(heatmap, found, label, BRAIN, SPACING)
    y, marked, scores = label[BRAIN] > 0, found[BRAIN], heatmap[BRAIN]
    assert not (label[~BRAIN] > 0).any()
    expected = {
        "auprc": average_precision_score(y, scores),
        "auroc": roc_auc_score(y, scores),
        "dice": f1_score(y, marked),
        "sensitivity": recall_score(y, marked),
        "precision": precision_score(y, marked),
        "volumetric_similarity": 1 - abs(marked.sum() - y.sum()) / (marked.sum() + y.sum()),
    }
    for name, value in expected.items():
        assert measures.values[name] == pytest.approx(value, abs=1e-3), name
    a, b = surface(found), surface(label > 0)
    directed = [cKDTree(q).query(p)[0] for p, q in ((a, b), (b, a))]
    hausdorff = max(np.percentile(d, 95) for d in directed)
    assert measures.values["hausdorff95_mm"] == pytest.approx(hausdorff, abs=0.5)
    assert measures.values["dice_best"] >= measures.values["dice"]
    assert measures.lesion_ml.sum() == pytest.approx(label.sum() * np.prod(SPACING) / 1000)
    assert measures.marked_share == pytest.approx(marked.mean())


def test_lesions_outside_the_brain_are_missed_and_ignored_labels_are_not_there():
    heatmap, label = scan()
    heatmap[~BRAIN] = 100.0  # whatever stands there
    outside = label.copy()
    outside[0, 0, :5] = 1
    found = BRAIN & (heatmap > 1)
    usual, missed = (measure_case(heatmap, found, truth, BRAIN, SPACING) for truth in (label, outside))
    n = label.sum()
    assert missed.values["sensitivity"] == pytest.approx(usual.values["sensitivity"] * n / (n + 5))
    scores = np.r_[heatmap[BRAIN], np.full(5, heatmap[BRAIN].min())]
    expected = average_precision_score(np.r_[label[BRAIN] > 0, np.ones(5)], scores)
    assert missed.values["auprc"] == pytest.approx(expected, abs=1e-6)
    assert len(missed.lesion_ml) == len(usual.lesion_ml) + 1
    ignored = label.copy()
    ignored[found & (label == 0)] = -1  # all false findings
    assert measure_case(heatmap, found, ignored, BRAIN, SPACING).values["precision"] == 1


def test_what_is_not_defined_is_nan_and_never_perfect():
    heatmap, label = scan()
    nothing = np.zeros(SHAPE, bool)
    healthy = measure_case(heatmap, BRAIN & (heatmap > 2), 0 * label, BRAIN, SPACING)
    for name, value in healthy.values.items():
        assert math.isnan(value) == (name != "false_findings"), name
    assert healthy.false_findings > 0 and healthy.marked_share > 0
    clean = measure_case(heatmap, nothing, 0 * label, BRAIN, SPACING)
    assert clean.false_findings == 0 and math.isnan(clean.values["dice"])
    blind = measure_case(heatmap, nothing, label, BRAIN, SPACING)
    assert blind.values["dice"] == blind.values["sensitivity"] == blind.values["lesion_recall"] == 0
    assert math.isnan(blind.values["precision"]) and math.isnan(blind.values["hausdorff95_mm"])
    full = measure_case(heatmap, BRAIN, BRAIN.astype(float), BRAIN, SPACING)
    assert full.values["dice"] == full.values["auprc"] == full.values["precision"] == 1
    assert full.values["hausdorff95_mm"] == 0 and math.isnan(full.values["auroc"])
    one = np.zeros(SHAPE)
    one[7, 8, 6] = 1
    single = measure_case(heatmap, one > 0, one, BRAIN, SPACING)
    assert single.values["dice"] == 1 and single.values["hausdorff95_mm"] == 0
