"""Comparing methods, and where: on the grid or in the scan's own space."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bundle.errors import InputError
from bundle.metrics import ToSpaced, measure_methods, method_keys
from bundle.reports.viewer import describe_findings
from tests.conftest import ellipsoid, meta, write_nifti

GRID = np.diag([2.0, 2.0, 2.0, 1.0])
GRID[:3, 3] = -24, -28, -20
SHAPE = (24, 28, 20)


def on_grid():
    """A brain with a lesion that every method marks in its way."""
    brain, lesion = ellipsoid(SHAPE, (10, 12, 8)), ellipsoid(SHAPE, (3, 4, 3), (14, 12, 10))
    heatmap = ndimage.gaussian_filter(lesion, 1) * 5 - 1
    data = {
        "image": brain * 0.5,
        "heatmap": heatmap,
        "lesion": lesion,
        "heatmap_other": -heatmap,
        "lesion_other": brain,
    }
    return {key: meta(volume, GRID) for key, volume in data.items()}, lesion


def test_the_scores_own_method_comes_first():
    data, lesion = on_grid()
    assert list(method_keys(data, "fusion")) == ["fusion", "other"]
    measures = measure_methods({**data, "label": meta(lesion, GRID)}, "fusion")
    assert measures["fusion"].values["dice"] == 1 and measures["fusion"].values["auprc"] > 0.99
    assert measures["other"].values["auprc"] < 0.1
    own = {**data, "label": meta(lesion, GRID), "to_atlas": np.diag([1.25, -1.25, 1.28, 1.0])}
    volumes = [measure_methods(d, "fusion")["fusion"].lesion_ml for d in ({**data, "label": meta(lesion, GRID)}, own)]
    np.testing.assert_allclose(volumes[0], 2 * volumes[1])  # size classes are in ml of the scan itself
    assert volumes[0].sum() == pytest.approx(lesion.sum() * 8 / 1000)
    healthy = measure_methods(data, "fusion")
    assert healthy["fusion"].false_findings == 1 and np.isnan(healthy["fusion"].values["dice"])


def test_native_space_is_that_of_the_scans_own_label(tmp_path):
    """Turned, shifted, on finer voxels: the mask lands on the label as the scanner would have had it."""
    data, _ = on_grid()
    to_atlas = np.eye(4)
    to_atlas[:3, :3] = Rotation.from_euler("xyz", (8, -5, 12), degrees=True).as_matrix() @ np.diag([1.05, 0.95, 1.0])
    to_atlas[:3, 3] = 6, -9, 4
    own = np.diag([1.0, 1.0, 3.0, 1.0])
    own[:3, 3] = -40, -40, -36
    shape = (80, 80, 24)
    voxels = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3)
    world = nib.affines.apply_affine(to_atlas @ own, voxels)
    at = nib.affines.apply_affine(np.linalg.inv(GRID), world).T
    lesion = sum(((a - c) / r) ** 2 for a, c, r in zip(at, (14, 12, 10), (3, 4, 3))).reshape(shape) <= 1
    label = write_nifti(tmp_path / "label.nii.gz", lesion, own)
    scan = write_nifti(tmp_path / "scan.nii.gz", lesion, own)
    source = {"image": str(scan), "label": str(label)}
    given = {**data, "source": source, "to_atlas": torch.as_tensor(to_atlas), "label": data["lesion"]}
    out = ToSpaced("heatmap", "native")(given)
    assert out["label"].shape == out["lesion"].shape == out["image"].shape == (1, *shape)
    figures = measure_methods(out, "fusion")
    assert figures["fusion"].values["dice"] > 0.85 and figures["fusion"].values["auprc"] > 0.95
    assert figures["fusion"].lesion_ml.sum() == pytest.approx(lesion.sum() * 3 / 1000)
    assert figures["other"].values["sensitivity"] > 0.99  # the whole brain covers the lesion there, too
    brain_ml = float((out["image"] > 0).sum()) * 3 / 1000
    assert brain_ml == pytest.approx(float((data["image"] > 0).sum()) * 8 / 1000 / (1.05 * 0.95), rel=0.03)
    (finding,) = describe_findings(out["heatmap"], out["lesion"], out["image"] > 0, aligned=out["native_to_atlas"])[
        "lesions"
    ]
    expected = nib.affines.apply_affine(GRID, (14, 12, 10))
    np.testing.assert_allclose(finding["center_atlas_mm"], expected, atol=1)
    assert np.linalg.norm(np.subtract(finding["center_mm"], expected)) > 5
    outside = out["image"].as_tensor() == 0
    assert (out["heatmap"].as_tensor()[outside] == out["heatmap"].as_tensor().min()).all()

    healthy = ToSpaced("heatmap", "native")({**given, "label": None, "source": {"image": str(scan)}})
    assert "label" not in healthy and healthy["image"].shape == (1, *shape)
    elsewhere = {**data, "label": MetaTensor(data["lesion"].as_tensor(), meta={"filename_or_obj": str(label)})}
    assert ToSpaced("heatmap", "native")(elsewhere)["label"].shape == (1, *shape)
    # without the scan that it was made from, the item's own file is where it is measured, in ml of the scan even so
    there = MetaTensor(data["lesion"].as_tensor(), affine=GRID, meta={"filename_or_obj": ""})
    prepared = write_nifti(tmp_path / "prepared.nii.gz", data["lesion"][0].numpy(), GRID)
    there.meta["filename_or_obj"] = str(prepared)
    out = ToSpaced("heatmap", "native")({**data, "label": there, "to_atlas": torch.as_tensor(to_atlas)})
    figures = measure_methods(out, "fusion")["fusion"]
    assert figures.values["dice"] > 0.99
    assert figures.lesion_ml.sum() == pytest.approx(float(data["lesion"].sum()) * 8 / 1000 / (1.05 * 0.95))
    label.unlink()
    with pytest.raises(InputError, match=r"label.nii.gz: the scan as it was is gone"):
        ToSpaced("heatmap", "native")(given)


def test_masks_in_native_space_are_those_of_inference(tmp_path):
    """What a thin bridge held to a lesion is no finding there, either."""
    data, _ = on_grid()
    lesion = torch.zeros_like(data["lesion"].as_tensor())
    lesion[0, 10:14, 10:14, 8:12] = lesion[0, 17, 10, 8] = 1
    lesion[0, 14:17, 10, 8] = 0.05
    label = MetaTensor(lesion, affine=GRID)
    label.meta["filename_or_obj"] = str(write_nifti(tmp_path / "label.nii.gz", lesion[0].numpy(), GRID))
    given = {**data, "lesion": MetaTensor(lesion, affine=GRID), "label": label}
    for least, voxels in ((0.0, 65), (50.0, 64)):
        assert ToSpaced("heatmap", "native", least)(given)["lesion"].sum() == voxels


def test_atlas_space_changes_nothing_and_others_are_unknown():
    data, _ = on_grid()
    out = ToSpaced("heatmap", "atlas")(data)
    assert all(out[key] is data[key] for key in data)
    with pytest.raises(InputError, match="use one of atlas, native"):
        ToSpaced("heatmap", "mni")
