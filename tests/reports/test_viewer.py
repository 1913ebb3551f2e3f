"""What MONAI Label shows: options, label maps and figures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from bundle.errors import InputError
from bundle.reports import LabelMapd, chosen
from bundle.reports.viewer import LABELS, describe_findings
from bundle.scoring import Calibration, FindLesionsd, chosen_threshold
from tests.conftest import ROOT, meta

AFFINE = np.array([[0, 2.0, 0, -7], [-1, 0, 0, 5], [0, 0, 3.0, 1], [0, 0, 0, 1]])


def finder(threshold=None, quantiles=("0.995", "0.998", "0.9998")):
    stored = {"location": dict(zip(quantiles, (1.0, 2.0, 3.0)))}
    calibration = Calibration("t1", {}, {}, stored, {}, {})
    file = SimpleNamespace(load=lambda *_: calibration)
    return FindLesionsd("heatmap", "location", file, 0.9998, threshold, min_lesion_mm3=12.0)


def scan(seed=0):
    """Smooth noise with something of every grade, and its lesion mask."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(14, 15, 16)), 1.0)
    heatmap = meta(noise / noise.max() * 4, AFFINE)
    return {"heatmap": heatmap, "lesion": finder().cut(heatmap, 3.0), "brain_mask": meta(np.ones(noise.shape), AFFINE)}


