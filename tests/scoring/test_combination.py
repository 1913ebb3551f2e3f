import itertools

import numpy as np
import pytest
from scipy import ndimage

from bundle.scoring import combine_contrasts, excess_ml, leading_contrast, sees

SHAPE = (5, 6, 4)


def scores(rng, contrasts):
    """Random scores whose findings are regions above 1, and random masks of what was looked at."""
    score = {c: 2.2 * ndimage.gaussian_filter(rng.normal(size=SHAPE), 0.8) for c in contrasts}
    return score, {c: s > 1 for c, s in score.items()}, {c: rng.random(SHAPE) < 0.8 for c in contrasts}


def brute_force(score, found, examined, leading, order):
    """The rule voxel by voxel; regions grow from neighbour to neighbour."""
    combined, mask, seen = score[leading].copy(), found[leading].copy(), score[leading].copy()
    for voxel in np.ndindex(SHAPE):
        looked = [c for c in order if examined[c][voxel]]
        agreement = sum(min(max(score[c][voxel], 0), 1) for c in looked) / len(looked) if looked else 0
        if score[leading][voxel] > 0:
            combined[voxel] *= 1 + agreement / 4
    for contrast in order:
        left = {tuple(map(int, voxel)) for voxel in np.argwhere(found[contrast])}
        while left:
            region, new = set(), {min(left)}
            while new:
                region |= new
                near = {tuple(np.add(v, step)) for v in new for step in itertools.product((-1, 0, 1), repeat=3)}
                new = (near & left) - region
            left -= region
            values = [max(seen[v], 0) for v in region]
            if not (any(mask[v] for v in region) and sum(values) / len(values) >= 0.5):
                for v in region:
                    mask[v] = True
                    combined[v] = max(combined[v], 0.8 * max(score[contrast][v], 1))
                    seen[v] = max(seen[v], score[contrast][v], 1)
    return combined, mask


@pytest.mark.parametrize(("leading", "order"), [("flair", ("t2", "t1")), ("t1", ("flair", "t2")), ("t2", ("flair",))])
def test_the_rule_is_that_of_a_loop_over_voxels_and_regions(leading, order):
    rng = np.random.default_rng(len(order))
    for _ in range(20):
        parts = scores(rng, (leading, *order))
        before = {c: s.copy() for c, s in parts[0].items()}
        combined, mask = combine_contrasts(*parts, leading)
        expected = brute_force(*parts, leading, order)
        np.testing.assert_allclose(combined, expected[0])
        np.testing.assert_array_equal(mask, expected[1])
        assert all((parts[0][c] == before[c]).all() for c in before)


def head(**lesions):
    """Three contrasts that see nothing but ``lesions``: (contrast, slice) -> score."""
    score = {c: np.zeros((8, 8, 8)) for c in ("t1", "t2", "flair")}
    for name, (place, value) in lesions.items():
        score[name.partition("_")[0]][place] = value
    return score, {c: s > 1 for c, s in score.items()}, {c: np.ones((8, 8, 8), bool) for c in score}


def test_what_one_contrast_shows_is_never_lost_and_what_all_show_counts_more():
    alone, shared = np.s_[:2, :2, :2], np.s_[5:, 5:, 5:]
    for only in ("t1", "t2", "flair"):
        lesions = {f"{c}_shared": (shared, 1.3) for c in ("t1", "t2", "flair")}
        for leading in ("t1", "t2", "flair"):
            combined, mask = combine_contrasts(*head(**lesions, **{f"{only}_alone": (alone, 1.3)}), leading)
            assert mask.sum() == 8 + 27 and mask[alone].all() and mask[shared].all()
            assert combined[shared].min() == pytest.approx(1.3 * 1.25)
            assert combined[alone].min() == pytest.approx(1.3 if only == leading else 1.3 * 0.8)
            assert not combined[~mask].any()


def test_the_leading_contrast_draws_the_outline():
    wide, narrow = np.s_[1:6, 1:6, 1:6], np.s_[2:5, 2:5, 2:5]
    score, _, examined = head(flair_low=(wide, 0.7), flair_high=(narrow, 2.0), t2_all=(wide, 1.2))
    _, mask = combine_contrasts(score, {c: s > 1 for c, s in score.items()}, examined, "flair")
    assert mask[narrow].all() and mask.sum() == 27
    score["flair"][wide] = 0.1  # it sees a spot, and nothing around it: another lesion, not a wider outline
    score["flair"][3, 3, 3] = 2.0
    _, mask = combine_contrasts(score, {c: s > 1 for c, s in score.items()}, examined, "flair")
    assert mask[wide].all()


def test_who_leads():
    nothing, sure = dict.fromkeys(("t1", "t2", "flair"), 0.0), dict.fromkeys(("t1", "t2", "flair"), False)
    assert leading_contrast(nothing, sure) == "flair"
    assert leading_contrast({"t1": 0.2, "t2": 0.1}, sure) == "t1"
    assert leading_contrast({"t1": 9.0, "flair": 0.0}, {"t1": True, "flair": False}) == "flair"
    assert leading_contrast(nothing, dict.fromkeys(sure, True)) == "flair"
    score = np.array([0.0, 1.5, 3.0, 0.9, 5.0])
    assert excess_ml(score, np.array([0, 1, 1, 1, 0], bool), 0.008) == pytest.approx(2.5 * 0.008)
    assert sees(np.array([0.2, 0.9, -3.0]), np.array([1, 1, 0], bool))
    assert not sees(np.array([0.2, 0.7, -3.0]), np.ones(3, bool))
