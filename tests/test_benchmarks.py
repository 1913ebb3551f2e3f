"""The paper's four benchmarks, from trees with the official names to the table, as docs/evaluation.md has it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import yaml

from bundle.data import load_atlas
from bundle.data.phantom import make_cohort
from bundle.transforms import ResampleToGrid
from tests.conftest import CENTER, succeed, write_nifti

PATIENTS = 3
MNI = "space-MNI152NLin2009aSym"
# benchmark -> contrast, files of patient number i: their names, by what they hold
OFFICIAL = {
    "brats21": ("t2", lambda i: {k: f"BraTS2021_{i:05}/BraTS2021_{i:05}_{k}.nii.gz" for k in ("t1", "t2", "seg")}),
    "mslub": (
        "t2",
        lambda i: {
            k: f"patient{i:02}/patient{i:02}_{n}.nii.gz"
            for k, n in {"t1": "T1W", "t2": "T2W", "seg": "consensus_gt", "brain": "brainmask"}.items()
        },
    ),
    "atlas_v2": (
        "t1",
        lambda i: {
            k: f"Training/R001/sub-r001s{i:03}/ses-1/anat/sub-r001s{i:03}_ses-1_{MNI}_{n}.nii.gz"
            for k, n in {"t1": "T1w", "seg": "label-L_desc-T1lesion_mask"}.items()
        },
    ),
    "wmh": (
        "t1",
        lambda i: {
            k: f"{('Utrecht', 'Singapore', 'Amsterdam/GE3T')[i]}/{i + 50}/{n}.nii.gz"
            for k, n in {"t1": "pre/T1", "flair": "pre/FLAIR", "seg": "wmh"}.items()
        },
    ),
}


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """The chain's own grid, coarser still."""
    file = tmp_path_factory.mktemp("grid") / "grid.yaml"
    grid = {"spacing": 6.0, "spatial_size": [32, 32, 16], "patch_size": 8}
    file.write_text(yaml.safe_dump({**grid, "min_lesion_mm3": 0.0}))
    return file


@pytest.fixture(scope="module")
def prepare(coarse, tmp_path_factory):
    """The preparation, quick: with an atlas of 4 mm, and in this process, as a worker's imports take longer."""
    grid, atlas = ResampleToGrid(4.0, (48, 56, 48), CENTER), load_atlas()
    brain = grid(atlas.template) * grid(atlas.brain_mask, "nearest")
    file = write_nifti(tmp_path_factory.mktemp("atlas") / "atlas.nii.gz", brain[0], brain.affine.numpy())

    def run(dataset, source, out, splits):
        use = ("--source_dir", source, "--dataset_dir", out, "--dataset", dataset, "--splits", splits)
        return succeed("preparation", "prepare", coarse, *use, "--atlas", file, "--num_workers", 0)

    return run


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Phantoms with the looks of T1w and T2w, on voxels that a registration can use: volumes by name, and affine."""
    folder = tmp_path_factory.mktemp("people")
    make_cohort(folder, {"training": 6, "test": PATIENTS}, 4.0, [48, 56, 44], CENTER, radii_mm=(12.0, 18.0))
    people = []
    for items in json.loads((folder / "datalist.json").read_text()).values():
        for item in items:
            image = nib.load(folder / item["image"])
            scan = image.get_fdata()
            label = nib.load(folder / item["label"]).get_fdata() if "label" in item else 0 * scan
            volumes = {"t1": scan, "t2": (1.2 - scan) * (scan > 0), "brain": scan > 0, "seg": label}
            people.append({**volumes, "flair": volumes["t2"], "affine": image.affine})
    return people


@pytest.fixture(scope="module")
def healthy(people, prepare, coarse, tmp_path_factory):
    """IXI as it is downloaded, one person under two names; prepared, trained on and calibrated for both contrasts."""
    raw, data, models = (tmp_path_factory.mktemp(name) for name in ("ixi_raw", "ixi", "models"))
    for number in range(7):
        for contrast in ("t1", "t2"):
            person = people[min(number, 5)]
            file = raw / f"IXI-{contrast.upper()}/IXI{number:03}-Guys-{number:04}-{contrast.upper()}.nii.gz"
            write_nifti(file, person[contrast], person["affine"])
    out = prepare("ixi", raw, data, "{'training':'rest','validation':1,'calibration':3}")
    assert out.count("is the same image as") == 2
    for contrast in ("t1", "t2"):
        use = ("--dataset_dir", data, "--ckpt_dir", models, "--contrast", contrast)
        succeed("training", "train", coarse, *use, "--max_epochs", 1, "--dense_stride", 2)
        succeed("calibration", "calibrate", coarse, *use)
    return data, models


@pytest.mark.parametrize(
    ("dataset", "space"), [("brats21", "atlas"), ("mslub", "native"), ("atlas_v2", "atlas"), ("wmh", "native")]
)
def test_from_the_download_to_the_table(dataset, space, people, prepare, healthy, coarse, tmp_path):
    data, models = healthy
    contrast, names = OFFICIAL[dataset]
    for number, person in enumerate(people[-PATIENTS:]):
        for kind, name in names(number).items():
            if number and kind not in (contrast, "seg", "brain"):
                continue  # the other contrasts are read once, and not needed
            volume = np.round(person[kind]) if kind in ("seg", "brain") else person[kind]
            write_nifti(tmp_path / "raw" / name, volume, person["affine"])
    prepare(dataset, tmp_path / "raw", tmp_path / "data", "{'tuning':'rest','test':2}")
    use = ("--dataset_dir", tmp_path / "data", "--ckpt_dir", models, "--contrast", contrast, "--score", "fusion")
    out = tmp_path / "out"
    succeed("evaluation", "evaluate", coarse, *use, "--healthy_dir", data, "--space", space, "--output_dir", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["cases"]) == metrics["cases_with_lesions"] == 2
    assert metrics["settings"]["space"] == space
    assert metrics["tuning_cases"] == 1 and metrics["healthy_cases"] == 1
    assert {f.name for f in out.iterdir()} == {"metrics.json", "metrics.csv", "report.html", "run.json", "cases"}
    figures = metrics["methods"]
    assert {"fusion", "location", "atlas_z", "intensity", "all_positive"} <= set(figures)
    assert figures["fusion"]["dice_tuned_mean"] is not None and figures["fusion"]["lesions"]["all"]["lesions"] >= 2
    floor = figures["all_positive"]["auprc_mean"]
    brain = np.mean([(p["seg"] > 0).sum() / (p["brain"] > 0).sum() for p in people[-PATIENTS:]])
    assert 0.3 * brain < floor < 3 * brain
