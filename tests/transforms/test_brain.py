import importlib.util
import sys
import warnings
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from bundle.data import load_atlas
from bundle.errors import InputError
from bundle.transforms import BrainMaskd
from bundle.transforms.brain import STRIPPERS, close_mask, is_stripped, largest_face_cm2
from tests.conftest import ellipsoid, meta

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])


def head(shape=(48, 52, 44)):
    return ellipsoid(shape, (18, 22, 17)) * (1 + np.random.rand(*shape))


def test_given_mask_is_made_binary():
    labels = ellipsoid((48, 52, 44), (15, 18, 12)) * 7
    out = BrainMaskd()({"image": meta(head(), AFFINE), "brain_mask": meta(labels, AFFINE)})
    np.testing.assert_array_equal(out["brain_mask"][0], labels > 0)


def test_mask_on_another_grid_is_brought_to_the_scans():
    coarse = np.diag([8.0, 8.0, 8.0, 1.0])
    coarse[:3, 3] = 2  # centre of the first coarse voxel among the fine ones
    mask = ellipsoid((24, 26, 22), (8, 10, 7))
    out = BrainMaskd()({"image": meta(head(), AFFINE), "brain_mask": meta(mask, coarse)})
    assert out["brain_mask"].shape == (1, 48, 52, 44)
    np.testing.assert_array_equal(out["brain_mask"][0], np.kron(mask, np.ones((2, 2, 2))))


def test_closing_fills_sulci_and_keeps_the_outline():
    mask = ellipsoid((40, 40, 40), (15, 15, 15))
    folded = mask.copy()
    folded[19:21, :, 10:] = 0  # a sulcus of 2 voxels
    closed = close_mask(meta(folded), np.array([1.0, 1.0, 1.0]), 3.0)[0].numpy()
    expected = ndimage.binary_closing(folded, ndimage.generate_binary_structure(3, 1), iterations=3)
    assert closed[20, 20, 20] == 1 and (closed >= folded).all()
    assert 2 * (closed * mask).sum() / (closed.sum() + mask.sum()) > 0.98
    assert np.abs(closed - expected).mean() < 0.01


def test_stripped_scan_is_its_own_mask():
    scan = head()
    scan[24, 26, 22] = 0  # a dark ventricle belongs to the brain
    scan[0, 0, 0] = 5  # a speck outside does not
    mask = BrainMaskd()({"image": meta(scan, AFFINE)})["brain_mask"][0].numpy()
    np.testing.assert_array_equal(mask, ellipsoid(scan.shape, (18, 22, 17)))


WHOLE_HEADS = {
    "no background": np.random.rand(48, 52, 44) + 1,
    "zero around a head of 10 litres": ellipsoid((80, 90, 80), (30, 35, 38)),
}


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_whole_head_is_refused_where_nothing_may_strip_it(name):
    with pytest.raises(InputError, match=r"not skull-stripped .* --brain_mask"):
        BrainMaskd(method="none")({"image": meta(WHOLE_HEADS[name], AFFINE)})


@pytest.fixture(scope="module")
def whole_head():
    """The atlas' brain in a skull of 8 mm and a scalp as bright as it, at 2 mm, and where the brain is."""
    template, brain = (np.pad(v[0].numpy(), 14) for v in load_atlas())
    distance = ndimage.distance_transform_edt(brain == 0) * 2
    scalp = ((distance > 8) & (distance < 15)) * 0.8 * template.max()
    noise = np.random.default_rng(0).random(brain.shape) * 0.03 * template.max()
    affine = load_atlas().template.affine.numpy() @ [[1, 0, 0, -14], [0, 1, 0, -14], [0, 0, 1, -14], [0, 0, 0, 1]]
    return meta(np.where(brain > 0, template, scalp + noise), affine), brain > 0


def test_deepbet_strips_a_whole_head_without_a_gui(whole_head):
    head, brain = whole_head
    mask = BrainMaskd()({"image": head})["brain_mask"]
    found = mask[0].numpy() > 0
    assert 2 * (found & brain).sum() / (found.sum() + brain.sum()) > 0.95
    np.testing.assert_allclose(mask.affine, head.affine)
    assert not {"tkinter", "customtkinter"} & set(sys.modules)


