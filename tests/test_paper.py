"""The paper by one overlay: from raw scans and official lists to metrics.json, as a user types it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from bundle.data.phantom import make_cohort
from tests.conftest import CENTER, succeed, write_nifti

SECTIONS = {"train_fold0": [0, 1], "val_fold0": [2], "calibration": [3, 4, 5], "test": [6]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What makes the overlay small enough for a test, merged after it; phantoms lie on the atlas already."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = {k: f"{{subject}}_{v}.nii.gz" for k, v in {"brain_mask": "brain_mask", "label": "lesion"}.items()}
    recipe |= {"images": {"t1": "{subject}_t1.nii.gz"}, "alignment": "none"}
    (folder / "people.yaml").write_text(yaml.safe_dump(recipe))
    small = {"spacing": 8.0, "spatial_size": [24, 26, 12], "patch_size": 8, "num_centres": 60, "dense_stride": 8}
    small |= {"max_epochs": 2, "val_interval": 1}
    small["recipe"] = {"_target_": "bundle.data.load_recipe", "folder": str(folder), "name": "@dataset"}
    file = folder / "tiny.json"
    file.write_text(json.dumps(small))
    return file


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Seven people of whom the last is a patient, and lists of them as the public codes have them."""
    made, folder = (tmp_path_factory.mktemp(name) for name in ("made", "raw"))
    make_cohort(made, {"training": 6, "test": 1}, 4.0, [48, 56, 44], CENTER, radii_mm=(14.0, 20.0))
    items = [item for part in json.loads((made / "datalist.json").read_text()).values() for item in part]
    for number, item in enumerate(items):
        for key, name in (("image", "t1"), ("brain_mask", "brain_mask"), ("label", "lesion")):
            if key in item:
                image = nib.load(made / item[key])
                write_nifti(folder / f"p{number}_{name}.nii.gz", image.get_fdata(), image.affine)
    for section, people in SECTIONS.items():
        table = "".join(f"p{k}_t1.nii.gz,{int(section == 'test')}\n" for k in people)
        (folder / f"people_{section}.csv").write_text("img_name,label\n" + table)
    return folder


def test_from_raw_scans_to_metrics(raw, tiny, tmp_path):
    data, models, out = tmp_path / "data", tmp_path / "models", tmp_path / "out"
    prepare = ("--source_dir", raw, "--dataset_dir", data, "--dataset", "people", "--splits_file", raw)
    prepare += ("--num_workers", 0)  # what a worker imports takes longer than the scans
    told = succeed("preparation", "prepare+paper", tiny, *prepare)
    assert "2 training, 1 validation, 3 calibration, 1 test" in told
    use = ("--dataset_dir", data, "--ckpt_dir", models)
    assert "landmarks of 2 scans" in succeed("training", "train+paper", tiny, *use)
    state = torch.load(models / "model.pt", weights_only=True)
    assert state["trunk.conv1.weight"].shape == (64, 1, 3, 3) and state["location_head.0.weight"].shape == (512, 512)
    succeed("calibration", "calibrate+paper", tiny, *use)
    quantiles = json.loads((models / "calibration_t1.json").read_text())["quantiles"]
    succeed("evaluation", "evaluate+paper", tiny, *use, "--output_dir", out)
    content = json.loads((out / "metrics.json").read_text())
    methods = ["paper", "location", "atlas_z", "intensity", "intensity_opposite", "all_positive"]
    assert list(content["methods"]) == methods and content["settings"]["spacing"] == 8
    assert content["threshold"]["value"] == quantiles["paper"]["0.98"]
    figures = content["methods"]["paper"]
    assert 0 <= figures["dice_mean"] <= figures["dice_best_mean"] <= 1 and 0 < figures["auprc_mean"] < 1
    # what users get of it: a heatmap on the scan's own voxels
    succeed("inference", "inference+paper", tiny, *use, "--score", "paper_masked", "--output_dir", out / "scans")
    heatmap = nib.load(out / "scans/p6_t1/p6_t1_heatmap.nii.gz").get_fdata()
    assert np.isfinite(heatmap).all() and len(np.unique(heatmap)) > 100
