"""From training to metrics through MONAI's own runner, as a user types it, on phantoms and a coarse grid."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from bundle.api import LesionFinder
from bundle.errors import InputError
from bundle.metrics import CASE_METRICS
from bundle.networks import PatchLocator
from bundle.transforms import LoadScand
from tests.conftest import (
    FORMATS,
    GRID,
    ROOT,
    output_of,
    run_bundle,
    run_here,
    succeed,
    write_dicom,
    write_nifti,
    write_scan,
)


def rows(file):
    with file.open() as table:
        return list(csv.DictReader(table))


def test_training_leaves_a_flat_model_and_checkpoints(models):
    state = torch.load(models / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert len(list((models / "checkpoints").glob("*.pt"))) == 2


def test_landmarks_are_learned_before_a_training_and_used_by_it(cohort, grid_file, models, tmp_path):
    use = ("--dataset_dir", cohort, "--ckpt_dir", tmp_path)
    assert "landmarks of 6 scans" in succeed("landmarks", "train", grid_file, *use)
    content = json.loads((tmp_path / "landmarks_t1.json").read_text())
    assert content["intensities"][0] == 0.1 and content["intensities"][-1] == 1
    succeed("training", "train", grid_file, *use, "--max_epochs", 1)
    for where, message in ((tmp_path, "trained without these"), (tmp_path / "new", "name a prepared dataset")):
        data = cohort if where == tmp_path else ""
        late = run_bundle("landmarks", "train", grid_file, "--dataset_dir", data, "--ckpt_dir", where)
        assert late.returncode == 2 and message in late.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_a_normative_map_is_fitted_alone_and_kept(cohort, grid_file, tmp_path):
    use = ("--dataset_dir", cohort, "--ckpt_dir", tmp_path)
    none_there = run_bundle("training", "train_reconstruction", grid_file, *use, "--keep_normative", True)
    assert none_there.returncode == 2 and "no normative map" in none_there.stderr.splitlines()[-1]
    assert "healthy t1 scans" in succeed("normative", "train", grid_file, *use)
    assert (tmp_path / "normative_t1.json").is_file() and not (tmp_path / "model.pt").exists()


def test_training_resumes_and_patches_train_too(models, cohort, grid_file, tmp_path):
    use = ("--dataset_dir", cohort, "--ckpt_dir", tmp_path, "--val_interval", 1)
    (last,) = (models / "checkpoints").glob("*epoch=6.pt")
    out = succeed("run", "train", grid_file, *use, "--max_epochs", 7, "--resume", last, "--sampler", "@patch_sampler")
    assert "Epoch[7] Complete" in out and "Epoch[6] Complete" not in out


@pytest.fixture(scope="module")
def anatomies(cohort, tmp_path_factory):
    """The cohort with label maps of its tissues, cut out of its scans."""
    folder = tmp_path_factory.mktemp("anatomies")
    lists = json.loads((cohort / "datalist.json").read_text())
    for section in ("training", "validation", "calibration"):
        for item in lists[section]:
            image = nib.load(cohort / item["image"])
            scan = image.get_fdata()
            labels = np.select([scan == 0, scan < 0.4, scan < 0.7], [0, 1, 100], 81)
            labels[14:18, 14:18, 7:9] = 59
            item["anatomy_label"] = f"labels/{item['subject']}.nii.gz"
            write_nifti(folder / item["anatomy_label"], labels, image.affine)
            item.update({k: str(cohort / item[k]) for k in ("image", "brain_mask")})
    del lists["test"]
    (folder / "datalist.json").write_text(json.dumps(lists))
    return folder


def test_a_contrast_that_nobody_scanned_is_made_from_anatomy(anatomies, grid_file, tmp_path):
    """Written as a dataset; its model is the contrast's own; and the same on the fly."""
    made, models, out = tmp_path / "made", tmp_path / "models", tmp_path / "out"
    use = ("--contrast", "t2")
    written = succeed("synthesis", "synthesis", grid_file, *use, "--dataset_dir", anatomies, "--output_dir", made)
    assert "6 training, 2 validation, 4 calibration" in written
    trained = ("--dataset_dir", made, "--ckpt_dir", models)
    succeed("training", "train", grid_file, *use, *trained, "--max_epochs", 1)
    (models / "model.pt").write_bytes(b"of another contrast")
    before = (models / "model_t2.pt").read_bytes()
    succeed("training", "train", grid_file, *use, *trained, "--max_epochs", 1, "--seed", 5)
    assert (models / "model_t2.pt").read_bytes() != before
    assert (models / "model.pt").read_bytes() == b"of another contrast"
    succeed("calibration", "calibrate", grid_file, *use, *trained)
    assert (models / "calibration_t2.json").is_file()
    scans = ("--section", "validation", "--dataset_dir", made, "--ckpt_dir", models, "--output_dir", out)
    succeed("inference", "inference", grid_file, *use, *scans)
    fly = ("--dataset_dir", anatomies, "--ckpt_dir", tmp_path / "fly", "--max_epochs", 1, "--amp", True)
    assert "localisation_error_mm" in succeed("training", "train+synthesis", grid_file, *use, *fly)
    wrong = run_bundle("synthesis", "synthesis", grid_file, "--contrast", "pd", "--dataset_dir", anatomies)
    assert wrong.returncode == 2 and "contrast 'pd' is unknown" in wrong.stderr.splitlines()[-1]