def test_wide_padding_changes_nothing(whole_head):
    head, brain = whole_head
    wide = [(150, 90), (130, 100), (90, 90)]
    affine = head.affine.numpy() @ [[1, 0, 0, -150], [0, 1, 0, -130], [0, 0, 1, -90], [0, 0, 0, 1]]
    mask = BrainMaskd()({"image": meta(np.pad(head[0].numpy(), wide), affine)})["brain_mask"][0].numpy() > 0
    found = mask[150:-90, 130:-100, 90:-90]
    assert found.sum() == mask.sum() and 2 * (found & brain).sum() / (found.sum() + brain.sum()) > 0.95


def test_a_small_head_on_blanked_air_is_no_stripped_brain(whole_head):
    """Its neck goes through a side of the volume; so it is looked at, though what is not 0 is not much."""
    head, brain = whole_head
    scan, half = head[0].numpy().copy(), np.diag([0.8, 0.8, 0.8, 1.0])
    scan[ndimage.distance_transform_edt(brain == 0) * 2 > 15] = 0
    neck = np.hypot(*(np.indices(scan.shape)[:2] - np.array([[[[60]]], [[[55]]]]))) < 26
    scan[:, :, :20][neck[:, :, :20] & (scan[:, :, :20] == 0)] = 0.3 * scan.max()
    image = meta(scan, head.affine.numpy() @ half)
    assert is_stripped(image) and largest_face_cm2(torch.as_tensor(scan != 0)[None], image) > 40
    out = BrainMaskd()({"image": image})
    found = out["brain_mask"][0].numpy() > 0
    assert 2 * (found & brain).sum() / (found.sum() + brain.sum()) > 0.9 and "flags" not in out


def test_a_brain_that_is_cut_off_is_told(whole_head):
    head, brain = whole_head
    at = int(np.argwhere(brain)[:, 2].max()) - 25  # 50 mm below the top
    cut = meta(head[0].numpy()[:, :, :at], head.affine.numpy())
    out = BrainMaskd()({"image": cut})
    area = float(out["brain_mask"][0, :, :, -1].sum()) * 4 / 100
    assert area > 40 and f"the scan ends within the brain ({area:.0f} cm2" in out["flags"]
    assert largest_face_cm2(out["brain_mask"].as_tensor(), cut) == pytest.approx(area)


def test_values_with_an_offset_are_told(whole_head):
    head, _ = whole_head
    assert "flags" not in BrainMaskd()({"image": head})
    shifted = meta(head[0].numpy() + 2 * float(head.max()), head.affine.numpy())
    assert "was something added to its values" in BrainMaskd()({"image": shifted})["flags"]


@pytest.mark.parametrize("scan", [np.zeros((40, 40, 40)), np.random.rand(3, 10, 10) + 1], ids=["zeros", "tiny"])
def test_what_is_no_head_is_said(scan):
    image = meta(scan, AFFINE)
    image.meta["filename_or_obj"] = "knee.nii.gz"
    with pytest.raises(InputError, match=r"knee\.nii\.gz: .*(no brain|holds nothing)"):
        BrainMaskd()({"image": image})


def test_hd_bet_is_used_where_it_is_installed(whole_head, monkeypatch):
    """Its weights cannot be had everywhere, so its place is taken by a threshold that talks in the same files."""
    head, _ = whole_head
    if importlib.util.find_spec("HD_BET") is None:
        with pytest.raises(InputError, match="pip install hd-bet"):
            BrainMaskd(method="hd-bet")({"image": head})

    def predict(scan, out, predictor, keep_brain_mask, compute_brain_extracted_image):
        image = nib.load(scan)
        bright = nib.Nifti1Image((abs(image.get_fdata() - 0.5) < 0.2).astype(np.uint8), image.affine)
        nib.save(bright, out[:-7] + "_bet.nii.gz")

    prediction = SimpleNamespace(get_hdbet_predictor=lambda device: None, hdbet_predict=predict)
    monkeypatch.setitem(sys.modules, "HD_BET", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "HD_BET.hd_bet_prediction", prediction)
    download = SimpleNamespace(maybe_download_parameters=lambda: None)
    monkeypatch.setitem(sys.modules, "HD_BET.checkpoint_download", download)
    mask = BrainMaskd(method="hd-bet")({"image": head})["brain_mask"]
    np.testing.assert_array_equal(mask[0], abs(head[0] - 0.5) < 0.2)
    with pytest.raises(InputError, match="use deepbet, hd-bet or none"):
        BrainMaskd(method="bet")


