"""The scripts, run as users run them."""

import json
import subprocess
import sys
from argparse import Namespace

import nibabel as nib
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from bundle.data.files import write_json
from bundle.errors import InputError
from bundle.scoring import Fusion
from scripts import results_tables
from scripts.choose_fusion import Case, area, choose, combinations
from scripts.lesion_strength import lesion_strengths
from scripts.plant_lesions import chosen_anatomies
from scripts.region_brightness import differences, region_masks
from tests.conftest import ROOT, run_here, write_nifti


def test_benchmark_reports_every_ratio(tmp_path):
    out = tmp_path / "benchmark.json"
    command = [sys.executable, ROOT / "scripts/benchmark.py", "--quick", "--device", "cpu", "--output", out]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert {f"{p}, stride {s}" for p in ("float32", "bfloat16") for s in (1, 2, 4)} == set(report["dense"])
    for row in report["dense"].values():
        assert row["times_faster"] > row["times_faster_brain_only"] > 0 and row["share_of_matmul"] > 0
    assert all(rate > 0 for rate in report["training_patches_per_second"].values())
    assert report["published_whole_slice"] > 0
    assert report["auprc"]["difference"] < 1e-9 and report["peak_memory_gib"] > 0
    assert "share of matmul" in result.stdout


def test_that_lesions_may_lie_in_fluid_is_told(tmp_path, capsys):
    for name, item in (("bare", {}), ("labelled", {"anatomy_label": "a.nii.gz", "person": "p"})):
        write_json(tmp_path / name / "datalist.json", {"test": [{"image": "i.nii.gz", **item}]})
    bare, labelled = (str(tmp_path / name) for name in ("bare", "labelled"))
    own, named, wrong = (Namespace(anatomy_dir=d, label_scheme="dlmuse") for d in ("", labelled, bare))
    assert chosen_anatomies(own, [bare]) is None and "can lie in fluid" in capsys.readouterr().out
    for found in (chosen_anatomies(own, [bare, labelled]), chosen_anatomies(named, [bare])):
        assert found.files == {"p": {f"{labelled}/a.nii.gz"}}
    with pytest.raises(InputError, match="bare: has no anatomical labels"):
        chosen_anatomies(wrong, [labelled])


@pytest.mark.parametrize(("script", "option"), [("benchmark", "--head"), ("load", "--heads")])
def test_a_head_that_is_not_there_takes_one_line(script, option):
    result = run_here([sys.executable, ROOT / f"scripts/{script}.py", option, "nowhere.nii.gz"])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "nowhere.nii.gz" in result.stderr.splitlines()[-1]


def test_the_fusion_of_the_fewest_maps_is_chosen():
    fusions = list(combinations(["a", "b"], [0.5, 1.0], ["sum", "maximum"]))
    texts = [str(fusion) for fusion in fusions]
    assert len(set(texts)) == len(texts) == 8  # two alone; 1:1, 1:0.5 and 0.5:1 by two rules
    assert all(max(fusion.weights.values()) == 1 for fusion in fusions)
    areas = dict.fromkeys(texts, 0.1) | {"sum of 1 a, 0.5 b": 0.5, "sum of 1 b": 0.499, "maximum of 1 a, 1 b": 0.4995}
    assert str(choose(fusions, areas, 0.002)) == "sum of 1 b"
    assert str(choose(fusions, areas, 0.0)) == "sum of 1 a, 0.5 b"


def test_lesions_outside_the_mask_rank_last():
    generator = torch.Generator().manual_seed(0)
    scores, lesion = torch.randn(500, generator=generator), torch.rand(500, generator=generator) < 0.1
    expected = average_precision_score(
        np.append(lesion.numpy(), [True] * 7), np.append(np.where(scores < 0, 0.05 * scores, scores), [-9.0] * 7)
    )
    assert area(Case("a", {"a": scores}, lesion, 7), Fusion("sum", {"a": 1.0})) == pytest.approx(expected)


def test_zscored_gliomas_become_files_of_a_scanner(tmp_path):
    """Ready for `--dataset folder`: what is brain is positive, the order of its brightness and the masks are kept."""
    patient, rng = tmp_path / "brats" / "pat1", np.random.default_rng(0)
    brain = np.zeros((6, 7, 8), np.uint8)
    brain[1:5, 1:6, 1:7] = 1
    image, labels = brain * rng.normal(0, 1, brain.shape), brain * rng.integers(0, 4, brain.shape)
    for name, volume in (("flair_zscored", image), ("brain_mask", brain), ("tumour_labels", labels)):
        write_nifti(patient / f"{name}.nii.gz", volume.astype(np.float32))
    command = [sys.executable, ROOT / "scripts/glioma_scans.py", "--source_dir", tmp_path / "brats"]
    assert run_here([*command, "--output_dir", tmp_path / "out"]).returncode == 0
    scan, mask, lesion = (
        nib.load(tmp_path / f"out/pat1_{n}.nii.gz").get_fdata() for n in ("flair", "brain_mask", "lesion")
    )
    np.testing.assert_allclose(scan, np.where(brain, (image + 6) * 100, 0), rtol=1e-5)
    np.testing.assert_array_equal(mask, brain)
    np.testing.assert_array_equal(lesion, labels > 0)
    empty = run_here([*command[:-1], tmp_path / "out", "--output_dir", tmp_path / "other"])
    assert empty.returncode == 2 and "no patient" in empty.stderr.splitlines()[-1] and not (tmp_path / "other").exists()