def test_a_bids_dataset_is_answered_by_a_derivative(models, cohort, grid_file, tmp_path):
    lists = json.loads((cohort / "datalist.json").read_text())
    source, out, place = tmp_path / "raw", tmp_path / "raw/derivatives/patch2loc", "sub-01/ses-a/anat/sub-01_ses-a"
    for item, name in zip(lists["test"], (f"{place}_T1w.nii.gz", "sub-02/anat/sub-02_acq-x_T1w.nii.gz")):
        (source / name).parent.mkdir(parents=True)
        shutil.copy(cohort / item["image"], source / name)
    (source / f"{place}_T2w.nii.gz").write_bytes(b"")
    (source / "sub-02/anat/sub-02_ce-gd_T1w.nii.gz").write_bytes(b"")
    about = {"Name": "Phantoms", "BIDSVersion": "1.10.0", "License": "CC0", "Authors": ["A", "B"]}
    (source / "dataset_description.json").write_text(json.dumps(about))
    use = ("--dataset_dir", source, "--ckpt_dir", models, "--bias_field", "none", "--alignment", "none")
    use += ("--brain_recovery", "none")
    refused = run_bundle("inference", "inference", grid_file, *use, "--output_dir", source)
    assert refused.returncode == 2 and "is a dataset that others made" in refused.stderr.splitlines()[-1]
    broken = run_bundle("inference", "inference", grid_file, *use, "--output_dir", out)
    assert broken.returncode == 3 and "sub-01_ses-a_T2w.nii.gz: cannot be read" in broken.stderr.splitlines()[-1]
    done = succeed("inference", "inference", grid_file, *use, "--contrast", "t1", "--output_dir", out)
    assert "[1/2]" in done  # other settings
    assert {r["name"]: r["contrast"] for r in rows(out / "summary.csv")} == dict.fromkeys(
        ("sub-01_ses-a_T1w", "sub-02_acq-x_T1w"), "t1"
    )
    kinds = ("desc-heatmap_T1w", "desc-lesionT1w_mask", "desc-coverageT1w_dseg")
    for name in (place, "sub-02/anat/sub-02_acq-x"):
        for kind in kinds:
            image, told = nib.load(out / f"{name}_{kind}.nii.gz"), json.loads((out / f"{name}_{kind}.json").read_text())
            assert image.shape == tuple(GRID["spatial_size"]) and told["Sources"] == [f"bids:raw:{name}_T1w.nii.gz"]
        page = (out / f"{name}_desc-lesionT1w_report.html").read_text()
        assert f'href="{"../" * name.count("/")}report.html"' in page
        assert f'href="{name}_desc-lesionT1w_report.html"' in (out / "report.html").read_text()
    assert len(list((out / "sub-01/ses-a/anat").iterdir())) == 8
    made = json.loads((out / "dataset_description.json").read_text())
    assert made["GeneratedBy"][0]["Name"] == "patch2loc_brain_mri" and made["DatasetType"] == "derivative"
    assert made["DatasetLinks"] == {"raw": "../.."}
    again = succeed("inference", "inference", grid_file, *use, "--contrast", "t1", "--output_dir", out)
    assert again.count("done before") == 2 and "[1/" not in again
    validator = shutil.which("bids-validator-deno")
    if validator:
        checked = subprocess.run([validator, str(out)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.fixture(scope="module")
def two_contrasts(models, cohort, grid_file, tmp_path_factory):
    """Models of T1w and T2w, a cohort in which dark and bright are exchanged, and its lists."""
    folder = tmp_path_factory.mktemp("two")
    both, dark = folder / "models", folder / "t2"
    shutil.copytree(models, both)
    lists = json.loads((cohort / "datalist.json").read_text())
    for item in (item for section in lists.values() for item in section):
        image = nib.load(cohort / item["image"])
        values = image.get_fdata()
        write_nifti(dark / item["image"], np.where(values > 0, 1.3 - values, 0), image.affine)
        item.update(contrast="t2", brain_mask=str(cohort / item["brain_mask"]))
        item.pop("label", None)
    (dark / "datalist.json").write_text(json.dumps(lists))
    use = ("--dataset_dir", dark, "--ckpt_dir", both, "--contrast", "t2")
    succeed("training", "train", grid_file, *use, "--max_epochs", 1)
    succeed("calibration", "calibrate", grid_file, *use)
    return both, dark, lists


def test_the_contrast_is_told_from_each_scan(two_contrasts, cohort, grid_file, tmp_path):
    """One run over raw scans of two contrasts, each with its own model, as if each had been named."""
    (both, dark, lists), out = two_contrasts, tmp_path / "out"
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, folder in (("one", cohort), ("other_t1w", dark), ("third", cohort)):
        shutil.copy(folder / lists["test"][name == "third"]["image"], scans / f"{name}.nii.gz")
    use = ("--ckpt_dir", both, "--bias_field", "none", "--alignment", "none", "--brain_recovery", "none")
    told = succeed("inference", "inference", grid_file, *use, "--dataset_dir", scans, "--output_dir", out)
    table = {row["name"]: row for row in rows(out / "summary.csv")}
    assert {n: row["contrast"] for n, row in table.items()} == {"one": "t1", "other_t1w": "t2", "third": "t1"}
    assert "its name says t1, its tissues t2" in table["other_t1w"]["status"]
    assert "[1/" not in succeed("inference", "inference", grid_file, *use, "--dataset_dir", scans, "--output_dir", out)
    for name, contrast in (("third", "t1"), ("other_t1w", "t2")):
        use_one = ("--dataset_dir", scans / f"{name}.nii.gz", "--contrast", contrast, "--output_dir", tmp_path / name)
        succeed("inference", "inference", grid_file, *use, *use_one)
        files = (folder / name / f"{name}_heatmap.nii.gz" for folder in (out, tmp_path / name))
        np.testing.assert_array_equal(*(nib.load(file).get_fdata() for file in files))
    record = json.loads((out / "run.json").read_text())["inference"]
    assert {"t1", "t2"} <= set(record["settings"]) and "model_t2.pt" in record["sha256"] and "third" in told
    overrides = {**GRID, "min_lesion_mm3": 0.0, "ckpt_dir": str(both), "bias_field": "none", "alignment": "none"}
    find = LesionFinder(device="cpu", brain_recovery="none", **overrides)
    for name, contrast in (("one", "t1"), ("other_t1w", "t2"), ("third", "t1")):
        image = nib.load(scans / f"{name}.nii.gz")
        found = find(image.get_fdata(dtype=np.float32), image.affine)
        assert found.summary["contrast"] == contrast
        expected = nib.load(out / name / f"{name}_heatmap.nii.gz").get_fdata()
        np.testing.assert_allclose(found.heatmap, expected, atol=1e-4)


def test_a_visit_of_two_contrasts_has_one_answer_beside_those_to_its_scans(two_contrasts, cohort, grid_file, tmp_path):
    """As a session of a BIDS dataset."""
    both, dark, lists = two_contrasts
    t1, t2 = (folder / lists["test"][0]["image"] for folder in (cohort, dark))
    source, out, visit = tmp_path / "bids", tmp_path / "out", "sub-1_ses-a_combined"
    place = "sub-1/ses-a/anat/sub-1_ses-a"
    (source / place).parent.mkdir(parents=True)
    for file, suffix in ((t1, "T1w"), (t2, "T2w")):
        shutil.copy(file, source / f"{place}_{suffix}.nii.gz")
    about = {"Name": "Phantoms", "BIDSVersion": "1.10.0", "License": "CC0", "Authors": ["A", "B"]}
    (source / "dataset_description.json").write_text(json.dumps(about))
    use = ("--ckpt_dir", both, "--bias_field", "none", "--alignment", "none", "--brain_recovery", "none")
    use += ("--dataset_dir", source, "--output_dir", out)
    alone = succeed("inference", "inference", grid_file, *use, "--combine_contrasts", False)
    assert visit not in alone and len(rows(out / "summary.csv")) == 2
    names = [
        f"{kind}.{end}" for kind in ("desc-combined_heatmap", "desc-lesionCombined_mask") for end in ("nii.gz", "json")
    ]
    written = {}
    for _ in range(2):
        told = succeed("inference", "inference", grid_file, *use)
        assert told.count("done before") == 2 and (f"{visit}: " in told) == (not written)
        row = {row["name"]: row for row in rows(out / "summary.csv")}[visit]
        assert row["status"] == "ok" and sorted(row["contrast"].split("+")) == ["t1", "t2"]
        times = {name: (out / f"{place}_{name}").stat().st_mtime_ns for name in names}
        assert written in ({}, times)
        written = times
    leading, other = ({"t1": "T1w", "t2": "T2w"}[c] for c in row["contrast"].split("+"))
    sidecar = json.loads((out / f"{place}_{names[1]}").read_text())
    assert sidecar["Sources"] == [f"bids:raw:{place}_{suffix}.nii.gz" for suffix in (leading, other)]
    assert f'href="{place}_desc-lesionCombined_report.html"' in (out / "report.html").read_text()
    heatmaps = [f"{place}_desc-heatmap_{leading}", f"{place}_desc-heatmap_{other}", f"{place}_desc-combined_heatmap"]
    lead, _, combined = (nib.load(out / f"{file}.nii.gz").get_fdata() for file in heatmaps)
    inside = nib.load(t1).get_fdata() > 0
    assert (combined[inside] >= lead[inside] - 1e-4).all() and (
        combined[inside] <= 1.25 * lead[inside].max() + 1e-4
    ).all()
    validator = shutil.which("bids-validator-deno")
    if validator:
        checked = subprocess.run([validator, str(out)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_trainings_are_tracked(cohort, grid_file, tmp_path):
    """TensorBoard by an overlay, with heatmaps of validation slices; MLflow by MONAI's own option."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    use = ("--dataset_dir", cohort, "--ckpt_dir", tmp_path / "models", "--max_epochs", 2, "--val_interval", 1)
    succeed("training", "train+tensorboard", grid_file, *use)
    tracked = events.EventAccumulator(str(tmp_path / "models/tensorboard"))
    tracked.Reload()
    assert [e.step for e in tracked.Scalars("localisation_error_mm")] == [1, 2]
    assert len(tracked.Scalars("train_loss")) >= 2
    assert [e.step for e in tracked.Images("output_HW_0")] == [1, 2]
    if importlib.util.find_spec("mlflow"):
        succeed("training", "train", grid_file, *use, "--tracking", "mlflow", "--output_dir", tmp_path)
        assert (tmp_path / "mlruns.db").stat().st_size > 0


def test_inference_on_a_prepared_dataset(models, cohort, grid_file, tmp_path):
    out = succeed(
        "inference", "inference", grid_file, "--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", tmp_path
    )
    assert "[2/2]" in out
    table = rows(tmp_path / "summary.csv")
    assert list(table[0]) == [
        *("name", "contrast", "lesion_volume_ml", "lesions", "max_score", "mean_score"),
        *("not_examined_percent", "seconds", "status"),
    ]
    items = json.loads((cohort / "datalist.json").read_text())["test"]
    for row, item in zip(table, items):
        name = row["name"]
        assert row["status"] == "ok" and item["image"].endswith(f"{name}.nii.gz")
        names = {
            f"{name}_{kind}"
            for kind in ("heatmap.nii.gz", "lesion.nii.gz", "coverage.nii.gz", "report.png", "report.html")
        }
        assert {f.name for f in (tmp_path / name).iterdir()} == names
        source, heatmap, lesion = (
            nib.load(f)
            for f in (cohort / item["image"], *(tmp_path / name / f"{name}_{k}.nii.gz" for k in ("heatmap", "lesion")))
        )
        coverage = nib.load(tmp_path / name / f"{name}_coverage.nii.gz")
        assert row["not_examined_percent"] == "0.0"  # it lies on the grid
        np.testing.assert_array_equal(np.asarray(coverage.dataobj), source.get_fdata() > 0)
        for result, dtype in ((heatmap, np.float32), (lesion, np.uint8), (coverage, np.uint8)):
            assert result.shape == source.shape and result.get_data_dtype() == dtype
            np.testing.assert_allclose(result.affine, source.affine, atol=1e-5)
        inside = source.get_fdata() > 0
        scores, found = heatmap.get_fdata(dtype=np.float32), np.asarray(lesion.dataobj) > 0
        assert (scores[~inside] == scores.min()).all() and not found[~inside].any()
        threshold = json.loads((models / "calibration_t1.json").read_text())["points"]["fusion"]["specific"]
        np.testing.assert_array_equal(found, inside & (scores > threshold))
        assert float(row["max_score"]) == pytest.approx(scores[inside].max(), abs=1e-3)
        voxel_ml = abs(np.linalg.det(source.affine)) / 1000
        assert float(row["lesion_volume_ml"]) == pytest.approx(found.sum() * voxel_ml, abs=0.01)
    assert [f.name for f in tmp_path.glob(".*")] == [".records"]


def test_inference_answers_in_the_scans_own_space_and_survives_a_bad_scan(models, cohort, grid_file, tmp_path):
    """One scan turned, flipped and resampled by its header, one broken, one with its mask beside it."""
    item = json.loads((cohort / "datalist.json").read_text())["test"][0]
    image = nib.load(cohort / item["image"])
    turned = nib.as_closest_canonical(image).get_fdata()[::-1].transpose(2, 0, 1)
    affine = image.affine @ np.array([[0, -1, 0, image.shape[0] - 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    folder, out = tmp_path / "scans of täglich", tmp_path / "out"
    write_nifti(folder / "turned.nii.gz", turned, affine)
    write_nifti(folder / "plain.nii.gz", image.get_fdata() + 1, image.affine)
    write_nifti(folder / "plain_brain_mask.nii.gz", image.get_fdata() > 0, image.affine)
    (folder / "broken.nii.gz").write_bytes(b"")
    use = ("--dataset_dir", folder, "--ckpt_dir", models, "--output_dir", out, "--bias_field", "none")
    # phantoms lie on the atlas but for outlines of their own, and their voxels are too coarse to be registered
    use += ("--alignment", "none", "--brain_recovery", "none")
    result = run_bundle("inference", "inference", grid_file, *use)
    assert result.returncode == 3, result.stderr
    assert "broken.nii.gz: cannot be read" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    table = {row["name"]: row for row in rows(out / "summary.csv")}
    assert table["broken"]["status"].startswith("failed: ") and not (out / "broken").exists()
    results = {n: nib.load(out / n / f"{n}_heatmap.nii.gz") for n in ("turned", "plain")}
    assert results["turned"].shape == turned.shape
    np.testing.assert_allclose(results["turned"].affine, affine, atol=1e-5)
    back = results["turned"].get_fdata().transpose(1, 2, 0)[::-1]
    np.testing.assert_allclose(back, results["plain"].get_fdata(), atol=0.02)

    # what is done is not done again, unless the scan, a setting or --overwrite asks for it
    written = {n: (out / n / f"{n}_heatmap.nii.gz").stat().st_mtime_ns for n in results}
    write_nifti(folder / "broken.nii.gz", turned, affine)
    again = succeed("inference", "inference", grid_file, *use)
    assert "[1/1] broken" in again and "plain: done before" in again and "turned  " in again.split("summary.csv")[0]
    assert {row["name"]: row["status"] for row in rows(out / "summary.csv")} == dict.fromkeys((*table, "broken"), "ok")
    assert {n: (out / n / f"{n}_heatmap.nii.gz").stat().st_mtime_ns for n in results} == written
    assert "[1/" not in succeed("inference", "inference", grid_file, *use)
    assert "[3/3]" in succeed("inference", "inference", grid_file, *use, "--min_lesion_mm3", 99)
    other = write_nifti(tmp_path / "elsewhere/plain.nii.gz", image.get_fdata() + 2, image.affine)
    os.utime(other, (0, 0))  # older than the result
    again = succeed("inference", "inference", grid_file, *use, "--dataset_dir", other, "--min_lesion_mm3", 99)
    assert "[1/1] plain" in again and "done before" not in again
    assert "plain: its results in" in again and "are of another file, and will be replaced" in again

    overrides = {**GRID, "min_lesion_mm3": 99.0, "ckpt_dir": str(models), "bias_field": "none", "alignment": "none"}
    overrides["brain_recovery"] = "none"
    found = LesionFinder("t1", device="cpu", **overrides)(turned, affine)
    files = [nib.load(out / "turned" / f"turned_{k}.nii.gz") for k in ("heatmap", "lesion", "coverage")]
    for array, file in zip((found.heatmap, found.lesion, found.coverage), files):
        assert array.dtype == file.get_data_dtype()
        np.testing.assert_allclose(array, file.get_fdata(), atol=1e-4)
    assert found.summary["max_score"] == pytest.approx(found.heatmap.max(), abs=1e-6)
    swapped = LesionFinder("t1", device="cpu", **overrides)(turned.astype(">f4"), affine)  # as of FreeSurfer's files
    np.testing.assert_array_equal(swapped.heatmap, found.heatmap)
    for wrong, message in (
        ({"operating_piont": "strict"}, "operating_piont: nothing of that name"),
        ({"contrast": "T1"}, "unknown"),
    ):
        with pytest.raises(InputError, match=message):
            LesionFinder(**{"contrast": "t1", "device": "cpu", **overrides, **wrong})
    with pytest.raises(InputError, match="one grey value"):
        LesionFinder("t1", device="cpu", **overrides)(turned * 1j, affine)
    with pytest.raises(InputError, match="has 2 dimensions"):
        LesionFinder("t1", device="cpu", **overrides)(turned[0], affine)


def test_the_tensorrt_overlay_with_an_engine_of_torchscript(models, cohort, grid_file, tmp_path):
    """All of the overlay but TensorRT itself, which needs a GPU: a compiled network, whose weights are its own."""
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    use = ("--dataset_dir", cohort, "--ckpt_dir", folder, "--output_dir", tmp_path / "engine")
    unnamed = run_bundle("inference", "inference+inference_trt", grid_file, *use)
    assert unnamed.returncode == 2 and "name it with --contrast" in unnamed.stderr.splitlines()[-1]
    use += ("--contrast", "t1")
    missing = run_bundle("inference", "inference+inference_trt", grid_file, *use)
    assert missing.returncode == 2 and "model_trt.ts: no compiled network" in missing.stderr.splitlines()[-1]
    network = PatchLocator(patch_size=GRID["patch_size"])
    network.load_state_dict(torch.load(models / "model.pt", weights_only=True))
    torch.jit.script(network.eval()).save(folder / "model_trt.ts")
    precise = ("--precision", "float32")  # the engine has its own
    succeed("inference", "inference+inference_trt", grid_file, *use, *precise)
    use = ("--dataset_dir", cohort, "--ckpt_dir", models)
    succeed("inference", "inference", grid_file, *use, "--output_dir", tmp_path / "torch", *precise)
    for row in rows(tmp_path / "torch/summary.csv"):
        file = f"{row['name']}/{row['name']}_heatmap.nii.gz"
        one, other = (nib.load(tmp_path / run / file).get_fdata() for run in ("torch", "engine"))
        np.testing.assert_allclose(other, one, atol=1e-3)


def test_every_format_gives_what_nifti_gives(models, cohort, grid_file, tmp_path):
    item = json.loads((cohort / "datalist.json").read_text())["test"][0]
    image = nib.load(cohort / item["image"])
    scan, folder, out = np.round(image.get_fdata() * 1000), tmp_path / "scans", tmp_path / "out"
    last = np.array(image.shape) - 1
    affine = image.affine @ np.array([[-1, 0, 0, last[0]], [0, -1, 0, last[1]], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    for ending in FORMATS:
        write_scan(folder, f"as_{ending.partition('.')[0]}", ending, scan[::-1, ::-1], affine)
    write_dicom(folder / "as_dicom", scan[::-1, ::-1], affine)
    (folder / "half.img").write_bytes(b"")  # told of, and no scan
    use = ("--dataset_dir", folder, "--ckpt_dir", models, "--output_dir", out, "--bias_field", "none")
    # phantoms lie on the atlas but for outlines of their own, and their voxels are too coarse to be registered
    use += ("--alignment", "none", "--brain_recovery", "none")
    result = run_bundle("inference", "inference", grid_file, *use)
    assert result.returncode == 0 and "half.img: not read" in result.stderr, result.stderr
    table = {row.pop("name"): row for row in rows(out / "summary.csv")}
    assert set(table) == {f"as_{ending.partition('.')[0]}" for ending in (*FORMATS, "dicom")}
    kept = {"nrrd": ".nrrd", "nhdr": ".nrrd", "mha": ".mha", "mhd": ".mha"}  # what answers in a format of its own
    for name, row in table.items():
        assert {**row, "seconds": ""} == {**table["as_nii"], "seconds": ""}
        is_dicom = name in ("as_dicom", "as_zip")
        assert (out / name / f"{name}_lesion.seg.dcm").is_file() == is_dicom
        assert len({f.name for f in (out / name).iterdir()}) == 5 + is_dicom
        for kind in ("heatmap", "lesion", "coverage"):
            files = (out / n / f"{n}_{kind}{kept.get(n.removeprefix('as_'), '.nii.gz')}" for n in ("as_nii", name))
            nifti, other = (LoadScand("x")({"x": file})["x"] for file in files)
            np.testing.assert_allclose(nifti.affine, other.affine, atol=1e-4)
            np.testing.assert_allclose(nifti, other, atol=1e-3)
    again = succeed("inference", "inference", grid_file, *use)
    assert again.count("done before") == len(table) and "[1/" not in again


def test_evaluation_survives_a_bad_scan_and_any_score(models, cohort, grid_file, tmp_path):
    """One of two test scans is broken: the other is measured, exit code 3. A baseline may be the score."""
    (bad,) = (item for item in json.loads((cohort / "datalist.json").read_text())["test"][:1])
    content = {"test": [{**bad, "image": "broken.nii.gz"}, bad]}
    dataset = tmp_path / "data"
    for key in ("brain_mask", "label", "image"):
        (dataset / bad[key]).parent.mkdir(parents=True, exist_ok=True)
        (dataset / bad[key]).write_bytes((cohort / bad[key]).read_bytes())
    (dataset / "broken.nii.gz").write_bytes(b"")
    (dataset / "datalist.json").write_text(json.dumps(content))
    use = ("--dataset_dir", dataset, "--ckpt_dir", models, "--output_dir", tmp_path / "out", "--score", "atlas_z")
    result = run_bundle("evaluation", "evaluate", grid_file, *use)
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    assert "broken.nii.gz: cannot be read" in result.stderr.splitlines()[-1]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics["methods"]) == ["atlas_z", "location", "intensity", "intensity_opposite", "all_positive"]
    assert list(metrics["cases"]) == [bad["subject"]] and len(metrics["failed"]) == 1


def test_evaluation_agrees_with_the_files_of_inference(models, cohort, grid_file, tmp_path):
    from sklearn.metrics import average_precision_score

    use = ("--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", tmp_path)
    succeed("evaluation", "evaluate", grid_file, *use)
    found = tmp_path / "found"
    succeed("inference", "inference", grid_file, *use, "--output_dir", found)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    methods = ["fusion", "location", "atlas_z", "asymmetry", "intensity", "intensity_opposite", "all_positive"]
    assert list(metrics["methods"]) == methods
    assert "healthy" in metrics["threshold"]["chosen_by"] and metrics["cases_with_lesions"] == 2
    scores, labels, dices = [], [], []
    for item in json.loads((cohort / "datalist.json").read_text())["test"]:
        name = item["subject"]
        inside = nib.load(cohort / item["image"]).get_fdata() > 0
        label = nib.load(cohort / item["label"]).get_fdata()[inside] > 0
        heatmap, lesion = (
            nib.load(found / name / f"{name}_{k}.nii.gz").get_fdata()[inside] for k in ("heatmap", "lesion")
        )
        case = metrics["cases"][name]
        assert case["fusion"]["auprc"] == pytest.approx(average_precision_score(label, heatmap), abs=1e-5)
        assert case["all_positive"]["auprc"] == pytest.approx(label.mean(), abs=1e-6)
        dices.append(2 * (lesion * label).sum() / (lesion.sum() + label.sum()))
        assert case["fusion"]["dice"] == pytest.approx(dices[-1], abs=1e-5)
        scores.append(heatmap)
        labels.append(label)
    method = metrics["methods"]["fusion"]
    fraction, exponent = np.frexp(np.concatenate(scores).astype(np.float32))
    binned = np.ldexp(np.floor(fraction * 2**12), exponent)  # 11 bits of mantissa behind the first
    pooled = average_precision_score(np.concatenate(labels), binned)
    assert method["auprc_pooled"] == pytest.approx(pooled, abs=1e-4)
    assert method["dice_mean"] == pytest.approx(np.mean(dices), abs=1e-5)
    table = rows(tmp_path / "metrics.csv")
    assert len(table) == 2 * len(methods) and set(table[0]) == {"case", "method", *CASE_METRICS}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 3
    assert "://" not in page and "<link" not in page  # opens without a network; letters of a picture may spell http
    assert (
        "upper bound" in page and "frozen on healthy scans" in page and '"model_sha256"' in page.replace("&#34;", '"')
    )
    overview = (found / "report.html").read_text()
    for name in metrics["cases"]:  # a viewer of each, with the true lesions, of what was found here and there
        assert f'href="cases/{name}.html"' in page and f'href="{name}/{name}_report.html"' in overview
        for file in (tmp_path / f"cases/{name}.html", found / name / f"{name}_report.html"):
            assert 'class="true"' in file.read_text() and file.stat().st_size < 15e6


@pytest.fixture(scope="module")
def fused(models, cohort, grid_file, tmp_path_factory):
    """The same model with a reconstruction network and a map of somebody else's beside it, calibrated for a fusion."""
    folder = tmp_path_factory.mktemp("fused")
    (folder / "model.pt").write_bytes((models / "model.pt").read_bytes())
    maps = folder / "maps of others"
    for section in json.loads((cohort / "datalist.json").read_text()).values():
        for item in section:
            image = nib.load(cohort / item["image"])
            brain = image.get_fdata()
            write_nifti(maps / f"{item['subject']}.nii.gz", (0.5 - brain) ** 2 * (brain > 0), image.affine)
    use = ("--dataset_dir", cohort, "--ckpt_dir", folder)
    out = succeed("training", "train_reconstruction", grid_file, *use, "--max_epochs", 2)
    assert "reconstruction_error" in out
    out = succeed("training", "train_segmentation", grid_file, *use, "--max_epochs", 1)
    assert "average_precision" in out
    on = ("--init", folder / "segmentation_t1.pt", "--scanner", "@any_scanner", "--anomalies", "@lesion_like")
    on += ("--anatomy", "@wide_ventricles")
    succeed("training", "train_segmentation", grid_file, *use, *on, "--max_epochs", 1, "--keep_normative", "True")
    weights = "{'location': 1, 'reconstruction': 1, 'segmentation': 0.5, 'embedding': 0, 'theirs': 0.5}"
    fusion = ("--fusion_weights", weights)
    fusion += ("--fusion_maps", str({"theirs": str(maps)}))
    told = succeed("calibration", "calibrate", grid_file, *use, *fusion, "--with_embedding", "True")
    assert "embedding: 6 of 6 healthy scans" in told and "thresholds: specific" in told
    return folder, fusion


def test_fusion_of_our_maps_and_others(fused, cohort, grid_file, tmp_path):
    """Every method in one table; tuned on other patients; healthy people beside; masks as the inference writes them."""
    folder, fusion = fused
    lists = json.loads((cohort / "datalist.json").read_text())
    data = tmp_path / "data"
    for key in ("image", "brain_mask", "label"):
        for item in lists["test"]:
            item[key] = str(cohort / item[key])
    data.mkdir()
    (data / "datalist.json").write_text(json.dumps({"test": lists["test"][:1], "tuning": lists["test"][1:]}))
    use = ("--ckpt_dir", folder, "--score", "fusion", *fusion)
    evaluate = (*use, "--dataset_dir", data, "--healthy_dir", cohort, "--output_dir", tmp_path / "out")
    out = succeed("evaluation", "evaluate", grid_file, *evaluate)
    assert "[4/4] healthy" in out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics["methods"]) == [
        *("fusion", "location", "reconstruction", "segmentation", "theirs", "asymmetry", "embedding"),
        *("atlas_z", "intensity", "intensity_opposite"),
        "all_positive",
    ]
    (case,) = metrics["cases"].values()
    assert metrics["tuning_cases"] == 1 and metrics["healthy_cases"] == 2
    assert 0 <= case["fusion"]["dice_tuned"] <= case["fusion"]["dice_best"]
    assert metrics["methods"]["fusion"]["healthy"]["scans"] == 2
    assert metrics["settings"]["fusion"] == "sum of 1 location, 1 reconstruction, 0.5 segmentation, 0.5 theirs"
    # inference takes the fusion that the calibration holds
    use = ("--ckpt_dir", folder, *fusion[2:])
    succeed("inference", "inference", grid_file, *use, "--dataset_dir", data, "--output_dir", tmp_path / "scans")
    (name,) = metrics["cases"]
    found = nib.load(tmp_path / f"scans/{name}/{name}_lesion.nii.gz").get_fdata()
    label = nib.load(lists["test"][0]["label"]).get_fdata()
    dice = 2 * (found * label).sum() / (found.sum() + label.sum())
    assert case["fusion"]["dice"] == pytest.approx(dice, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--fusion_rule", "product"],
            "no threshold of the fusion 'product of 1 location, 1 reconstruction, 0.5 segmentation",
        ),
        (["--fusion_rule", "average"], "fusion_rule 'average' is unknown"),
        (["--fusion_maps", "{'theirs': 'nowhere'}"], "its map 'theirs' is not there (nowhere/"),
        (["--fusion_weights", "{'location': 1, 'magic': 1}", "--threshold", "2"], "no map 'magic' in the calibration"),
        (["--operating_point", "often", "--space", "atlas"], "operating_point 'often' is unknown"),
        (["--space", "moon"], "space 'moon' is unknown"),
    ],
)
def test_mistakes_with_fusions_get_one_line(fused, cohort, grid_file, tmp_path, overrides, message):
    folder, fusion = fused
    use = ("--dataset_dir", cohort, "--ckpt_dir", folder, "--output_dir", tmp_path, "--score", "fusion")
    given = dict(zip(fusion[::2], fusion[1::2])) | dict(zip(overrides[::2], overrides[1::2]))
    result = run_bundle("evaluation", "evaluate", grid_file, *use, *(v for pair in given.items() for v in pair))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_another_reconstruction_model_is_refused(fused, cohort, grid_file, tmp_path):
    folder, fusion = fused
    for file in folder.glob("*.*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = torch.load(folder / "reconstruction_t1.pt", weights_only=True)
    for value in weights.values():
        value += 1
    torch.save(weights, tmp_path / "reconstruction_t1.pt")
    result = run_bundle("evaluation", "evaluate", grid_file, "--dataset_dir", cohort, "--ckpt_dir", tmp_path, *fusion)
    assert result.returncode == 2 and "another reconstruction model" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("run_id", "config", "overrides", "message"),
    [
        ("training", "train", ["--dataset_dir", "nowhere"], "nowhere: not a folder"),
        ("inference", "inference", ["--dataset_dir", "nowhere.nii.gz"], "nowhere.nii.gz: not found"),
        ("inference", "inference", ["--ckpt_dir", "nowhere"], "nowhere/model.pt: no trained model here"),
        ("inference", "inference", ["--score", "magic"], "score 'magic' is unknown"),
        ("inference", "inference", ["--threshold_quantile", "0.97"], "at quantile 0.97: stored are 0.9,"),
        ("inference", "inference", ["--spacing", "5.0"], "made on another grid"),
        ("training", "train", ["--dataset_dir", ""], "name it with --dataset_dir"),
        ("evaluation", "evaluate", ["--section", "testing"], "no item of contrast 't1' in 'testing'"),
        ("preparation", "prepare", ["--dataset", "nothing"], "dataset 'nothing': there is no dataset config"),
    ],
)
def test_mistakes_get_one_line(models, cohort, grid_file, tmp_path, run_id, config, overrides, message):
    use = [] if run_id == "preparation" else ["--dataset_dir", cohort, "--ckpt_dir", models]
    if config in ("inference", "evaluate"):
        use += ["--output_dir", tmp_path]
    result = run_bundle(run_id, config, grid_file, *use, *overrides)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_it_runs_from_another_folder(models, cohort, grid_file, tmp_path):
    use = ("--bundle_root", ROOT, "--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", "here")
    succeed("run", "evaluate", grid_file, *use, cwd=tmp_path, fresh=True)  # a new process: its imports too
    assert (tmp_path / "here/metrics.json").is_file()


def test_ablation_measures_every_score_as_the_evaluation_does(models, cohort, grid_file, tmp_path):
    items = json.loads((cohort / "datalist.json").read_text())["test"]
    for item in items:  # of each lesion a half is of a kind that is to be ignored
        label = nib.load(cohort / item["label"])
        lesion = np.asarray(label.dataobj) > 0
        half = np.cumsum(lesion).reshape(lesion.shape) > lesion.sum() / 2
        item |= {key: str(cohort / item[key]) for key in ("image", "brain_mask")} | {"ignored_labels": [2]}
        item["label"] = str(write_nifti(tmp_path / f"{item['subject']}.nii.gz", lesion * (1 + half), label.affine))
    (tmp_path / "datalist.json").write_text(json.dumps({"test": items}))
    out = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "scripts/ablation.py", "--ckpt_dir", models, "--healthy", cohort]
    command += ["--test", f"phantoms={tmp_path}:test", "--filter_mm", "0", "3", "--output", out, "--quantile", 0.99]
    command += ["--fusion", "sum:atlas_z=1,asymmetry=0.5,location=1", "--picture", tmp_path / "maps.png"]
    command += ["--set", *(f"{k}={v}" for k, v in GRID.items())]
    said = output_of(run_here(command, tmp_path))
    figures = json.loads(out.read_text())
    assert set(figures) == {"filter 0 mm", "filter 3 mm"} and "| location |" in said
    use = (
        "--dataset_dir",
        tmp_path,
        "--ckpt_dir",
        models,
        "--output_dir",
        tmp_path / "out",
        "--threshold_quantile",
        0.99,
    )
    succeed("evaluation", "evaluate", grid_file, *use)
    methods = json.loads((tmp_path / "out/metrics.json").read_text())["methods"]
    rows = figures["filter 3 mm"]["phantoms"]
    for name in ("location", "atlas_z", "intensity", "all_positive"):
        assert rows[name]["auprc"] == pytest.approx(methods[name]["auprc_mean"], abs=1e-3)
        assert rows[name]["dice"] == pytest.approx(methods[name]["dice_mean"], abs=1e-2)
    assert rows["location"] != figures["filter 0 mm"]["phantoms"]["location"]
    assert 0 <= rows["location"]["recall_at_1_fp"] <= 1
    fusion = "sum of 1 atlas_z, 0.5 asymmetry, 1 location"  # what calibrate.json has for T1w
    assert rows[fusion]["auprc"] == pytest.approx(methods["fusion"]["auprc_mean"], abs=1e-3)
    for name in ("location", fusion):
        alarms = figures["filter 3 mm"][f"healthy, held out, {name}"]
        assert alarms["0.9"]["voxels"] >= alarms["0.999"]["voxels"] >= 0
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_a_fusion_is_chosen_on_scans_with_lesions(fused, cohort, tmp_path):
    out = tmp_path / "fusion.json"
    command = [sys.executable, ROOT / "scripts/choose_fusion.py", "--ckpt_dir", fused[0], "--dataset_dir", cohort]
    command += ["--section", "test", "--weights", "1", "--rules", "sum", "maximum", "--output", out]
    command += ["--maps", "atlas_z", "location", "embedding", "--set", *(f"{k}={v}" for k, v in GRID.items())]
    command += ["--check_dir", cohort, "--check_margin", "0"]
    said = output_of(run_here(command, tmp_path))
    figures = json.loads(out.read_text())
    assert len(figures["auprc"]) == 3 + 2 * 4 and "chosen: --fusion_rule" in said
    assert len(figures["real"]) == said.count("real: ") > 0
    weights = figures["chosen"]["weights"]
    text = f"{figures['chosen']['rule']} of " + ", ".join(f"{w:g} {n}" for n, w in weights.items())
    assert figures["auprc"][text] >= max(figures["auprc"].values()) - 0.002
    found = {fusion: sum(scan[fusion] for scan in figures["real"]) for fusion in figures["auprc"]}
    assert found[text] == max(found.values())  # the check's margin is 0


