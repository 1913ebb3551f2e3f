"""What scanners, colleagues and accidents hand over: every line of it goes through MONAI's runner."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from bundle.networks import PatchLocator, save_weights
from bundle.scoring.calibration import model_hash
from tests.conftest import ROOT, run_bundle, run_here, write_nifti


@pytest.fixture(scope="module")
def scan(cohort):
    """A good scan: its voxels, the affine, and the file of its brain mask."""
    item = json.loads((cohort / "datalist.json").read_text())["test"][0]
    image = nib.load(cohort / item["image"])
    return image.get_fdata(dtype=np.float32), image.affine, cohort / item["brain_mask"]


def save(file, array, affine, dtype=None, **forms):
    """Write a NIfTI file with what `write_nifti` does not offer: its dtype, its codes, its own header."""
    image = nib.Nifti1Image(np.asarray(array, dtype or np.float32), affine)
    for form, (matrix, code) in forms.items():
        getattr(image, f"set_{form}")(matrix, code)
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, file)
    return file


def bad_scans(folder, voxels, affine):
    """Name -> what the table must say of it: of a scan that is refused, the reason; of another, its flags or "ok"."""
    inside, rng = voxels > 0, np.random.default_rng(0)
    good = write_nifti(folder / "good.nii.gz", voxels, affine)
    packed = good.read_bytes()
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "changed.nii.gz").write_bytes(packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:])  # as by a flipped bit
    (folder / "text.nii.gz").write_text("not an image")
    (folder / "short.nii").write_bytes(nib.load(good).to_bytes()[:2000])
    save(folder / "two_d.nii.gz", voxels[:, :, 8], affine)
    save(folder / "four_d.nii.gz", np.stack([voxels, voxels], -1), affine)
    colours = np.zeros(voxels.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, affine), folder / "colours.nii.gz")
    save(folder / "slab.nii.gz", voxels[:, :, :3], affine)
    save(folder / "constant.nii.gz", inside * 5.0, affine)
    save(folder / "zeros.nii.gz", voxels * 0, affine)
    save(folder / "singular.nii.gz", voxels, affine, sform=(np.diag([6.0, 6, 0, 1]), 1), qform=(None, 0))
    save(folder / "nowhere.nii.gz", voxels, affine, sform=(None, 0), qform=(None, 0))
    mirrored = affine @ np.diag([-1.0, 1, 1, 1])
    save(folder / "two_sides.nii.gz", voxels, affine, sform=(affine, 1), qform=(mirrored, 1))
    save(
        folder / "outside.nii.gz",
        voxels,
        np.array([[1, 0, 0, 900], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) @ affine,
    )
    many = np.where(inside & (rng.random(voxels.shape) < 0.1), np.nan, voxels)
    write_nifti(folder / "many_nan.nii.gz", many, affine)
    write_nifti(folder / "many_nan_brain_mask.nii.gz", inside, affine)
    write_nifti(folder / "no_brain.nii.gz", voxels, affine)
    write_nifti(folder / "no_brain_brain_mask.nii.gz", voxels * 0, affine)
    write_nifti(folder / "inverted.nii.gz", voxels, affine)
    write_nifti(folder / "inverted_brain_mask.nii.gz", ~inside, affine)
    write_nifti(folder / "labelled.nii.gz", voxels, affine)
    write_nifti(folder / "labelled_lesion.nii.gz", inside, affine + 900 * np.eye(4, k=3))
    write_nifti(folder / "head.nii.gz", voxels + 1 + 0.1 * rng.random(voxels.shape), affine)
    refused = {
        "empty": "cannot be read",
        "truncated": "cannot be read",
        "changed": "its checksum does not fit",
        "text": "cannot be read",
        "short": "which it cannot hold",
        "two_d": "has 2 dimensions",
        "four_d": "holds 2 volumes",
        "colours": "holds colours",
        "slab": "a scan has more slices",
        "constant": "one constant intensity",
        "zeros": "holds nothing",
        "singular": "no usable orientation",
        "nowhere": "no orientation (sform and qform are not set)",
        "two_sides": "mirror each other",
        "outside": "no brain in the field of the atlas grid",
        "many_nan": "brain voxels are not finite",
        "no_brain": "no_brain_brain_mask.nii.gz: empty",
        "inverted": "inverted_brain_mask.nii.gz: marks",
        "labelled": "labelled_lesion.nii.gz: ",
        "head": "not skull-stripped and no brain mask given",
    }
    few = voxels.copy()
    few[tuple(np.argwhere(inside)[len(np.argwhere(inside)) // 2])] = np.inf
    write_nifti(folder / "few_nan.nii.gz", few, affine)
    write_nifti(folder / "few_nan_brain_mask.nii.gz", inside, affine)
    moved = affine + np.array([[0, 0, 0, 5.0], *[[0] * 4] * 3])
    save(folder / "two_places.nii.gz", voxels, affine, sform=(affine, 1), qform=(moved, 1))
    save(folder / "beside.nii.gz", voxels, affine + 30 * np.eye(4, k=3))
    save(folder / "small.nii.gz", voxels, np.diag([0.75, 0.75, 0.75, 1]) @ affine)
    inverse = np.where(inside, 1.2 - voxels, 0)
    save(folder / "as_t2.nii.gz", inverse, affine)
    flagged = {
        "few_nan": "1 brain voxels were not finite; filled",
        "two_places": "sform and qform differ by up to 5 mm",
        "beside": "lies badly on the atlas",
        "small": "lies badly on the atlas",
        "coarse": "lies badly on the atlas",  # a mask of 12 mm voxels
        "as_t2": "its tissues are not as bright as in a t1 scan, but as in t2",
    }
    scaled = nib.Nifti1Image(np.round(voxels * 1000).astype(np.int16), affine)
    scaled.header.set_slope_inter(0.001, 0)
    nib.save(scaled, folder / "scaled.nii.gz")
    flipped = affine @ np.array([[-1, 0, 0, voxels.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    save(folder / "flipped.nii.gz", voxels[::-1], flipped)
    write_nifti(folder / "a b'c\"d\n\u65e5\u672c/good.nii.gz", voxels, affine)
    write_nifti(folder / "coarse.nii.gz", voxels, affine)
    write_nifti(folder / "coarse_brain_mask.nii.gz", inside[::2, ::2, ::2], affine @ np.diag([2.0, 2, 2, 1]))
    return refused, flagged, ["scaled", "flipped"]


def test_a_folder_of_bad_scans(models, scan, grid_file, tmp_path):
    """Every bad scan has its row and its reason, leaves nothing, and stops nobody."""
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    refused, flagged, fine = bad_scans(folder, scan[0], scan[1])
    use = ("--dataset_dir", folder, "--ckpt_dir", models, "--output_dir", out, "--skull_strip", "none")
    # phantoms have outlines of their own
    # (in bfloat16, which some processors choose, the last bit of an intensity can move a heatmap by a quarter)
    use += ("--alignment", "none", "--bias_field", "none", "--brain_recovery", "none", "--precision", "float32")
    result = run_bundle("inference", "inference", grid_file, *use)
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    with (out / "summary.csv").open(newline="") as table:
        rows = {row["name"].removeprefix("scans_"): row["status"] for row in csv.DictReader(table)}
    strange = "a b'c\"d\n\u65e5\u672c_good"
    assert set(rows) == {*refused, *flagged, *fine, "good", strange}
    for name, reason in refused.items():
        assert rows[name].startswith("failed: ") and reason in rows[name], (name, rows[name])
        assert f"scans_{name}: failed" in result.stderr.splitlines()[-1]
    for name, doubt in flagged.items():
        assert rows[name].startswith("flagged: ") and doubt in rows[name], (name, rows[name])
    assert {rows[n] for n in (*fine, "good", strange)} == {"ok"}, rows
    done = {f.name.removeprefix("scans_"): f for f in out.iterdir() if f.is_dir() and f.name != ".records"}
    assert set(done) == {*flagged, *fine, "good", strange}  # two of one name: with their folders' names before it
    assert {f.name for f in out.rglob(".*")} == {".records"}
    same = ("good", "scaled", "flipped", strange)
    heatmaps = {n: nib.load(done[n] / f"{done[n].name}_heatmap.nii.gz").get_fdata() for n in same}
    for name, heatmap in heatmaps.items():
        straight = heatmap[::-1] if name == "flipped" else heatmap
        np.testing.assert_allclose(straight, heatmaps["good"], atol=0.05 if name == "scaled" else 1e-4)
    record = json.loads((out / "run.json").read_text())["inference"]
    assert record["overrides"]["alignment"] == record["config"]["alignment"] == "none"
    files = {f"{name}_t1.{ending}" for name in ("calibration", "normative") for ending in ("json", "nii.gz")}
    assert set(record["sha256"]) == {"model.pt", *files}
    assert {"bundle", "torch", "monai", "git"} <= set(record["versions"]) and record["machine"]["cores"]


class Code:
    """What a pickle can smuggle in."""

    def __reduce__(self):
        return os.mkdir, ("smuggled",)


def other_network(folder):
    save_weights(PatchLocator(patch_size=12), folder / "model.pt")


def truncated_model(folder):
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:5000])


def code_in_the_model(folder):
    torch.save({"weights": Code()}, folder / "model.pt")


def another_model(folder):
    weights = torch.load(folder / "model.pt", weights_only=True)
    for value in weights.values():
        value += 1
    torch.save(weights, folder / "model.pt")


def older_model(folder):
    """Weights as an earlier version wrote them, which say nothing of their chain, with a calibration of their own."""
    weights = torch.load(folder / "model.pt", weights_only=True)
    torch.save(dict(weights), folder / "model.pt")
    file = folder / "calibration_t1.json"
    content = json.loads(file.read_text())
    content["provenance"]["model_sha256"] = model_hash(folder / "model.pt", "t1")
    file.write_text(json.dumps(content))


def older_calibration(folder):
    file = folder / "calibration_t1.json"
    content = json.loads(file.read_text())
    del content["provenance"]["chain"]
    file.write_text(json.dumps(content))


def truncated_maps(folder):
    file = folder / "calibration_t1.nii.gz"
    file.write_bytes(file.read_bytes()[:5000])


def broken_calibration(folder):
    (folder / "calibration_t1.json").write_text('{"contrast": "t1"')


@pytest.mark.parametrize(
    ("run_id", "break_it", "message"),
    [
        ("inference", other_network, "no weights of the configured PatchLocator"),
        ("calibration", other_network, "no weights of the configured PatchLocator"),
        ("calibration", truncated_model, "no weights of the configured PatchLocator"),
        ("calibration", code_in_the_model, "no weights of the configured PatchLocator"),
        ("evaluation", another_model, "made with another model"),
        ("inference", older_model, "trained by an older version"),
        ("inference", older_calibration, "older version; run the calibration again"),
        ("inference", truncated_maps, "damaged calibration"),
        ("inference", broken_calibration, "cannot be read"),
    ],
)
def test_broken_models_are_refused(models, cohort, grid_file, tmp_path, run_id, break_it, message):
    folder, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(models, folder)
    break_it(folder)
    if break_it is other_network and run_id == "inference":  # whose calibration says that all is well
        (folder / "calibration_t1.json").unlink()
        record = json.loads((models / "calibration_t1.json").read_text())
        record["provenance"]["model_sha256"] = model_hash(folder / "model.pt", "t1")
        (folder / "calibration_t1.json").write_text(json.dumps(record))
    before = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    config = {"inference": "inference", "calibration": "calibrate", "evaluation": "evaluate"}[run_id]
    use = ["--dataset_dir", cohort, "--ckpt_dir", folder]
    use += [] if run_id == "calibration" else ["--output_dir", out]
    result = run_bundle(run_id, config, grid_file, *use, cwd=ROOT)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr.splitlines()[-1], result.stderr
    assert {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()} == before
    assert not list(out.rglob("*.nii.gz")) and not (ROOT / "smuggled").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--device", "cuda"], "device 'cuda': PyTorch"),
        (["--device", "tpu9"], "device 'tpu9' is unknown"),
        (["--spacing", "wide"], "--spacing wide: must be a number, such as 6.0"),
        (["--patch_size", "8.5"], "--patch_size 8.5: must be a whole number"),
        (["--dataset_dir", "2024"], "write ./2024"),
        (["--output_dir", "{file}/out"], "cannot be written"),
        (["--atlas", "nowhere.nii"], "error: nowhere.nii: atlas cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(models, cohort, grid_file, tmp_path, overrides, message):
    if overrides == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has the GPU that is asked for")
    (tmp_path / "file").write_text("")
    overrides = [o.format(file=tmp_path / "file") for o in overrides]
    use = ("--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", tmp_path / "out")
    result = run_bundle("inference", "inference", grid_file, *use, *overrides)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr.splitlines()[-1], result.stderr
    assert not list(tmp_path.rglob("*.nii.gz"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--min_lesions_mm3", "--min_lesion_mm3"), ("--network_def#featurs", "--network_def#features")],
)
def test_a_misspelt_override_ends_the_run(models, cohort, grid_file, tmp_path, typed, meant):
    use = ("--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", tmp_path)
    result = run_bundle("inference", "inference", grid_file, *use, typed, 9)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    told = f"error: {typed}: nothing of that name in the config; did you mean {meant}?"
    assert result.stderr.splitlines()[-1] == told and not list(tmp_path.iterdir())


def test_what_is_not_ours_stays_and_what_is_old_goes(models, cohort, grid_file, tmp_path):
    """Results beside scans in folders of their names; one scan after the other into one folder; a scan that breaks."""
    (item, other) = json.loads((cohort / "datalist.json").read_text())["test"]
    study, out = tmp_path / "study", tmp_path / "out"
    for name, file in (("a", item["image"]), ("b", other["image"])):
        (study / name).mkdir(parents=True)
        shutil.copy(cohort / file, study / name / f"{name}.nii.gz")
    (study / "a/notes.txt").write_text("of a person")
    before = {f: f.read_bytes() for f in study.rglob("*") if f.is_file()}
    use = ("--ckpt_dir", models, "--alignment", "none", "--skull_strip", "none")
    result = run_bundle("inference", "inference", grid_file, *use, "--dataset_dir", study, "--output_dir", study)
    assert result.returncode == 2 and "would be replaced by results" in result.stderr.splitlines()[-1], result.stderr
    assert {f: f.read_bytes() for f in study.rglob("*") if f.is_file()} == before

    for name in ("a", "b"):
        scan = study / name / f"{name}.nii.gz"
        result = run_bundle("inference", "inference", grid_file, *use, "--dataset_dir", scan, "--output_dir", out)
        assert result.returncode == 0, result.stderr
    with (out / "summary.csv").open() as table:
        assert [(row["name"], row["status"][:4] != "fail") for row in csv.DictReader(table)] == [
            ("a", True),
            ("b", True),
        ]
    assert (out / "a/a_lesion.nii.gz").is_file() and (out / "b/b_lesion.nii.gz").is_file()

    (study / "b/b.nii.gz").write_bytes(b"broken")
    result = run_bundle("inference", "inference", grid_file, *use, "--dataset_dir", study, "--output_dir", out)
    assert result.returncode == 3 and "a: done before" in result.stdout, result.stderr
    assert not (out / "b").exists() and (out / "a/a_lesion.nii.gz").is_file()


def test_a_full_disk_and_a_busy_folder(models, cohort, grid_file, tmp_path):
    """The disk is full after 20 kB a file; then another process holds the folder."""
    files = str([str(ROOT / "configs/inference.json"), str(grid_file)])
    command = [sys.executable, "-m", "monai.bundle", "run", "inference", "--config_file", files]
    command += ["--dataset_dir", cohort, "--ckpt_dir", models, "--output_dir", tmp_path]
    result = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if "COVERAGE" not in name},  # it could not write either
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "cannot be written (File too large); make room" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.nii.gz")) and not list(tmp_path.rglob(".*"))
    hold = "import sys, bundle.data as data; data.claim_folder(sys.argv[1]); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        refused = run_here(command)
        assert refused.returncode == 2 and "another run is writing there" in refused.stderr.splitlines()[-1], (
            refused.stderr
        )
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before
    finally:
        holder.communicate(b"\n")
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": 3}, "has no path called 'image'"),
        ({"label": "gone.nii.gz"}, "gone.nii.gz: not found"),
        ({"label": ["a", "b"]}, "'label' must be one path"),
        ({"contrast": 1}, "'contrast' must be text, not 1"),
        ({"to_atlas": [[1, 2]]}, "'to_atlas' must be a 4x4 matrix"),
        ({"ignored_labels": "all"}, "'ignored_labels' must be a list of numbers"),
        ({"fusion_maps": ["x"]}, "'fusion_maps' must give a path for each name"),
    ],
)
def test_wrong_types_in_a_datalist(models, cohort, grid_file, tmp_path, entry, message):
    item = json.loads((cohort / "datalist.json").read_text())["test"][0]
    item |= {k: str(cohort / item[k]) for k in ("image", "brain_mask", "label")}
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{**item, "lable": "x", **entry}]}))
    use = ("--dataset_dir", tmp_path, "--ckpt_dir", models, "--output_dir", tmp_path / "out")
    result = run_bundle("evaluation", "evaluate", grid_file, *use)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr.splitlines()[-1] and not (tmp_path / "out").exists()


def test_labels_of_other_values_and_grids_and_unknown_keys(models, cohort, grid_file, tmp_path):
    """A label of 0 and 4 on finer voxels measures as one of 0 and 1 on the scan's; a misspelt key is told."""
    item = json.loads((cohort / "datalist.json").read_text())["test"][0]
    item |= {k: str(cohort / item[k]) for k in ("image", "brain_mask", "label")}
    label = nib.load(item["label"])
    finer = np.kron(label.get_fdata() * 4, np.ones((2, 2, 2)))
    affine = label.affine @ np.array([[0.5, 0, 0, -0.25], [0, 0.5, 0, -0.25], [0, 0, 0.5, -0.25], [0, 0, 0, 1]])
    other = {**item, "label": str(write_nifti(tmp_path / "label.nii.gz", finer, affine)), "lable": "x", "subject": "b"}
    other["image"] = str(shutil.copy(item["image"], tmp_path / "same.nii.gz"))
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [item, other]}))
    use = ("--dataset_dir", tmp_path, "--ckpt_dir", models, "--output_dir", tmp_path / "out")
    result = run_bundle("evaluation", "evaluate", grid_file, *use)
    assert result.returncode == 0, result.stderr
    assert "unknown key 'lable', not used; did you mean 'label'?" in result.stderr
    one, two = json.loads((tmp_path / "out/metrics.json").read_text())["cases"].values()
    assert one["fusion"]["auprc"] == pytest.approx(two["fusion"]["auprc"], abs=0.02)
