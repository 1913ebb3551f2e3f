"""Load: many scans in one run, or one very large scan. Prints memory, open files and throughput.

    python scripts/load.py --scans 200               # copies of a phantom on a coarse grid; workers 0 and 2
    python scripts/load.py --volume 512 512 400      # peak memory of one whole head
    python scripts/load.py --heads FLAIR.nii.gz      # scans per minute and core, with workers and with shards

Linux only: memory and file handles are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml
from nilearn.datasets import load_mni152_template
from scipy import ndimage

from bundle.data.phantom import make_cohort

ROOT = Path(__file__).resolve().parents[1]
GRID = {"spacing": 6.0, "spatial_size": [32, 32, 16], "patch_size": 8, "min_lesion_mm3": 0.0}


def runner(run_id: str, config: str, *overrides: object) -> list[str]:
    """Command line of MONAI's runner."""
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", config]
    return [*command, *map(str, overrides)]


def watch(command: list[str], summary: Path) -> tuple[np.ndarray, float, int]:
    """Run it; returns rows of (scans done, memory MiB, open files), the seconds it took and its peak memory, MiB."""
    begun, rows, peak = time.monotonic(), [], 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident, peak = (int(status.split(f"{key}:")[1].split()[0]) // 1024 for key in ("VmRSS", "VmHWM"))
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
            done = summary.read_text().count("\n") - 1 if summary.is_file() else 0
            rows.append((done, resident, files))
        except (OSError, IndexError):
            pass  # it has just ended
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}")
    return np.array(rows), time.monotonic() - begun, peak