def test_an_embedding_takes_part_from_the_first_calibration_on(models, cohort, grid_file, tmp_path):
    (tmp_path / "model.pt").write_bytes((models / "model.pt").read_bytes())
    for file in models.glob("normative_t1*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    use = ("--dataset_dir", cohort, "--ckpt_dir", tmp_path, "--usual_weights#t1", "{'atlas_z': 1.0, 'embedding': 0.5}")
    succeed("calibration", "calibrate", grid_file, *use)
    content = json.loads((tmp_path / "calibration_t1.json").read_text())
    assert content["fusion"]["weights"] == {"atlas_z": 1.0, "embedding": 0.5}
    assert content["provenance"]["embedding_sha256"]
    assert "of the same model, range and scans already" in succeed("calibration", "calibrate", grid_file, *use)


def test_operating_points_and_quantiles(models, cohort, grid_file, tmp_path):
    found = {}
    for name in ("specific", "screening", "strict"):
        given = () if name == "specific" else ("--operating_point", name)
        use = ("--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", tmp_path / name, *given)
        succeed("evaluation", "evaluate", grid_file, *use)
        content = json.loads((tmp_path / name / "metrics.json").read_text())
        found[name] = content["threshold"]["value"]
        assert f"operating point '{name}'" in content["threshold"]["chosen_by"]
    use = ("--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", tmp_path / "all")
    succeed("evaluation", "evaluate", grid_file, *use, "--compare_points", "['screening', 'strict']")
    methods = json.loads((tmp_path / "all/metrics.json").read_text())["methods"]
    for name in ("screening", "strict"):
        alone = json.loads((tmp_path / name / "metrics.json").read_text())["methods"]["fusion"]
        compared = methods[f"fusion_{name}"]
        assert compared.pop("auprc_gain_of_score_ci95") in ([0, 0], [None, None])
        assert compared == alone
    points = json.loads((models / "calibration_t1.json").read_text())["points"]["fusion"]
    assert found == points and points["screening"] <= points["specific"] <= points["strict"]
