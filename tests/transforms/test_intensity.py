import json

import numpy as np
import pytest
import torch

from bundle.errors import InputError
from bundle.transforms import (
    CurvatureFlowd,
    NormalizeBrainIntensityd,
    RandCoarseNoised,
    learn_landmarks,
)
from tests.conftest import ellipsoid, meta

SHAPE = (30, 32, 28)


@pytest.fixture
def brain():
    return ellipsoid(SHAPE, (13, 14, 11))


def test_percentiles_inside_the_brain_become_a_tenth_and_1(brain):
    image = np.random.gamma(2, 100, SHAPE)
    out = NormalizeBrainIntensityd("image")({"image": meta(image), "brain_mask": meta(brain)})["image"][0].numpy()
    low, high = np.percentile(image[brain > 0], [1, 99])
    expected = np.clip(0.1 + 0.9 * (image - low) / (high - low), 1e-3, 4)
    np.testing.assert_allclose(out[brain > 0], expected[brain > 0], atol=1e-5)
    assert (out[brain == 0] == 0).all() and (out[brain > 0] > 0).all()


def test_scale_and_offset_do_not_matter_and_twice_is_once(brain):
    image = np.random.rand(*SHAPE)
    normalise = NormalizeBrainIntensityd("image")
    one, other = (normalise({"image": meta(i), "brain_mask": meta(brain)}) for i in (image, 700 * image - 90))
    np.testing.assert_allclose(one["image"], other["image"], atol=1e-4)
    np.testing.assert_allclose(normalise(one)["image"], one["image"], atol=5e-3)


def test_the_image_keeps_its_own_history(brain):
    image, mask = meta(np.random.rand(*SHAPE)), meta(brain)
    image.applied_operations.append({"class": "of the image"})
    mask.applied_operations.append({"class": "of the mask"})
    out = NormalizeBrainIntensityd("image")({"image": image, "brain_mask": mask})
    assert out["image"].applied_operations == [{"class": "of the image"}]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda i, b: i.fill(3), "constant"),
        (lambda i, b: i.__setitem__((15, 16, 14), np.nan), "not finite"),
        (lambda i, b: b.fill(0), "no brain"),
    ],
)
def test_what_is_no_image_is_refused(brain, spoil, message):
    image = np.random.rand(*SHAPE)
    spoil(image, brain)
    with pytest.raises(InputError, match=message):
        NormalizeBrainIntensityd("image")({"image": meta(image), "brain_mask": meta(brain)})


def test_landmarks_bring_histograms_together(tmp_path):
    """Three scans of one anatomy under different curves: alike after standardisation, bright lesions still above 1."""
    rng = np.random.default_rng(0)
    anatomy = rng.random((16, 16, 16)) * 0.98 + 0.01
    curves = [lambda v: v, lambda v: v**2, np.sqrt]
    plain = NormalizeBrainIntensityd("image")
    mask = meta(np.ones_like(anatomy))
    cohort = [plain({"image": meta(40 + 7 * c(anatomy)), "brain_mask": mask}) for c in curves]
    file = tmp_path / "landmarks_t1.json"
    assert NormalizeBrainIntensityd("image", landmarks=str(file))(cohort[0])["image"].shape == (1, 16, 16, 16)
    learn_landmarks(cohort, str(file))
    learn_landmarks([], str(file), keep=True)  # leaves it as it is
    content = json.loads(file.read_text())
    values = [c["image"][0].numpy() for c in cohort]
    expected = np.mean([np.median(v) for v in values])
    assert content["subjects"] == 3 and content["intensities"][5] == pytest.approx(expected, abs=0.01)
    standard = NormalizeBrainIntensityd("image", landmarks=str(file))
    alike = [standard(c)["image"][0].numpy() for c in cohort]
    assert np.abs(alike[1] - alike[2]).mean() < 0.02 < np.abs(values[1] - values[2]).mean()
    again = standard({"image": meta(alike[1]), "brain_mask": mask})["image"][0].numpy()
    np.testing.assert_allclose(again, alike[1], atol=2e-3)
    bright = anatomy.copy()
    bright[3, 3, 3] = 1.5
    assert standard({"image": meta(bright), "brain_mask": mask})["image"][0, 3, 3, 3] > 1.2
    file.write_text('{"percentiles": [1, 99]}')
    with pytest.raises(InputError, match="damaged landmarks"):
        standard(cohort[0])


def test_curvature_flow_smooths_noise_but_not_edges():
    step = np.zeros((16, 16, 16))
    step[8:] = 10
    noisy = meta(step + np.random.standard_normal(step.shape) * 0.5)
    smooth = CurvatureFlowd("image", iterations=5)({"image": noisy})["image"]
    assert smooth[0, 2:6].std() < 0.6 * noisy[0, 2:6].std()
    assert smooth[0, 9].mean() - smooth[0, 6].mean() > 9
    for left in (
        CurvatureFlowd("image")({"image": noisy}),
        CurvatureFlowd("image", 5)({"image": noisy, "prepared": 1}),
    ):
        torch.testing.assert_close(left["image"], noisy)


def test_coarse_noise_is_smooth_inside_the_brain_and_seeded():
    image = torch.zeros(1, 60, 70)
    image[:, 5:55, 5:65] = 5
    add = RandCoarseNoised("image", std=0.2, cell=8)
    noise = [add.set_random_state(seed)({"image": image})["image"] - image for seed in (1, 1, 2)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    inside = noise[0][0, 5:55, 5:65]
    assert (noise[0][image == 0] == 0).all() and 0.05 < inside.std() < 0.25
    assert (inside[1:] - inside[:-1]).abs().max() < 0.2  # no voxel jumps: blobs of several voxels
    many = torch.stack([add.set_random_state(s)({"image": image})["image"] - image for s in range(200)])[
        :, 0, 5:55, 5:65
    ]
    assert many.mean().abs() < 0.02
    spread = many.std(0)  # the lattice is shifted at random: no place is noisier than another
    assert spread.max() < 1.5 * spread.min()
    dark = add({"image": image * 0.0002})["image"]
    assert (dark[image > 0] >= 0.001).all()
