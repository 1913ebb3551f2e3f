"""Runs that are killed at random moments end, started again, as if nobody had touched them."""

from __future__ import annotations

import csv
import json
import os
import random
import time

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.conftest import run_bundle, write_nifti

KILLS = int(os.environ.get("KILLS", "2"))  # of each kind of run; docs/reproduce.md tells of ten
EPOCHS, SCANS = 10 + 20 * KILLS, 4 + 2 * KILLS  # enough to be met at work each time


def finish_after_kills(launch, folder, seconds, *command, options=((),)):
    """Run, kill after a random part of ``seconds`` from the first sign of life in ``folder``, `KILLS` times (each with
    the next of ``options``); then run to the end. Returns the number of kills that met a running process.
    """
    random.seed(len(command[0]))
    met = 0
    for number in range(KILLS):
        process = launch(*command, *options[number % len(options)])
        there = set(folder.rglob("*")) if folder.exists() else set()
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if folder.exists() and set(folder.rglob("*")) - there:
                break
            time.sleep(0.05)
        time.sleep(random.random() * seconds)
        met += process.is_alive()
        process.kill()
        process.join()
    print(f"{met} of {KILLS} kills met a running {command[0]}")
    process = launch(*command, *options[0])
    process.join()
    assert process.exitcode == 0
    return met


def contents(folder, leave_out=()):
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not {*f.relative_to(folder).parts} & {*leave_out})
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_a_training_that_is_killed_ends_with_the_same_weights(cohort, grid_file, launch, tmp_path):
    use = ("--dataset_dir", cohort, "--max_epochs", EPOCHS, "--val_interval", 2, "--resume", "auto", "--ckpt_dir")
    whole = run_bundle("training", "train", grid_file, *use, tmp_path / "whole", fresh=True)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert finish_after_kills(launch, tmp_path / "cut", 1, "training", "train", *use, tmp_path / "cut") > 0
    names = [f"checkpoints/model_epoch={n}.pt" for n in (EPOCHS - 4, EPOCHS - 2, EPOCHS)]
    ends = [torch.load(tmp_path / run / names[-1], weights_only=True) for run in ("whole", "cut")]
    for key, value in ends[0]["network"].items():
        assert torch.equal(value, ends[1]["network"][key]), key
    assert ends[0]["best"] == ends[1]["best"] and ends[0]["lr_scheduler"] == ends[1]["lr_scheduler"]
    for folder in ("whole", "cut"):
        assert set(contents(tmp_path / folder)) == {
            "model.pt",
            "normative_t1.json",
            "normative_t1.nii.gz",
            "run.json",
            *names,
        }
    assert (tmp_path / "whole/model.pt").read_bytes() == (tmp_path / "cut/model.pt").read_bytes()


def test_an_inference_that_is_killed_leaves_the_same_files(models, cohort, grid_file, launch, tmp_path):
    item = json.loads((cohort / "datalist.json").read_text())["test"][0]
    image = nib.load(cohort / item["image"])
    for number in range(SCANS):
        voxels = image.get_fdata() * (1 + 0.01 * number * (np.arange(image.shape[2]) % 3))
        write_nifti(tmp_path / f"scans/{number}.nii.gz", voxels, image.affine)
    use = ("--dataset_dir", tmp_path / "scans", "--ckpt_dir", models, "--alignment", "none", "--output_dir")
    assert run_bundle("inference", "inference", grid_file, *use, tmp_path / "whole", fresh=True).returncode == 0
    assert finish_after_kills(launch, tmp_path / "cut", 1, "inference", "inference", *use, tmp_path / "cut") > 0
    own = ("summary.csv", "run.json", ".records")  # seconds, and the name of the output folder
    assert contents(tmp_path / "cut", own) == contents(tmp_path / "whole", own)
    tables = []
    for run in ("whole", "cut"):
        with (tmp_path / run / "summary.csv").open() as table:
            tables.append(sorted(tuple(v for k, v in row.items() if k != "seconds") for row in csv.DictReader(table)))
    assert tables[0] == tables[1] and len(tables[0]) == SCANS


def test_a_preparation_that_is_killed_leaves_the_same_files(cohort, grid_file, launch, tmp_path):
    lists = json.loads((cohort / "datalist.json").read_text())
    for item in lists["training"]:
        image = nib.load(cohort / item["image"])
        write_nifti(tmp_path / f"raw/{item['subject']}.nii.gz", image.get_fdata(), image.affine)
    use = ("--source_dir", tmp_path / "raw", "--dataset", "folder", "--bias_field", "none", "--dataset_dir")
    recipe = tmp_path / "datasets/folder.yaml"
    recipe.parent.mkdir()
    recipe.write_text("images: {t1: '{subject}.nii.gz'}\nalignment: none\nsplits: {training: rest}\n")
    use = ("--recipe#folder", recipe.parent, *use)
    whole = run_bundle("preparation", "prepare", grid_file, *use, tmp_path / "whole", fresh=True)
    assert whole.returncode == 0, whole.stderr[-2000:]
    workers = (("--num_workers", 0), ("--num_workers", 1))  # the work is in the process that is killed, or in another
    command = ("preparation", "prepare", *use, tmp_path / "cut")
    assert finish_after_kills(launch, tmp_path / "cut", 1.5, *command, options=workers) > 0
    assert contents(tmp_path / "cut", ("run.json",)) == contents(tmp_path / "whole", ("run.json",))


def test_a_loss_that_is_no_number_stops_the_training(cohort, grid_file, tmp_path):
    use = ("--dataset_dir", cohort, "--ckpt_dir", tmp_path, "--max_epochs", 6, "--val_interval", 1)
    result = run_bundle("training", "train", grid_file, *use, "--learning_rate", 1e30)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-2000:]
    told = result.stderr.splitlines()[-1]
    names = [item["subject"] for item in json.loads((cohort / "datalist.json").read_text())["training"]]
    assert "the loss became" in told and "at step" in told and "--resume auto" in told
    assert all(name in told for name in names)
    for file in tmp_path.rglob("*.pt"):
        state = torch.load(file, weights_only=True)
        weights = state.get("network", state)
        assert all(bool(torch.isfinite(v.float()).all()) for v in weights.values())


@pytest.mark.parametrize("run_id", ["training"])
def test_the_same_seed_gives_the_same_weights(cohort, grid_file, tmp_path, run_id):
    use = ("--dataset_dir", cohort, "--max_epochs", 2, "--val_interval", 1, "--ckpt_dir")
    for run, seed in (("one", 3), ("two", 3), ("other", 4)):
        fresh = run == "one"  # where Python's hashes have another seed than here
        result = run_bundle(run_id, "train", grid_file, *use, tmp_path / run, "--seed", seed, fresh=fresh)
        assert result.returncode == 0, result.stderr[-2000:]
    models = [(tmp_path / run / "model.pt").read_bytes() for run in ("one", "two", "other")]
    assert models[0] == models[1] != models[2]
    record = json.loads((tmp_path / "one/run.json").read_text())["training model"]
    assert record["config"]["seed"] == 3 and record["config"]["max_epochs"] == 2