def test_the_tables_of_the_results_are_made_of_the_evaluations(tmp_path):
    sizes = {name: {"lesions": 8, "found": 3} for name in results_tables.SIZES}
    healthy = {"false_findings_per_scan": 1.25, "scans_with_findings": 0.5, "marked_share_of_brain": 0.00061}
    for number, kind in enumerate(("", "ms_", "strokes_", "healthy_")):
        for contrast in results_tables.CONTRASTS:
            mean = {"auprc_mean": 0.1 * number, "auprc_ci95": [0.01, 0.9], "dice_mean": 0.25}
            made = {**mean, "lesions": sizes, "healthy": healthy}
            methods = dict.fromkeys([*results_tables.METHODS, "fusion_strict", "fusion_screening"], made)
            case = {"auprc": 0.4321, "dice": 0.5, "false_findings": 2.0}
            cases = {f"patient26_{contrast}": dict.fromkeys(results_tables.METHODS, case)}
            write_json(tmp_path / f"eval_{kind}{contrast}" / "metrics.json", {"methods": methods, "cases": cases})
    command = [sys.executable, ROOT / "scripts/results_tables.py", tmp_path]
    missing = run_here(command)
    assert missing.returncode == 2 and "eval_glioma" in missing.stderr.splitlines()[-1] and not missing.stdout
    case = {n: {"auprc": 0.9, "dice": 0.1 * n, "false_findings": float(n)} for n in (1, 5)}
    cases = {f"pat000{n}_flair": dict.fromkeys(results_tables.METHODS, case[n]) for n in case}
    write_json(tmp_path / "eval_glioma/metrics.json", {"cases": cases})
    lines = run_here(command).stdout.splitlines()
    assert "| `fusion` | 0.432 (0.50) | 0.432 (0.50) | 0.432 (0.50) | 0.900 (0.10) | 0.900 (0.50) |" in lines
    assert "| `fusion`: false findings | 2 | 2 | 2 | 1 | 5 |" in lines
    planted = " | ".join(["0.100 [0.01, 0.90] (0.25) | 0.200 [0.01, 0.90] (0.25)"] * 3)
    assert f"| `atlas_z` | {planted} |" in lines
    assert "| 0.1 to 1 ml | " + " | ".join(["3 of 8 (3)"] * 6) + " |" in lines
    assert "| 1 to 10 ml, `strict` | " + " | ".join(["3 of 8"] * 6) + " |" in lines
    assert "| `fusion` FLAIR, test | 1.2 | 0.5 | 0.06% |" in lines
    assert "| `fusion_strict` T2w, validation | 1.2 | 0.5 | 0.06% |" in lines


def test_the_strength_of_lesions_is_that_of_their_voxels_and_of_what_surrounds_them():
    z, label = np.random.RandomState(0).normal(size=(20, 16, 12)), np.zeros((20, 16, 12), bool)
    inside = np.ones_like(label)
    inside[:4] = False
    label[3:6, 4:6, 4:6] = label[12:14, 8:10, 5:7] = True  # one reaches out of the brain
    found = list(lesion_strengths(z, label, inside, 2.0, 0.005))
    assert len(found) == 2
    places = np.argwhere(inside)
    for (ml, mean, contrast), voxels in zip(found, ((4, 4, 4, 2), (12, 8, 5, 2))):
        *start, width = voxels
        lesion = np.array([np.add(start, corner) for corner in np.ndindex(width, 2, 2)])
        assert ml == pytest.approx(0.005 * len(lesion))
        values = z[tuple(lesion.T)]
        distance = 2 * np.sqrt(((places[:, None] - lesion[None]) ** 2).sum(-1)).min(1)
        around = places[(distance > 2) & (distance <= 8)]
        around = around[~label[tuple(around.T)]]
        assert mean == pytest.approx(values.mean())
        assert contrast == pytest.approx(values.mean() - np.median(z[tuple(around.T)]))
    assert not list(lesion_strengths(z, label & ~inside, inside, 2.0, 0.005))


def test_regions_are_where_most_people_have_them_and_their_brightness_is_a_median():
    shares = np.zeros((4, 2, 6, 1, 1))
    shares[:, 0, :2] = 1
    shares[0, 0, 2] = 1  # one of four
    shares[:2, 1, 4] = 0.5  # nobody has more of it anywhere
    masks = region_masks(shares)
    assert masks[0, :, 0, 0].tolist() == [True, True, False, False, False, False]
    assert masks[1, :, 0, 0].tolist() == [False, False, False, False, True, False]
    image = np.array([0.5, 0.9, 0.9, 0.9, 0.0, 0.9]).reshape(6, 1, 1)
    found = differences(image, np.full((6, 1, 1), 0.6), masks)
    assert found[0] == pytest.approx(np.median([-0.1, 0.3])) and np.isnan(found[1])
