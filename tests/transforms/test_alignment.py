"""Registration, on the atlas' own brain at 4 mm: a second each."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bundle.data import Atlas, load_atlas
from bundle.data.atlas import atlas_overlap
from bundle.errors import InputError
from bundle.transforms import AlignToAtlasd, ResampleToGrid, alignment
from bundle.transforms.alignment import register_to_atlas
from tests.conftest import meta, write_nifti


@pytest.fixture(scope="module")
def atlas():
    """The MNI152 brain at 4 mm: registration in a second."""
    full = load_atlas()
    grid = ResampleToGrid(4.0, (48, 56, 48), (0, -17, 5))
    return Atlas(grid(full.template), grid(full.brain_mask, "nearest"))


@pytest.mark.parametrize(
    ("turned", "inverted"),
    [
        *((t, i) for t in ((0, 0, 12), (30, 0, 0), (0, -30, 0), (0, 0, 30), (0, 8, 172)) for i in (False, True)),
        *((t, True) for t in ((180, 0, 0), (0, 190, 0))),  # every start is tried: once is enough
    ],
)
def test_registration_finds_a_known_affine(turned, inverted):
    """Any contrast, tilted by up to 30 degrees or by half a turn, shifted, stretched; error at the surface, mm."""
    atlas = load_atlas()
    world = np.eye(4)
    world[:3, :3] = Rotation.from_euler("xyz", turned, degrees=True).as_matrix() @ np.diag([1.08, 0.94, 1.0])
    world[:3, 3] = [9, -40, 11]
    affine = world @ atlas.template.affine.numpy()
    image = atlas.template[0].numpy() / atlas.template.max().item()
    image = meta((1 - image) ** 2 if inverted else image, affine)
    found = register_to_atlas(image, meta(atlas.brain_mask[0].numpy(), affine), atlas)
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-90, 60) for z in (-40, 60)]).T
    assert np.abs((found @ world @ corners - corners)[:3]).max() < 1


def test_nothing_to_register_is_said(atlas):
    """A mask of two voxels: ITK finds no overlap, or no optimum."""
    empty = meta(np.zeros((10, 10, 10)))
    mask = meta(np.zeros((10, 10, 10)))
    mask[0, 5, 5, 5:7] = 1
    with pytest.raises(InputError, match="alignment to the atlas failed"):
        register_to_atlas(empty, mask, atlas)


def test_alignment_is_undone_exactly(atlas, monkeypatch):
    monkeypatch.setattr("bundle.transforms.alignment.load_atlas", lambda *_: atlas)
    affine = np.diag([1.0, 1, 1, 1]) @ atlas.template.affine.numpy()
    affine[:3, 3] += 20
    data = {"image": meta(atlas.template[0], affine), "brain_mask": meta(atlas.brain_mask[0], affine)}
    align = AlignToAtlasd(["image", "brain_mask"])
    moved = align(data)
    assert not torch.allclose(moved["image"].affine, data["image"].affine)
    torch.testing.assert_close(moved["image"].affine, moved["brain_mask"].affine)
    assert atlas_overlap(moved["brain_mask"], atlas) > 0.97
    np.testing.assert_allclose(align.inverse(moved)["image"].affine.numpy(), affine)


@pytest.mark.parametrize(
    ("world", "method", "doubt"),
    [
        (np.eye(4), "affine", ""),
        (np.diag([-1.0, 1, 1, 1]), "affine", ""),  # the brain is as good as symmetric: nobody can tell
        (np.diag([1.0, -1, 1, 1]), "affine", "back to front or upside down"),
        (np.diag([1.0, 1, -1, 1]), "auto", "back to front or upside down"),
        (np.diag([0.75, 0.75, 0.75, 1]), "affine", "its brain has 7"),
        (np.diag([1.0, 1, 0.4, 1]), "affine", "is its voxel size right"),
        (np.eye(4) + np.eye(4, k=3) * 40, "none", "lies badly on the atlas"),
    ],
)
def test_a_header_that_cannot_be_right_is_flagged(atlas, monkeypatch, world, method, doubt):
    monkeypatch.setattr("bundle.transforms.alignment.load_atlas", lambda *_: atlas)
    affine = world @ atlas.template.affine.numpy()
    data = {"image": meta(atlas.template[0], affine), "brain_mask": meta(atlas.brain_mask[0], affine)}
    flags = AlignToAtlasd(["image", "brain_mask"], method=method)(data).get("flags", "")
    assert doubt in flags and bool(doubt) == bool(flags)


def test_auto_leaves_what_is_aligned(atlas, monkeypatch):
    monkeypatch.setattr("bundle.transforms.alignment.load_atlas", lambda *_: atlas)
    monkeypatch.setattr("bundle.transforms.alignment.register_to_atlas", lambda *_: np.diag([0.73, 0.73, 0.73, 1]))
    align = AlignToAtlasd(["image", "brain_mask"], method="auto")
    data = {"image": atlas.template, "brain_mask": atlas.brain_mask}
    torch.testing.assert_close(align(data)["image"].affine, atlas.template.affine)
    far = {k: meta(v[0], np.diag([1.5, 1.5, 1.5, 1]) @ v.affine.numpy()) for k, v in data.items()}
    assert not torch.allclose(align(far)["image"].affine, far["image"].affine)
    assert "flags" not in align(data)
    assert "lies badly on the atlas (Dice 0.8" in align(far)["flags"]  # spread by a tenth
    torch.testing.assert_close(align({**far, "prepared": True})["image"].affine, far["image"].affine)
    with pytest.raises(InputError, match=r"overlaps the atlas' by 0\.[0-7]\d only"):
        monkeypatch.setattr("bundle.transforms.alignment.register_to_atlas", lambda *_: np.diag([2.0, 2, 2, 1]))
        align(far)
    with pytest.raises(InputError, match="alignment"):
        AlignToAtlasd("image", method="rigid")


def test_another_atlas_from_a_file(atlas, tmp_path):
    file = write_nifti(tmp_path / "sri.nii.gz", (atlas.template * atlas.brain_mask)[0], atlas.template.affine.numpy())
    mine = load_atlas(str(file))
    torch.testing.assert_close(mine.template.affine, atlas.template.affine)
    assert atlas_overlap(mine.brain_mask, atlas) > 0.99
    moved = atlas.template.affine.numpy() + np.array([[0, 0, 0, 8], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    data = {"image": meta(atlas.template[0], moved), "brain_mask": meta(atlas.brain_mask[0], moved)}
    assert atlas_overlap(AlignToAtlasd("brain_mask", atlas=str(file))(data)["brain_mask"], mine) > 0.97
    head = write_nifti(tmp_path / "head.nii.gz", np.random.rand(9, 9, 9) + 1)
    with pytest.raises(InputError, match=r"head\.nii\.gz: an atlas must be one skull-stripped brain"):
        load_atlas(str(head))
    with pytest.raises(InputError, match=r"gone\.nii: atlas cannot be read"):
        load_atlas(str(tmp_path / "gone.nii"))


def test_the_same_scan_is_aligned_the_same_way_twice(atlas):
    """Its random sampling is seeded, not by the clock."""
    first, second = (register_to_atlas(atlas.template, atlas.brain_mask, atlas) for _ in range(2))
    np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize(("turn", "fits"), [((1, 1, 1), 2), ((-1, -1, 1), 12)])
def test_other_starts_are_tried_only_where_the_upright_one_does_not_fit(monkeypatch, turn, fits):
    """A coarse fit and a fine one; of a head that is turned, nine more coarse ones, and one more fine one, too."""
    atlas, made, fit = load_atlas(), [], alignment._optimise
    monkeypatch.setattr(alignment, "_optimise", lambda *given: made.append(given) or fit(*given))
    affine = np.diag([*turn, 1.0]) @ atlas.template.affine.numpy()
    register_to_atlas(meta(atlas.template[0], affine), meta(atlas.brain_mask[0], affine), atlas)
    assert len(made) == fits
