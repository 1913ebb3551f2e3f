import numpy as np
import pytest

from bundle.metrics import count_lesions, match_lesions, recall_at_false_positives


def volume(*boxes):
    mask = np.zeros((12, 12, 12))
    for value, (i, j, k) in boxes:
        mask[i, j, k] = value
    return mask


A, B, C = ((slice(n, n + 2),) * 3 for n in (1, 5, 9))


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        ([], [], (0, 0, 0)),
        ([A], [], (0, 0, 1)),
        ([], [A, B], (0, 2, 0)),
        ([A, C], [A, B], (1, 2, 1)),
        ([A, B, C], [A, B, C], (3, 3, 0)),
        ([(slice(0, 12),) * 3], [A, B], (1, 2, 0)),  # one finding over two lesions is one
        ([(slice(1, 2),) * 3, (2, 2, 2)], [A], (1, 1, 0)),
    ],
)
def test_counts(found, truth, expected):
    assert count_lesions(volume(*[(1, b) for b in found]), volume(*[(1, b) for b in truth])) == expected


def test_small_findings_count_neither_as_hit_nor_as_false():
    found = volume((1, A), (1, (5, 5, 5)), (1, (9, 9, 9)))
    assert count_lesions(found, volume((1, B), (1, A)), min_voxels=2) == (1, 2, 0)


def test_diagonal_voxels_are_one_lesion():
    assert count_lesions(np.eye(3)[..., None] * np.eye(3)[0], np.zeros((3, 3, 3)))[2] == 1


def test_recall_is_that_of_a_threshold_swept_by_hand():
    # lesions of height 5 and 2; false findings of 4 and 3: the first is allowed, the second not
    scores = [volume((5, A), (4, C)) + 1, volume((2, A), (3, C)) + 1]
    truths = [volume((1, A)), volume((1, A))]
    for score in scores:
        score[0] = 0.5
    assert recall_at_false_positives(scores, truths, 0.5, thresholds=500) == 0.5
    assert recall_at_false_positives(scores, truths, 1.0, thresholds=500) == 1.0
    assert recall_at_false_positives(scores, truths, 0.0, thresholds=500) == 0.5
    assert recall_at_false_positives([-s for s in scores], truths, 0.0) == 0.0


def test_a_finding_goes_to_the_lesion_that_it_fits_best():
    small, large = (slice(1, 2), slice(1, 3), slice(1, 3)), (slice(3, 8), slice(1, 6), slice(1, 6))
    sizes, hit, false = match_lesions(
        volume((1, (slice(1, 7), slice(1, 6), slice(1, 6)))), volume((1, small), (1, large))
    )
    assert sizes.tolist() == [4, 125] and hit.tolist() == [False, True] and false == 0


def test_matching_equals_panoptica():
    """An independent judge, where it is installed (it needs an older NumPy; see docs/evaluation.md)."""
    panoptica = pytest.importorskip("panoptica")
    judge = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.NaiveThresholdMatching(
            matching_threshold=0.0, allow_many_to_one=True, strict_threshold=True
        ),
    )
    rng = np.random.RandomState(0)
    for _ in range(30):
        found, truth = ((rng.rand(14, 14, 14) < rng.uniform(0.005, 0.06)).astype(np.uint8) for _ in range(2))
        found[3:5, 3:5], truth[4:6, 3:5] = 1, 1
        result = judge.evaluate(found, truth, verbose=False)
        result = next(iter(result.values())) if isinstance(result, dict) else result
        hit, total, false = count_lesions(found, truth)
        assert (result.tp, result.n_ref_instances, result.fp) == (hit, total, false)
