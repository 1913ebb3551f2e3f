import numpy as np
import torch

from bundle.data import grid_affine, load_datalist
from bundle.data.phantom import load_anatomy, make_subject, plant_blob
from tests.conftest import CENTER, GRID


def test_subjects_are_people_of_their_own_and_repeatable():
    affine = grid_affine(GRID["spacing"], GRID["spatial_size"], CENTER)
    anatomy = load_anatomy(affine, GRID["spatial_size"])
    (one, brain), (again, _), (other, other_brain) = (make_subject(anatomy, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one, again)
    assert one.shape == brain.shape == (1, *GRID["spatial_size"])
    assert ((one > 0) == (brain > 0)).all()
    assert (one - other)[(brain * other_brain) > 0].abs().mean() > 0.01
    assert not torch.equal(brain, other_brain)


def test_lesions_are_dark_inside_and_leave_the_rest():
    brain = torch.zeros(1, 24, 24, 24)
    brain[:, 3:-3, 3:-3, 3:-3] = 1
    image = brain * (0.5 + 0.5 * torch.rand(brain.shape))
    planted, mask = plant_blob(image, brain, 12.0, 3.0, np.random.RandomState(0))
    assert 0.3 < mask.sum() * 27 / (4 / 3 * np.pi * 12**3) < 3
    assert (mask <= brain).all()
    assert (planted - image)[mask > 0].mean() < -0.1
    far = torch.nn.functional.max_pool3d(mask, 9, 1, 4) == 0
    torch.testing.assert_close(planted[far], image[far], atol=1e-2, rtol=0)


def test_cohort_is_a_prepared_dataset_with_lesions_in_test_only(cohort):
    sections = {s: load_datalist(cohort, s, "t1") for s in ("training", "validation", "calibration", "test")}
    assert [len(v) for v in sections.values()] == [6, 2, 4, 2]
    assert all(("label" in item) == (s == "test") for s, items in sections.items() for item in items)
