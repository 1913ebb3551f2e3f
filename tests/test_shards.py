"""A run in shards, in any order, some killed and run again, leaves the bytes of a run in one piece."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import time

import nibabel as nib
import numpy as np
import pytest

from bundle.data.files import claim_folder, release_claims
from bundle.errors import InputError
from bundle.parallel import Shard, share
from bundle.shards import Records, from_bytes, scan_facts, to_bytes
from tests.conftest import run_bundle, write_nifti

# rounds of four shards, two of which are killed; docs/reproduce.md tells of five. Else two shards and one kill, once
ROUNDS = int(os.environ.get("SHARD_ROUNDS", "0"))
SHARDS, KILLS = (4, 2) if ROUNDS else (2, 1)


def test_every_scan_belongs_to_one_shard(monkeypatch):
    parts = [share(range(10), f"{k}/4") for k in (1, 2, 3, 4)]
    assert sorted(k for part in parts for k in part) == list(range(10)) and parts[2] == [2, 6]
    assert share("abc", "") == list("abc") and share("abc", "5/7") == [] and str(Shard.of("03/40")) == "3/40"
    for wrong in ("torchrun", "0/4", "5/4", "x", "3", "1/0", "-1/4", "1/4/2"):
        with pytest.raises(InputError, match="such as 3/40"):
            Shard.of(wrong)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert str(Shard.of("torchrun")) == "3/4"


@pytest.mark.parametrize("config", ["prepare", "inference", "calibrate", "evaluate"])
def test_a_wrong_shard_ends_in_one_line(cohort, grid_file, tmp_path, config):
    names = {"prepare": "preparation", "inference": "inference", "calibrate": "calibration", "evaluate": "evaluation"}
    use = ("--source_dir", cohort, "--dataset", "folder") if config == "prepare" else ()
    result = run_bundle(names[config], config, grid_file, *use, "--dataset_dir", cohort, "--shard", "5/4")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: --shard 5/4: name a part")
    assert "Traceback" not in result.stderr


def test_a_folder_is_shared_by_the_shards_of_one_run_only(tmp_path):
    def claim(shard):
        """By another process, which leaves when it is told to."""
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, shard, theirs))
        process.start()
        return ours.recv(), ours, process

    holders = [claim("1/3"), claim("2/3")]
    assert [told for told, *_ in holders] == ["", ""]
    (tmp_path / ".partial-1").write_text("of a shard at work, for all we know")
    assert all("another run is writing there" in claim(other)[0] for other in ("1/3", "3/4", ""))
    claim_folder(tmp_path, Shard.of("3/3"))
    holders[0][2].kill()
    holders[1][1].send("leave")
    for *_, process in holders:
        process.join()
    assert (tmp_path / ".partial-1").exists()
    release_claims()  # the last one clears up
    assert list(tmp_path.iterdir()) == []


def hold(folder, shard, pipe):
    release_claims.__globals__["_claims"].clear()
    try:
        release_claims.__globals__["_PATIENCE"] = 1
        claim_folder(folder, Shard.of(shard))
    except InputError as error:
        pipe.send(error.message)
        return
    pipe.send("")
    pipe.recv()
    release_claims()


def test_records_come_back_as_they_were(tmp_path):
    content = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "b": [1, None, {"c": np.float64(0.1)}],
        "d": float("nan"),
    }
    back = from_bytes(to_bytes(content))
    assert back["a"].dtype == np.int16 and (back["a"] == content["a"]).all() and to_bytes(back) == to_bytes(content)
    assert back["b"] == [1, None, {"c": 0.1}] and np.isnan(back["d"])
    file = write_nifti(tmp_path / "a.nii.gz", np.ones((2, 2, 2)))
    items = [{"name": "a", "image": str(file)}, {"name": "b"}]

    def records(**told):
        return Records(tmp_path / "out", items, "1/2", made_from=told)

    records(x=1).write(items[0], {"y": 2})
    assert records(x=1).read(items[0]) == {"y": 2} and records(x=1).to_do() == [] and records(x=1).all() is None
    assert records(x=2).read(items[0]) is None  # of a run that was told something else
    next((tmp_path / "out/.records").iterdir()).write_bytes(b"damaged")
    assert records(x=1).to_do() == items[:1]
    records(x=1).write(items[0], {"failure": "out of memory"})
    assert records(x=1).to_do() == items[:1]
    records(x=1).write(items[1], {"y": 3})
    assert records(x=1).all() == [{"failure": "out of memory"}, {"y": 3}]
    write_nifti(file, np.zeros((3, 2, 2)))
    assert records(x=1).read(items[0]) is None  # another scan of the same name


def test_a_scan_of_several_files_is_another_when_one_of_them_is(tmp_path):
    for name in ("series/1.dcm", "series/2.dcm", "a.hdr", "a.img", "b.mhd", "b.raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"before")
    for image, part in (("series", "series/2.dcm"), ("a.img", "a.hdr"), ("b.mhd", "b.raw")):
        scan = {"name": "a", "image": str(tmp_path / image)}
        before, folder = scan_facts(scan), (tmp_path / part).parent.stat()
        (tmp_path / part).write_bytes(b"change")
        os.utime(tmp_path / part, (2e9, 2e9))
        os.utime((tmp_path / part).parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))
        assert before["image"] != scan_facts(scan)["image"] and len(before["image"]) == 3
    assert scan_facts({"image": str(tmp_path / "gone")}) == {}


def contents(folder):
    """Of every file; but not the seconds that a scan took: in the table and in inference's records."""
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    found = {name: f.read_bytes() for name, f in files.items() if ".records" not in f.parts}
    if "summary.csv" in found:
        rows = csv.DictReader(found["summary.csv"].decode().splitlines())
        found["summary.csv"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return found


def compare(launch, out, *command):
    """Run in one piece; then in shards at the same time, some of which are killed at random moments and run again."""
    whole = launch(*command)
    seconds = wait_for(whole, out / ".lock")
    whole.join()
    assert whole.exitcode == 0
    seconds, expected, met = time.monotonic() - seconds, contents(out), 0
    assert expected
    chance = random.Random(command[0])
    for _ in range(ROUNDS or 1):
        empty(out)
        numbers = chance.sample(range(1, SHARDS + 1), SHARDS)
        running = {k: launch(*command, "--shard", f"{k}/{SHARDS}") for k in numbers}
        killed = chance.sample(numbers, KILLS)
        for k in killed:
            wait_for(running[k], out / f".shard-{k}-of-{SHARDS}.lock")
            time.sleep(chance.uniform(0, seconds / 2))
            met += running[k].is_alive()
            running[k].kill()
        for process in running.values():
            process.join()
        assert all(running[k].exitcode == 0 for k in numbers if k not in killed)
        done = [k for k in numbers if k not in killed][:1] if ROUNDS else []  # one once more
        for k in chance.sample([*killed, *done], len(killed) + len(done)):
            again = launch(*command, "--shard", f"{k}/{SHARDS}")
            again.join()
            assert again.exitcode == 0
        found = contents(out)
        assert set(found) == set(expected)
        assert [name for name in expected if found[name] != expected[name]] == []
    print(f"{met} of {KILLS * (ROUNDS or 1)} kills met a running {command[0]}, {SHARDS} shards")


def wait_for(process, lock):
    """Until a run begins to write, or has ended; returns when that was."""
    while process.is_alive() and not lock.exists():
        time.sleep(0.01)
    return time.monotonic()


def empty(folder):
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


def test_inference(launch, models, cohort, tmp_path):
    item = json.loads((cohort / "datalist.json").read_text())["test"][0]
    image = nib.load(cohort / item["image"])
    for number in range(7):
        voxels = image.get_fdata() * (1 + 0.01 * number * (np.arange(image.shape[2]) % 3))
        write_nifti(tmp_path / f"scans/{number}.nii.gz", voxels, image.affine)
    use = ("--dataset_dir", tmp_path / "scans", "--ckpt_dir", models, "--alignment", "none", "--output_dir")
    compare(launch, tmp_path / "out", "inference", "inference", *use, tmp_path / "out")
    assert len(contents(tmp_path / "out")["summary.csv"]) == 7


def test_preparation(launch, cohort, tmp_path):
    lists = json.loads((cohort / "datalist.json").read_text())
    for item in lists["training"]:
        image = nib.load(cohort / item["image"])
        write_nifti(tmp_path / f"raw/{item['subject']}.nii.gz", image.get_fdata(), image.affine)
    recipe = tmp_path / "datasets/folder.yaml"
    recipe.parent.mkdir()
    recipe.write_text("images: {t1: '{subject}.nii.gz'}\nalignment: none\nsplits: {training: rest}\n")
    use = ("--source_dir", tmp_path / "raw", "--dataset", "folder", "--recipe#folder", recipe.parent)
    use += ("--bias_field", "none", "--num_workers", 0, "--dataset_dir")
    compare(launch, tmp_path / "out", "preparation", "prepare", *use, tmp_path / "out")
    assert len(json.loads((tmp_path / "out/datalist.json").read_text())["training"]) == 6


def test_evaluation(launch, models, cohort, tmp_path):
    use = ("--dataset_dir", cohort, "--healthy_dir", cohort, "--healthy_section", "training", "--ckpt_dir", models)
    compare(launch, tmp_path / "out", "evaluation", "evaluate", *use, "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["healthy_cases"] == 6


def test_calibration(launch, models, cohort, tmp_path):
    """With the embedding, which one shard fits for all."""
    (tmp_path / "out").mkdir()
    use = ("--dataset_dir", cohort, "--ckpt_dir", models, "--section", "training", "--with_embedding", "True")
    use += ("--embedding_path", tmp_path / "out/embedding_t1.json")
    compare(launch, tmp_path / "out", "calibration", "calibrate", *use, "--calibration_file", tmp_path / "out/c.json")