def many(number: int, folder: Path) -> None:
    """``number`` copies of a phantom, one run; without workers and with two."""
    cohort, models = folder / "cohort", folder / "models"
    subjects = {"training": 4, "validation": 1, "calibration": 4, "test": 1}
    make_cohort(cohort, subjects, 6.0, [32, 32, 16], (0.0, -17.0, 5.0), radii_mm=(14.0, 20.0))
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    files = {name: f"['configs/{name}.json','{folder / 'grid.yaml'}']" for name in ("train", "calibrate", "inference")}
    use = ("--ckpt_dir", models, "--dataset_dir")
    for run_id, name, *more in (("training", "train", "--max_epochs", "1"), ("calibration", "calibrate")):
        command = runner(run_id, files[name], *use, cohort, *more)
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (item,) = json.loads((cohort / "datalist.json").read_text())["test"]
    (folder / "scans").mkdir()
    for k in range(number):
        shutil.copy(cohort / item["image"], folder / f"scans/{k:04d}.nii.gz")
    for workers in (0, 2):
        out = folder / f"out{workers}"
        options = ("--output_dir", out, "--alignment", "none", "--num_workers", workers)
        command = runner("inference", files["inference"], *use, folder / "scans", *options)
        rows, seconds, peak = watch(command, out / "summary.csv")
        late = rows[rows[:, 0] >= number // 5]  # caches are full by then
        slope = np.polyfit(late[:, 0], late[:, 1], 1)[0]
        half = rows[:, 0] > number // 2
        most = [rows[part, 2].max() for part in (~half, half)]
        growth = f"memory {slope:+.3f} MiB a scan, " if number >= 50 else ""  # of few scans it tells of the start alone
        print(
            f"{number} scans, {workers} workers: {seconds:.0f} s ({number / seconds:.1f} scans a second), peak {peak} "
            f"MiB, {growth}open files at most {most[0]}, in the second half {most[1]}"
        )


def large(shape: list[int], folder: Path) -> None:
    """One whole head of ``shape`` voxels through the shipped weights."""
    template = load_mni152_template(resolution=1)
    array = ndimage.zoom(np.asarray(template.dataobj, np.float32), np.divide(shape, template.shape), order=1)
    affine = template.affine @ np.diag([*np.divide(template.shape, array.shape), 1.0])
    head = np.clip(array, 0, None) * 1000 + np.random.default_rng(0).integers(1, 20, array.shape, dtype=np.int16)
    nib.save(nib.Nifti1Image(head.astype(np.int16), affine), folder / "large.nii.gz")
    del array, head
    command = runner(
        *("inference", "configs/inference.json", "--dataset_dir", folder / "large.nii.gz"),
        *("--output_dir", folder / "out", "--alignment", "affine"),
    )
    _, seconds, peak = watch(command, folder / "out/summary.csv")
    print(f"{'x'.join(map(str, shape))} voxels: {seconds:.0f} s, peak {peak} MiB")
    print((folder / "out/summary.csv").read_text().splitlines()[-1])


def heads(scans: list[str], copies: int, folder: Path) -> None:
    """Scans per minute of a folder of heads through the shipped weights, on one core and on all.

    What counts is the time from the first scan's results to the last one's (of shards: of both, to the end), without
    the start; memory is that of all processes, what they share counted once.
    """
    for k in range(copies):
        for n, scan in enumerate(scans):
            (folder / f"heads/{k}_{n}.nii.gz").parent.mkdir(exist_ok=True)
            (folder / f"heads/{k}_{n}.nii.gz").symlink_to(Path(scan).resolve())
    every, spent = sorted(os.sched_getaffinity(0)), 0.0
    for cores, workers, shards in (
        (1, 0, 1),
        (len(every), 0, 1),
        (len(every), 1, 1),
        (len(every), 2, 1),
        (len(every), 0, 2),
    ):
        out = folder / f"out_{cores}_{workers}_{shards}"
        use = ("--dataset_dir", folder / "heads", "--output_dir", out, "--num_workers", workers)
        commands = [
            runner("inference", "configs/inference.json", *use, *(("--shard", f"{k}/{shards}") if shards > 1 else ()))
            for k in range(1, shards + 1)
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(len(every[:cores]) // shards or 1)}
        os.sched_setaffinity(0, every[:cores])
        running = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment) for c in commands]
        times: dict[str, float] = {}
        peak = 0.0
        while any(process.poll() is None for process in running):
            for done in out.glob("*/*_heatmap.nii.gz"):
                times.setdefault(done.name, time.monotonic())
            peak = max(peak, sum(proportional_mib(process.pid) for process in running))
            time.sleep(0.2)
        if any(process.returncode for process in running):
            raise SystemExit("a run failed")
        os.sched_setaffinity(0, every)
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        seen = sorted(times.values())
        rate = (len(seen) - shards) / (seen[-1] - seen[shards - 1]) * 60
        before, spent = spent, cpu.ru_utime + cpu.ru_stime
        print(
            f"{cores} cores, {workers} workers, {shards} shards: {rate:.1f} scans a minute, "
            f"{(spent - before) / len(seen):.0f} core seconds a scan, start included, peak {peak:.0f} MiB",
            flush=True,
        )


def proportional_mib(pid: int) -> float:
    """Memory of a process and its children, pages that several have divided among them."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(pages.split("Pss:")[1].split()[0]) / 1024 + sum(proportional_mib(int(c)) for c in children)
    except (OSError, IndexError):
        return 0.0  # it has just ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=0)
    parser.add_argument("--volume", type=int, nargs=3)
    parser.add_argument("--heads", nargs="+")
    parser.add_argument("--copies", type=int, default=6)
    arguments = parser.parse_args()
    if not arguments.scans and not arguments.volume and not arguments.heads:
        parser.error("name what to load: --scans N, --volume X Y Z, --heads FILE")
    for scan in arguments.heads or ():
        if not Path(scan).exists():
            parser.error(f"{scan}: not found; --heads takes scans of whole heads")
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.scans:
            many(arguments.scans, Path(temporary))
        if arguments.volume:
            large(arguments.volume, Path(temporary))
        if arguments.heads:
            heads(arguments.heads, arguments.copies, Path(temporary))