def test_grades_are_nested_and_small_ones_are_dropped():
    data = scan()
    pred = LabelMapd("heatmap", finder())(data)["pred"]
    scores, marked = data["heatmap"][0].numpy(), pred[0].numpy()
    assert marked.dtype == np.uint8 and set(np.unique(marked)) == {0, 1, 2, 3}
    np.testing.assert_allclose(pred.affine, AFFINE)
    np.testing.assert_array_equal(marked == 3, data["lesion"][0].numpy() > 0)
    for value, threshold in ((1, 1.0), (2, 2.0)):
        regions, count = ndimage.label(scores > threshold, np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(np.ones(scores.shape), regions, np.arange(1, count + 1)) * 6.0
        kept = np.isin(regions, 1 + np.flatnonzero(sizes >= 12.0))
        np.testing.assert_array_equal(marked >= value, kept | (marked == 3))


def test_other_label_maps_and_what_names_them():
    data = scan()
    lesion = LabelMapd("heatmap", finder(), "lesion")(data)["pred"]
    np.testing.assert_array_equal(lesion == LABELS["lesion"], data["lesion"] > 0)
    heatmap = LabelMapd("heatmap", finder(), "heatmap")(data)["pred"]
    np.testing.assert_array_equal(heatmap, data["heatmap"])
    with pytest.raises(InputError, match="label_map 'colours' is unknown"):
        LabelMapd("heatmap", finder(), "colours")
    metadata = json.loads((ROOT / "configs/metadata.json").read_text())["network_data_format"]
    assert next(iter(metadata["outputs"])) == "pred"
    assert metadata["outputs"]["pred"]["channel_def"] == {str(v): k for k, v in LABELS.items()}


def test_what_was_not_looked_at_has_a_label_of_its_own():
    """Beside the findings, never over them, and its share stands with the figures."""
    data = scan()
    lesion = data["lesion"][0].numpy() > 0
    first = int(lesion.any((0, 1)).argmax())  # at the edge of the grid, say
    coverage = np.ones(lesion.shape)
    coverage[:, :, : first + 1], coverage[:, 0] = 2, 0
    given = {**data, "coverage": meta(coverage, AFFINE), "not_examined": torch.tensor(0.25)}
    for label_map, value in (("lesion", LABELS["lesion"]), ("graded", LABELS["strong"])):
        plain = LabelMapd("heatmap", finder(), label_map)(data)
        out = LabelMapd("heatmap", finder(), label_map)(given)
        shown, before = out["pred"][0].numpy(), plain["pred"][0].numpy()
        np.testing.assert_array_equal(shown, np.where((before == 0) & (coverage == 2), LABELS["not_examined"], before))
        assert (shown[lesion] == value).all()
        assert out["result"]["not_examined_percent"] == 25 and plain["result"]["not_examined_percent"] == 0
    assert LabelMapd("heatmap", finder(), "heatmap")(given)["pred"].dtype == torch.float32


def test_millilitres_are_the_scans_own():
    """A prepared scan lies on the atlas, grown: there its regions hold less of the person than their voxels say."""
    data = scan()
    data["lesion"] = finder().cut(data["heatmap"], 2.0)
    own = {**data, "to_atlas": torch.diag(torch.tensor([-1.25, 1.25, 1.28, 1.0], dtype=torch.float64))}
    plain, result = (LabelMapd("heatmap", finder())(d)["result"] for d in (data, own))
    assert plain["lesion_volume_ml"] == pytest.approx(2 * result["lesion_volume_ml"])
    for a, b in zip(plain["lesions"], result["lesions"], strict=True):
        assert a["volume_ml"] == pytest.approx(2 * b["volume_ml"]) and a["center_mm"] == b["center_mm"]
    spots = np.zeros((10, 10, 10))
    spots[1, 1, 1:3], spots[5, 5, 2:6] = 1, 1  # 2 and 4 voxels of 6 mm^3, 3 mm^3 of the scan
    for matrix, kept in ((None, 6), (own["to_atlas"], 4)):
        assert finder().cut(meta(spots, AFFINE), 0.5, matrix).sum() == kept
    cut = finder()({"heatmap": meta(spots * 9, AFFINE), "to_atlas": own["to_atlas"]})["lesion"]
    assert cut.sum() == 4


def test_a_given_threshold_needs_no_grades():
    """A fusion that the calibration does not hold can be cut all the same; a known score must have its grades."""
    data = scan()
    given = finder(threshold=3.0)
    given.score = "fusion"
    assert set(np.unique(LabelMapd("heatmap", given)(data)["pred"])) == {0, 3}
    with pytest.raises(InputError, match="quantile"):
        LabelMapd("heatmap", finder(quantiles=("0.9", "0.99", "0.9998")))(data)


def test_figures_are_plain_and_equal_brute_force():
    data = scan()
    data["lesion"] = finder().cut(data["heatmap"], 2.0)
    result = LabelMapd("heatmap", finder())(data)["result"]
    assert json.loads(json.dumps(result)) == result and result["threshold"] == 3.0 and result["score"] == "location"
    scores, found = data["heatmap"][0].numpy(), data["lesion"][0].numpy() > 0
    regions, count = ndimage.label(found, np.ones((3, 3, 3)))
    assert len(result["lesions"]) == count > 1
    assert result["lesion_volume_ml"] == pytest.approx(found.sum() * 6e-3)
    assert result["max_score"] == pytest.approx(scores.max()) and result["mean_score"] == pytest.approx(scores.mean())
    strongest = max(range(1, count + 1), key=lambda k: scores[regions == k].max())
    voxels = np.argwhere(regions == strongest)
    first = result["lesions"][0]
    assert first["max_score"] == pytest.approx(scores.max()) and first["volume_ml"] == pytest.approx(len(voxels) * 6e-3)
    center = AFFINE[:3, :3] @ voxels.mean(0) + AFFINE[:3, 3]
    np.testing.assert_allclose(first["center_mm"], center, atol=0.06)
    nothing = describe_findings(data["heatmap"], data["lesion"] * 0, data["brain_mask"])
    assert nothing["lesions"] == [] and nothing["lesion_volume_ml"] == 0


def test_options_as_a_viewer_sends_them():
    assert chosen(["t1", "t2"]) == "t1" and chosen("flair") == "flair"
    assert chosen_threshold("calibrated") is chosen_threshold("") is chosen_threshold(None) is None
    assert chosen_threshold("2.5") == chosen_threshold(2.5) == 2.5
    for text in ("high", "nan", "inf"):
        with pytest.raises(InputError, match=f"threshold '{text}'"):
            chosen_threshold(text)
