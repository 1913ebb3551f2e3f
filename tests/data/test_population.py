import numpy as np
import pytest
import torch

from bundle.data.population import (
    coarse_affine,
    coarsen,
    median_over_subjects,
    population_maps,
    read_maps,
    write_maps,
)


def test_median_ignores_nan_like_numpy():
    values = torch.randn(7, 5, 4)
    values[torch.rand(values.shape) < 0.4] = torch.nan
    values[:, 0, 0] = torch.nan
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(median_over_subjects(values), np.nanmedian(values.numpy(), 0), rtol=1e-6)


def test_unsmoothed_maps_are_median_and_mad():
    values = torch.randn(9, 6, 5, 4) * 2 + 7
    mean, spread = population_maps(values, mean_sigma=0, prior_subjects=0)
    median = np.median(values.numpy(), 0)
    np.testing.assert_allclose(mean[0], median, rtol=1e-5)
    mad = 1.4826 * np.median(np.abs(values.numpy() - median), 0)
    np.testing.assert_allclose(spread[0], np.maximum(mad, 0.25 * np.sort(mad.ravel())[(mad.size - 1) // 2]), rtol=1e-4)


def test_one_outlier_and_voxels_of_few_brains_do_no_harm():
    values = torch.randn(11, 8, 8, 8)
    values[3] += 100
    values[:, :2] = torch.nan
    values[0, 1] = 50.0  # a voxel that only one brain has, and that one is odd
    mean, spread = population_maps(values, mean_sigma=1.0)
    assert mean.isfinite().all() and spread.isfinite().all() and (spread > 0).all()
    assert mean[0, 3:].abs().max() < 1.5 and mean[0, 0].abs().max() < 30


def test_the_spread_has_a_smoothing_of_its_own():
    values = torch.randn(9, 10, 10, 10)
    mean, spread = population_maps(values, 0.0, 2.0, prior_subjects=0)
    rough_mean, rough_spread = population_maps(values, 0.0, 0.0, prior_subjects=0)
    np.testing.assert_array_equal(mean, rough_mean)
    assert spread.std() < 0.5 * rough_spread.std()


def test_blocks_are_means_of_their_brain_and_share_the_outer_edges():
    volume, inside = torch.arange(64.0).view(1, 4, 4, 4), torch.ones(1, 4, 4, 4, dtype=torch.bool)
    inside[0, 0, 0, 0], inside[0, 2:, 2:, 2:] = False, False
    blocks = coarsen(volume, inside, 2)
    assert blocks[0, 0, 0] == (volume[0, :2, :2, :2].sum() - volume[0, 0, 0, 0]) / 7
    assert blocks[1, 1, 1].isnan()
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(coarse_affine(affine, 2) @ [0, 0, 0, 1], [0.5, 0.5, 0.5, 1])


def test_maps_come_back_as_they_were_written(tmp_path):
    maps = {"mean": torch.randn(1, 5, 4, 3), "spread": torch.full((1, 5, 4, 3), 0.25)}
    index = write_maps(tmp_path / "maps.nii.gz", maps, np.eye(4))
    back = read_maps(tmp_path / "maps.nii.gz", index)
    np.testing.assert_allclose(back["mean"], maps["mean"], atol=2e-3)
    np.testing.assert_array_equal(back["spread"], maps["spread"])
    write_maps(tmp_path / "maps.nii.gz", {name: m.flip(1) for name, m in maps.items()}, np.eye(4))
    with pytest.raises(ValueError, match=r"maps\.nii\.gz is not the file that was written with it"):
        read_maps(tmp_path / "maps.nii.gz", index)
    assert set(read_maps(tmp_path / "maps.nii.gz", {k: m for k, m in index.items() if k != "sha256"})) == set(maps)
