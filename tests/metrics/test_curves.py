import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from bundle.metrics import ScoreCurve, best_threshold


def draw(n, prevalence=0.1, scale=1.0, decimals=None):
    labels = np.random.rand(n) < prevalence
    labels[0], labels[-1] = True, False
    scores = ((np.random.randn(n) + labels) * scale).astype(np.float32)
    return (scores if decimals is None else np.round(scores, decimals)), labels


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("decimals", [None, 0])
def test_areas_equal_scikit_learn(scale, decimals):
    for n in (2, 50, 20000):
        scores, labels = draw(n, scale=scale, decimals=decimals)
        curve = ScoreCurve.of(scores, labels)
        assert curve.auprc() == pytest.approx(average_precision_score(labels, scores), abs=1e-3)
        assert curve.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)


def test_counts_add_up_over_scans_of_any_range():
    parts = [draw(3000, scale=scale) for scale in (1, 10, 0.1)]
    pooled = ScoreCurve.pooled([ScoreCurve.of(*p) for p in parts])
    scores, labels = (np.concatenate(v) for v in zip(*parts))
    everything = ScoreCurve.of(scores, labels)
    for field in ("lowest", "positive", "negative"):
        np.testing.assert_array_equal(getattr(pooled, field), getattr(everything, field))
    assert pooled.positive.sum() == labels.sum() and (np.diff(pooled.lowest) < 0).all()


def test_dice_is_that_of_the_cut():
    scores, labels = draw(5000, decimals=1)
    curve = ScoreCurve.of(scores, labels)
    for threshold in (-9, -0.55, 0.25, 1.05, 9):
        expected = f1_score(labels, scores > threshold)
        assert curve.dice(np.array([threshold]))[0] == pytest.approx(expected, abs=1e-3)
    every = [f1_score(labels, scores >= s) for s in np.unique(scores)]
    assert curve.best_dice() == pytest.approx(max(every), abs=1e-3)


def test_awkward_scans():
    empty, full = (ScoreCurve.of(np.arange(5.0), np.full(5, v)) for v in (False, True))
    assert np.isnan([empty.auprc(), empty.auroc(), empty.best_dice(), *empty.dice(np.zeros(1)), full.auroc()]).all()
    assert full.auprc() == full.best_dice() == 1
    one = ScoreCurve.of(np.array([3.0]), np.array([True]))
    assert one.auprc() == 1 and one.dice(np.array([2.9, 3.1])).tolist() == [1, 0]
    signed = ScoreCurve.of(np.array([0.0, -0.0, -1e-40, 2, -3]), np.array([1, 0, 0, 0, 0]) > 0)
    assert signed.auprc() == pytest.approx(1 / 3)  # behind the 2, and level with -0
    with pytest.raises(ValueError, match="NaN"):
        ScoreCurve.of(np.array([1.0, np.nan]), np.array([True, False]))


def test_threshold_is_the_best_of_all_scans_together():
    scans = [draw(400, scale=1 + i) for i in range(3)]
    curves = [ScoreCurve.of(*s) for s in scans]
    chosen = best_threshold([*curves, ScoreCurve.of(np.arange(5.0), np.zeros(5))], 10**6)
    reached = np.mean([f1_score(labels, scores > chosen) for scores, labels in scans])
    everywhere = [np.mean([f1_score(t, s > x) for s, t in scans]) for x in np.concatenate([s for s, _ in scans])]
    assert reached == pytest.approx(max(everywhere), abs=2e-3)
    with pytest.raises(ValueError, match="with lesions"):
        best_threshold([ScoreCurve.of(np.arange(5.0), np.zeros(5))])
