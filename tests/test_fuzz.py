"""Random damage to headers and lists: an answer or an `InputError`, within seconds and without a heap of memory."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import time
import warnings

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Orientationd

from bundle.data import evaluation_items, list_scans
from bundle.errors import InputError, find_input_error
from bundle.transforms import BrainMaskd, LoadScand, NormalizeBrainIntensityd, ResampleToGridd
from tests.conftest import CENTER, GRID, ellipsoid, write_nifti, write_scan

SECONDS = float(os.environ.get("FUZZ_SECONDS", "4"))  # per test
HANG = 20  # seconds that one input may take


@pytest.fixture
def no_hang():
    def give_up(*_):
        raise TimeoutError("one input took too long")

    before = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fuzz(tmp_path, damage, use, what):
    """Damage and use for `SECONDS`; anything but success or an `InputError` of one line fails, with its seed."""
    refused, answered, number, end = 0, 0, 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        number += 1
        damage(np.random.default_rng(number))
        signal.alarm(HANG)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use()
            answered += 1
        except Exception as error:
            known = find_input_error(error)
            assert known is not None and "\n" not in known.message, f"{what} {number}: {error!r}"
            refused += 1
        finally:
            signal.alarm(0)
    print(f"{what}: {number} inputs, {refused} refused, {answered} answered, {SECONDS:.0f} s")
    assert refused and answered


def test_damaged_headers(tmp_path, no_hang):
    """Bytes of the NIfTI header overwritten, from one to twenty, in a plain or a packed file, sometimes cut short."""
    brain = ellipsoid((24, 28, 12), (9, 11, 5)) * (1 + np.random.rand(24, 28, 12))
    good = nib.load(write_nifti(tmp_path / "good.nii", brain, np.diag([6.0, 6, 6, 1]))).to_bytes()
    chain = [
        LoadScand(["image"]),
        Orientationd("image", axcodes="RAS", labels=None),
        BrainMaskd(method="none"),
        ResampleToGridd("image", GRID["spacing"], GRID["spatial_size"], CENTER),
        NormalizeBrainIntensityd("image"),
    ]
    file = tmp_path / "scan.nii"

    def damage(rng):
        content = bytearray(good)
        for place in rng.integers(0, 352, rng.integers(1, 20)):
            content[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        if rng.random() < 0.1:
            content = content[: rng.integers(len(content))]
        file.write_bytes(content)

    def use():
        data = {"image": str(file)}
        for step in chain:
            data = step(data)
        assert np.isfinite(data["image"].numpy()).all()

    fuzz(tmp_path, damage, use, "headers")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6  # kB


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_damaged_headers_of_itk(tmp_path, no_hang, ending):
    """Characters of a header of text overwritten: what reads them is compiled, and would take us all down with it."""
    file = write_scan(tmp_path, "scan", ending, np.random.rand(24, 28, 12), np.diag([6.0, 6, 6, 1]))
    good = file.read_bytes()
    length = good.index(b"\n\n" if ending == "nrrd" else b"LOCAL")

    def damage(rng):
        content = bytearray(good)
        for place in rng.integers(0, length, rng.integers(1, 6)):
            content[place] = rng.choice([10, 32, 45, 48, 57, 127, rng.integers(256)])
        file.write_bytes(content if rng.random() > 0.1 else content[: rng.integers(len(content))])

    fuzz(tmp_path, damage, lambda: LoadScand("image")({"image": str(file)}), f"{ending} headers")


def test_damaged_lists(cohort, tmp_path, no_hang):
    """Values of ``datalist.json`` replaced, keys removed or added, at any depth; sometimes the text itself is cut."""
    good = json.loads((cohort / "datalist.json").read_text())
    for items in good.values():
        for item in items:
            item.update({k: str(cohort / v) for k, v in item.items() if k in ("image", "brain_mask", "label")})
            item["to_atlas"] = np.eye(4).tolist()
            item["source"] = {"image": item["image"]}
    good["tuning"] = copy.deepcopy(good["test"][:1])
    strange = [
        None,
        True,
        0,
        -1.5,
        1e400,
        "",
        "\0",
        "../..",
        "t9",
        [],
        [1],
        {},
        {"image": 1},
        [[]],
        "\ud800",
        "x" * 5000,
    ]
    file = tmp_path / "datalist.json"

    def places(thing, path=()):
        yield path
        for key in thing if isinstance(thing, dict) else range(len(thing)) if isinstance(thing, list) else ():
            yield from places(thing[key], (*path, key))

    def damage(rng):
        content = copy.deepcopy(good)
        for _ in range(rng.integers(1, 4)):
            (*path, last) = (everywhere := [p for p in places(content) if p])[rng.integers(len(everywhere))]
            parent = content
            for key in path:
                parent = parent[key]
            value = strange[rng.integers(len(strange))]
            if rng.random() < 0.2 and isinstance(parent, dict):
                parent[str(value)[:9]] = parent.pop(last)
            else:
                parent[last] = value
        text = json.dumps(content)
        file.write_text(text[: rng.integers(len(text))] if rng.random() < 0.05 else text)

    def use():
        for item in list_scans(tmp_path, contrast="t1") + evaluation_items(
            tmp_path, "test", "t1", healthy_dir=tmp_path
        ):
            assert item["name"] and os.path.isfile(item["image"])  # noqa: PTH113

    fuzz(tmp_path, damage, use, "lists")


def test_the_fuzz_would_tell():
    with pytest.raises(AssertionError, match="KeyError"):
        fuzz(None, lambda rng: None, lambda: {}["nothing"], "nothing")
    with pytest.raises(InputError):
        raise InputError("one line")
