"""Two Gloo processes on the CPU, started by torchrun as users start them on GPUs."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from bundle.errors import InputError
from bundle.parallel import gather, is_main, join_processes, local_device, share_out
from tests.conftest import ROOT, run_bundle


def torchrun(run_id, config, overlay, grid_file, *overrides):
    files = f"['{ROOT}/configs/{config}.json','{ROOT}/configs/{overlay}.json','{grid_file}']"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "monai.bundle",
    ]
    command += ["run", run_id, "--config_file", files, *map(str, overrides)]
    use = {"cwd": ROOT, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}  # two GPUs are rarer than two processes
    result = subprocess.run(command, **use, capture_output=True, text=True, timeout=900)
    if "terminate called without an active exception" in result.stderr:  # torch's threads, rarely, as a process ends
        result = subprocess.run(command, **use, capture_output=True, text=True, timeout=900)
    return result


def curve(result, name):
    assert result.returncode == 0, result.stderr[-3000:]
    return [float(v) for v in re.findall(rf"Metrics --.*{name}: ([0-9.eE+-]+)", result.stdout + result.stderr)]


def figures(report, path=()):
    """A nested report as {path: figure}, which pytest.approx can compare."""
    parts = report.items() if isinstance(report, dict) else enumerate(report) if isinstance(report, list) else None
    if parts is None:
        return {path: report}
    return {k: v for key, part in parts for k, v in figures(part, (*path, key)).items()}


@pytest.fixture(scope="module")
def trained(cohort, grid_file, tmp_path_factory):
    """The same training by one process and by two with half the batch each; slices are not drawn but evenly spread."""
    folder = tmp_path_factory.mktemp("parallel")
    use = ["--dataset_dir", cohort, "--max_epochs", 4, "--val_interval", 1, "--dense_sampler#random_offset", "False"]
    use += ["--train#slices#_target_", "bundle.transforms.AxialSlicesd", "--augmentation", "[]"]
    one = ["--ckpt_dir", folder / "one", "--subjects_per_batch", 6, "--train#dataloader#shuffle", "False"]
    two = ["--ckpt_dir", folder / "two", "--subjects_per_batch", 3, "--train#dataloader#sampler#shuffle", "False"]
    return (
        run_bundle("training", "train", grid_file, *use, *one),
        torchrun("training", "train", "multi_gpu_train", grid_file, *use, *two),
        folder,
    )


def test_two_processes_learn_as_one_with_twice_the_batch(trained):
    alone, together, folder = trained
    for name, tolerance in (("train_loss", 0.05), ("localisation_error_mm", 0.05)):
        expected, found = curve(alone, name), curve(together, name)
        assert len(expected) == 4 and len(found) == 4  # the second process keeps quiet
        np.testing.assert_allclose(found, expected, rtol=tolerance)
    assert curve(together, "train_loss")[-1] < curve(together, "train_loss")[0]
    states = [torch.load(folder / n / "model.pt", weights_only=True) for n in ("one", "two")]
    assert states[0].keys() == states[1].keys()  # a flat model, whoever trained it


def test_evaluation_by_two_processes_is_that_of_one(trained, cohort, grid_file, tmp_path):
    folder = trained[2] / "one"
    use = ["--dataset_dir", cohort, "--ckpt_dir", folder]
    result = run_bundle("calibration", "calibrate", grid_file, *use, fresh=True)  # by a new process, once
    assert result.returncode == 0, result.stderr
    assert run_bundle("evaluation", "evaluate", grid_file, *use, "--output_dir", tmp_path / "one").returncode == 0
    for run_id, config in (("evaluation", "evaluate"), ("inference", "inference")):
        result = torchrun(run_id, config, "multi_gpu_inference", grid_file, *use, "--output_dir", tmp_path / "two")
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    for part in ("cases", "methods"):
        assert figures(two[part]) == pytest.approx(figures(one[part]), abs=1e-4)  # rounding moves voxels between bins
    with (tmp_path / "two/summary.csv").open() as table:
        assert {row["name"]: row["status"] for row in csv.DictReader(table)} == dict.fromkeys(one["cases"], "ok")


def test_one_process_needs_no_group(monkeypatch):
    assert is_main() and gather([1, 2]) == [1, 2] and local_device().type in ("cpu", "cuda")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="torchrun"):
        join_processes()


def test_more_processes_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"process 2 has no GPU.*--nproc_per_node=1"):
        local_device()


def test_processes_that_wait_for_each_other_need_a_scan_each(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    assert list(share_out(range(8), each=True)) == [2, 5] and list(share_out(range(2))) == []
    with pytest.raises(InputError, match=r"3 processes, but 2 scans in 'validation'.*--nproc_per_node=2"):
        share_out(range(2), each=True)