def test_a_gpu_without_memory_is_left_for_the_cpu(monkeypatch):
    def strip(image, device):
        if device != "cpu":
            raise torch.cuda.OutOfMemoryError
        return ellipsoid((90, 90, 90), (40, 40, 40)) > 0

    monkeypatch.setitem(STRIPPERS, "deepbet", strip)
    strip_it = BrainMaskd("image", device="cuda")
    for _ in range(2):  # it stays there
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            mask = strip_it({"image": meta(np.random.rand(90, 90, 90) + 1, np.diag([1.5, 1.5, 1.5, 1]))})["brain_mask"]
        assert mask.sum() == ellipsoid((90, 90, 90), (40, 40, 40)).sum()
    assert not told and strip_it.device == "cpu"


def test_what_is_no_number_is_background_outside_and_filled_or_refused_inside():
    scan = head()
    scan[scan == 0] = np.nan
    out = BrainMaskd()({"image": meta(scan, AFFINE)})
    np.testing.assert_array_equal(out["brain_mask"][0], scan > 0)
    assert (out["image"].as_tensor()[out["brain_mask"] == 0] == 0).all()
    scan[24, 26, 22] = np.inf
    mask = meta(ellipsoid(scan.shape, (18, 22, 17)), AFFINE)
    filled = BrainMaskd()({"image": meta(scan, AFFINE), "brain_mask": mask})
    assert float(filled["image"][0, 24, 26, 22]) in scan[23:26, 25:28, 21:24].astype(np.float32)
    assert filled["flags"] == "1 brain voxels were not finite; filled from their neighbours"
    scan[20:30, 20:30, 22] = -np.inf
    with pytest.raises(InputError, match="100 brain voxels are not finite"):
        BrainMaskd()({"image": meta(scan, AFFINE), "brain_mask": mask})


def test_an_inverted_mask_is_refused():
    mask = 1 - ellipsoid((48, 52, 44), (18, 22, 17))
    with pytest.raises(InputError, match="is it inverted"):
        BrainMaskd()({"image": meta(head(), AFFINE), "brain_mask": meta(mask, AFFINE)})
    cropped = {"image": meta(head()[6:-6, 6:-6, 6:-6]), "brain_mask": meta(mask[6:-6, 6:-6, 6:-6])}  # a small volume
    with pytest.raises(InputError, match="is it inverted"):
        BrainMaskd()(cropped)


def test_empty_mask_is_refused():
    with pytest.raises(InputError, match="empty"):
        BrainMaskd()({"image": meta(head(), AFFINE), "brain_mask": meta(np.zeros((48, 52, 44)), AFFINE)})


def test_millilitres_of_the_atlas_are_not_those_of_a_head():
    """On the atlas' grid brains are up to twice as large, and a scan that lies badly there is flagged, not refused."""
    mask = np.zeros((60, 60, 60))
    mask[4:56, 4:56, 4:56] = 1  # of 2.6 mm: 2,471 ml
    data = {"image": meta(mask + 1, np.diag([2.6, 2.6, 2.6, 1])), "brain_mask": meta(mask, np.diag([2.6, 2.6, 2.6, 1]))}
    with pytest.raises(InputError, match="marks 2471 ml"):
        BrainMaskd()(data)
    assert BrainMaskd()({**data, "prepared": True})["brain_mask"].sum() == mask.sum()
    with pytest.raises(InputError, match="as a brain lies"):
        BrainMaskd()({**data, "prepared": True, "brain_mask": meta(1 - mask, np.diag([2.6, 2.6, 2.6, 1]))})
