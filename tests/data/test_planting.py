import json

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from bundle.data import grid_affine, load_datalist
from bundle.data.files import write_volume
from bundle.data.planting import plant_lesion, plant_masks
from bundle.errors import InputError

AFFINE = grid_affine(4.0, (20, 24, 16), (0.0, 0.0, 0.0))


@pytest.mark.parametrize(("contrast", "sign"), [("t1", -1), ("t2", 1), ("flair", 1)])
def test_lesions_look_as_the_sequence_shows_them(contrast, sign):
    image = 0.3 + 0.4 * torch.rand(1, 12, 12, 12)
    brain = torch.ones_like(image)
    brain[..., 10:] = 0
    soft = torch.zeros_like(image)
    soft[:, 3:7, 3:7, 6:] = 1.0
    soft[:, 7, 3:7, 6:] = 0.3
    planted, label = plant_lesion(image, brain, soft, contrast, (0.8, 0.9), np.random.RandomState(0))
    assert torch.equal(label, (soft == 1) * brain)  # nothing outside the brain
    assert sign * (planted - image)[label > 0].mean() > 0.1
    assert torch.equal(planted[soft * brain == 0], image[soft * brain == 0])
    weak, _ = plant_lesion(image, brain, soft, contrast, (0.1, 0.2), np.random.RandomState(0))
    assert (weak - image).abs().mean() < (planted - image).abs().mean()


@pytest.fixture
def bench(tmp_path):
    """Three healthy brains, and masks of 1.0, 0.5, 2.3 and (left out) 0.06 ml at 2 mm."""
    brain = np.zeros((20, 24, 16), np.uint8)
    brain[2:-2, 2:-2, 2:-2] = 1
    items = []
    for n in range(3):
        item = {"subject": f"s{n}", "contrast": "t1", "image": f"i{n}.nii.gz", "brain_mask": f"m{n}.nii.gz"}
        scan = brain * (0.5 + 0.5 * np.random.RandomState(n).rand(*brain.shape)).astype(np.float32)
        write_volume(tmp_path / "healthy" / item["image"], scan, AFFINE)
        write_volume(tmp_path / "healthy" / item["brain_mask"], brain, AFFINE)
        items.append(item)
    (tmp_path / "healthy" / "datalist.json").write_text(json.dumps({"validation": items}))
    fine = grid_affine(2.0, (40, 48, 32), (0.0, 0.0, 0.0))
    for n, size in enumerate(((5, 5, 5), (4, 4, 4), (6, 6, 8), (2, 2, 2))):
        mask = np.zeros((40, 48, 32), np.uint8)
        mask[8 : 8 + size[0], 20 : 20 + size[1], 12 : 12 + size[2]] = 1
        write_volume(tmp_path / "masks" / f"lesion{n}.nii.gz", mask, fine)
    return tmp_path


def test_every_mask_is_planted_once_and_tuning_is_kept_from_the_test(bench):
    for folder in ("one", "again"):
        plant_masks(bench / "healthy", bench / "masks", bench / folder, "t1")
    dealt = {s: load_datalist(bench / "one", s, "t1") for s in ("tuning", "test")}
    names = [i["subject"].split("_")[1] for items in dealt.values() for i in items]
    assert sorted(names) == ["lesion0", "lesion1", "lesion2"] and len(dealt["tuning"]) == 2
    for item in dealt["tuning"] + dealt["test"]:
        assert item["person"] == item["subject"].split("_")[0]
        label, image, brain = (nib.load(item[k]).get_fdata() for k in ("label", "image", "brain_mask"))
        healthy = nib.load(bench / "healthy" / f"i{item['subject'][1]}.nii.gz").get_fdata()
        ml = {"lesion0": 1.0, "lesion1": 0.512, "lesion2": 2.304}[item["subject"].split("_")[1]]
        assert label.sum() * 0.064 == pytest.approx(ml, rel=0.5) and (label <= brain).all()
        # in its place, or mirrored
        center = AFFINE @ [*ndimage.center_of_mass(label), 1]
        expected = grid_affine(2.0, (40, 48, 32), (0, 0, 0)) @ [10, 22, 14, 1]
        np.testing.assert_allclose([abs(center[0]), *center[1:3]], [abs(expected[0]), *expected[1:3]], atol=4)
        assert (image - healthy)[label > 0].mean() < -0.05
        far = ndimage.binary_dilation(label, iterations=3) == 0
        np.testing.assert_allclose(image[far], healthy[far], atol=1e-4)
        same = nib.load(item["image"].replace("/one/", "/again/")).get_fdata()
        np.testing.assert_array_equal(image, same)


def test_no_masks_are_told(bench):
    (bench / "empty").mkdir()
    with pytest.raises(InputError, match="no lesion masks"):
        plant_masks(bench / "healthy", bench / "empty", bench / "out", "t1")
    with pytest.raises(InputError, match="no mask of 50 to 60 ml"):
        plant_masks(bench / "healthy", bench / "masks", bench / "out", "t1", volume_ml=(50, 60))
