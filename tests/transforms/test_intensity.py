import numpy as np
import pytest

from bundle.errors import InputError
from bundle.transforms import CorrectBiasFieldd, NormalizeBrainIntensityd
from tests.conftest import ellipsoid, meta

SHAPE = (30, 32, 28)


@pytest.fixture
def brain():
    return ellipsoid(SHAPE, (13, 14, 11))


def test_percentiles_inside_the_brain_become_0_and_1(brain):
    image = np.random.gamma(2, 100, SHAPE)
    out = NormalizeBrainIntensityd("image")({"image": meta(image), "brain_mask": meta(brain)})["image"][0].numpy()
    low, high = np.percentile(image[brain > 0], [1, 99])
    expected = np.clip((image - low) / (high - low), 1e-3, 2)
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


def test_shading_is_divided_out(brain):
    tissue = brain * (1 + (np.indices(SHAPE)[0] // 3 % 2))
    shading = np.exp(np.linspace(-0.5, 0.5, SHAPE[1]))[None, :, None]
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    out = CorrectBiasFieldd("image")({"image": meta(tissue * shading, affine), "brain_mask": meta(brain, affine)})
    ratio = (out["image"][0].numpy() / np.where(brain > 0, tissue, 1))[brain > 0]
    before = np.broadcast_to(shading, SHAPE)[brain > 0]
    assert ratio.std() / ratio.mean() < 0.3 * before.std() / before.mean()


def test_n4_refuses_what_has_no_logarithm(brain):
    data = {"image": meta(np.random.standard_normal(SHAPE)), "brain_mask": meta(brain)}
    with pytest.raises(InputError, match="negative"):
        CorrectBiasFieldd("image")(data)


def test_prepared_scans_are_not_corrected_again(brain):
    data = {"image": meta(np.random.rand(*SHAPE)), "brain_mask": meta(brain)}
    for item in ({**data, "prepared": True}, data):
        method = "n4" if "prepared" in item else "none"
        np.testing.assert_array_equal(CorrectBiasFieldd("image", method=method)(item)["image"], data["image"])
    with pytest.raises(InputError, match="bias_field"):
        CorrectBiasFieldd("image", method="n5")
