"""Brain that a mask left out: the atlas' own brain, with pieces taken from its mask."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from bundle.data import load_atlas
from bundle.errors import InputError
from bundle.transforms import AlignToAtlasd, RecoverBraind
from tests.conftest import meta


@pytest.fixture(scope="module")
def head():
    """Intensities, mask and affine of the atlas' brain, with air of noise around it."""
    template, brain = (v[0].numpy() for v in load_atlas())
    noise = np.random.default_rng(0).random(brain.shape) * 0.02 * template.max()
    return np.where(brain > 0, template + 0.05, noise), brain > 0, load_atlas().template.affine.numpy()


def ball(head, center_mm, diameter):
    _, brain, affine = head
    places = np.stack(np.indices(brain.shape), -1) @ affine[:3, :3].T + affine[:3, 3]
    return brain & (np.linalg.norm(places - center_mm, axis=-1) <= diameter / 2)


def recover(image, mask, affine, **options):
    data = {"image": meta(image, affine), "brain_mask": meta(mask, affine)}
    return RecoverBraind(**options)(data)


SURFACE = (48.0, -20.0, 36.0)


@pytest.mark.parametrize("brightness", [2.0, 0.3])
@pytest.mark.parametrize("turn", [np.eye(4), np.diag([-1.0, 1, 1, 1])[[1, 0, 2, 3]]], ids=["plain", "other axes"])
def test_what_was_cut_off_is_taken_back(head, brightness, turn):
    """A bright or dark ball at the surface; the scan's axes in another order, one of them mirrored."""
    image, brain, affine = head
    lost = ball(head, SURFACE, 44)
    image = np.where(lost, brightness * np.median(image[brain]), image)
    if not np.array_equal(turn, np.eye(4)):
        image, mask, lost = (np.flip(v.transpose(1, 0, 2), 1) for v in (image, brain & ~lost, lost))
        affine = affine @ np.array([[0, -1, 0, brain.shape[0] - 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    else:
        mask = brain & ~lost
    data = recover(image, mask, affine)
    added = (data["brain_mask"][0].numpy() > 0) & ~mask
    assert 2 * (added & lost).sum() / (added.sum() + lost.sum()) > 0.97
    assert data["flags"] == f"{added.sum() * 8 / 1000:.0f} ml of the brain, left out by its mask, were taken back"
    assert set(np.unique(data["brain_mask"])) == {0, 1} and (data["brain_mask"][0].numpy() >= mask).all()


def test_what_is_well_is_left_alone(head):
    """The same object, unflagged: a whole mask, one that is 4 mm too tight, and specks that are missing."""
    image, brain, affine = head
    specks = ball(head, SURFACE, 8) | ball(head, (-20, -40, 10), 8)
    for mask in (brain, ndimage.binary_erosion(brain, iterations=2), brain & ~specks):
        data = {"image": meta(image, affine), "brain_mask": meta(mask, affine)}
        out = RecoverBraind()(data)
        assert out["brain_mask"] is data["brain_mask"] and "flags" not in out


def test_holes_are_filled(head):
    image, brain, affine = head
    hole = ball(head, (25, -20, 25), 16)
    data = recover(image, brain & ~hole, affine)
    np.testing.assert_array_equal(data["brain_mask"][0].numpy() > 0, brain)
    assert data["flags"].startswith("2 ml of the brain")


def test_what_the_scan_lacks_is_told(head):
    """A stripping has cut it away; the background is 0, or what 0 became where intensities were scaled and shifted."""
    image, brain, affine = head
    lost = ball(head, SURFACE, 44)
    stripped = np.where(brain & ~lost, image, 0)
    for scan in (stripped, (stripped - image[brain].mean()) / image[brain].std()):
        data = recover(scan, brain & ~lost, affine)
        np.testing.assert_array_equal(data["brain_mask"][0].numpy() > 0, brain & ~lost)
        amount, rest = data["flags"].split(" ", 1)
        assert rest == "ml of the brain are missing from the scan"
        assert float(amount) == pytest.approx(lost.sum() * 8 / 1000, rel=0.2)
    half = image[:, :, 20:]  # what no slice shows is not the mask's fault
    cut = affine.copy()
    cut[:3, 3] += affine[:3, 2] * 20
    assert "flags" not in recover(half, brain[:, :, 20:], cut)


def test_millilitres_are_the_scans_own_and_alignment_can_be_undone(head, monkeypatch):
    """A head of half the atlas' volume: half the ml, and the mask keeps its history."""
    image, brain, affine = head
    lost = ball(head, SURFACE, 44)
    grown = np.diag([2 ** (1 / 3)] * 3 + [1.0])
    own = np.linalg.inv(grown) @ affine
    monkeypatch.setattr("bundle.transforms.alignment.register_to_atlas", lambda *_: grown)
    align = AlignToAtlasd(["image", "brain_mask"])
    data = RecoverBraind()(align({"image": meta(image, own), "brain_mask": meta(brain & ~lost, own)}))
    amount = float(data["flags"].split("; ")[-1].split(" ")[0])
    assert amount == pytest.approx(lost.sum() * 4 / 1000, rel=0.05)
    torch.testing.assert_close(data["brain_mask"].affine, data["image"].affine)
    np.testing.assert_allclose(align.inverse(data)["brain_mask"].affine.numpy(), own)


def test_thick_slices_and_fine_voxels(head):
    """0.9 x 0.9 x 5 mm: no gap between the mask and what is added to it."""
    image, brain, affine = head
    lost = ball(head, SURFACE, 44)
    zoom = np.array([2 / 0.9, 2 / 0.9, 2 / 5])
    shape = np.ceil(np.array(brain.shape) * zoom).astype(int)
    fine = affine @ np.diag([*(1 / zoom), 1])
    scan, whole, cut = (
        ndimage.affine_transform(v.astype(np.float32), np.diag(1 / zoom), output_shape=tuple(shape), order=1)
        for v in (image, brain, brain & ~lost)
    )
    whole, cut = whole >= 0.5, cut >= 0.5
    data = recover(scan, cut, fine)
    found = data["brain_mask"][0].numpy() > 0
    assert 2 * (found & whole).sum() / (found.sum() + whole.sum()) > 0.99
    assert (whole & ~found).sum() < 0.05 * (whole & ~cut).sum()


def test_nothing_is_done_where_nothing_can_be_told(head):
    image, brain, affine = head
    cut = brain & ~ball(head, SURFACE, 44)
    data = {"image": meta(image, affine), "brain_mask": meta(cut, affine)}
    for out in (
        RecoverBraind()({**data, "prepared": True}),
        RecoverBraind(method="none")(data),
        recover(image, cut, affine + 60 * np.eye(4, k=3)),  # does not lie on the atlas
        recover(image, np.zeros(brain.shape), affine),
    ):
        assert "flags" not in out and out["brain_mask"].sum() in (0, cut.sum())
    with pytest.raises(InputError, match="brain_recovery 'always' is unknown"):
        RecoverBraind(method="always")
