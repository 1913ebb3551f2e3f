import numpy as np
import pytest
from scipy import ndimage

from bundle.data.atlas import load_atlas
from bundle.errors import InputError
from bundle.transforms import CorrectBiasFieldd
from bundle.transforms.bias import METHODS, _polynomials, atlas_terms, difference_fit, tissue_field, usual_places
from tests.conftest import ellipsoid, meta

SHAPE, MM = (48, 56, 44), 4.0
AFFINE = np.diag([MM, MM, MM, 1.0])


@pytest.fixture(scope="module")
def brain():
    return ellipsoid(SHAPE, (21, 25, 19))


@pytest.fixture(scope="module")
def scan(brain):
    """Folded tissues of four brightnesses with noise, and no shading."""
    rng = np.random.default_rng(0)
    folds = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5)
    tissue = np.digitize(folds, np.quantile(folds, [0.2, 0.5, 0.9])).astype(int)
    return brain * np.array([150.0, 400.0, 520.0, 600.0])[tissue] * rng.normal(1, 0.04, SHAPE)


def coils(seed: int) -> np.ndarray:
    """What four coils beside the head see: from 0.7 to 1.3."""
    rng = np.random.default_rng(seed)
    where = np.moveaxis(np.indices(SHAPE), 0, -1) * MM - np.array(SHAPE) * MM / 2
    field = sum(
        rng.uniform(0.3, 1) * np.exp(-0.5 * ((where - 130 * d / np.linalg.norm(d)) ** 2).sum(-1) / 100**2)
        for d in rng.standard_normal((4, 3))
    )
    return 0.7 + 0.6 * (field - field.min()) / np.ptp(field)


def corrected(image, brain, method="tissue"):
    data = {"image": meta(image, AFFINE), "brain_mask": meta(brain, AFFINE)}
    return CorrectBiasFieldd("image", method=method)(data)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shading_of_coils_is_divided_out(scan, brain, seed):
    inside, shading = brain > 0, coils(seed)
    left = corrected(scan * shading, brain)["image"][0].numpy()[inside] / scan[inside]
    assert np.log(left).std() < 0.2 * np.log(shading[inside]).std()


def test_an_even_scan_stays_as_it_is(scan, brain):
    ratio = (corrected(scan, brain)["image"][0].numpy() / np.where(brain > 0, scan, 1))[brain > 0]
    assert ratio.std() < 0.02


@pytest.mark.parametrize("brightness", [1500.0, 60.0])
def test_a_lesion_of_a_fifth_of_the_brain_keeps_its_contrast(scan, brain, brightness):
    lesion = ellipsoid(SHAPE, (13, 14, 12), (31, 30, 22)) * brain > 0
    assert 0.15 < lesion.sum() / brain.sum() < 0.25
    image = np.where(lesion, scan + 0.8 * (brightness - scan), scan)
    out = corrected(image, brain)["image"][0].numpy()

    def contrast(volume):
        return np.log(volume[lesion].mean() / volume[(brain > 0) & ~lesion].mean())

    assert contrast(out) / contrast(image) > 0.95


def test_differences_do_not_see_a_lesion_and_its_place_is_left_out(scan, brain):
    lesion = ellipsoid(SHAPE, (13, 14, 12), (31, 30, 22)) * brain > 0
    log = np.log(np.where(lesion, 3 * scan, scan), where=brain > 0, out=np.zeros(SHAPE))
    basis, nothing = _polynomials(SHAPE, 1), np.zeros((*SHAPE, 2))
    field = basis @ difference_fit(log, brain > 0, basis, nothing)
    assert field[brain > 0].std() < 0.02
    usual = usual_places(log, brain > 0, nothing)
    assert usual[lesion].mean() < 0.3 and usual[(brain > 0) & ~lesion].mean() > 0.7


def test_the_same_scan_gives_the_same_answer_and_units_do_not_matter(scan, brain):
    one, same, other = (corrected(i, brain)["image"].numpy() for i in (scan, scan, 7 * scan))
    np.testing.assert_array_equal(one, same)
    np.testing.assert_allclose(other, 7 * one, rtol=1e-4)


def test_voxels_next_to_nothing_do_not_change_the_field(scan, brain):
    """As interpolation leaves them at the rim; the field is fitted to logarithms."""
    dim = scan.copy()
    dim[tuple(np.argwhere(brain)[::50].T)] = 1e-3
    fields = [
        tissue_field(i.astype(np.float32), brain > 0, MM, atlas_terms(meta(i, AFFINE), load_atlas()))
        for i in (scan, dim)
    ]
    np.testing.assert_allclose(fields[1], fields[0], rtol=0.02)


def test_n4_is_there_for_those_who_want_it(scan, brain):
    inside, shading = brain > 0, coils(0)
    left = corrected(scan * shading, brain, "n4")["image"][0].numpy()[inside] / scan[inside]
    assert np.log(left).std() < 0.6 * np.log(shading[inside]).std()


def test_a_field_that_no_coil_has_is_flagged(scan, brain):
    steep = np.exp(np.linspace(-1.2, 1.2, SHAPE[1]))[None, :, None]
    assert "times across the brain" in corrected(scan * steep, brain)["flags"]
    assert "flags" not in corrected(scan * coils(1), brain)


@pytest.mark.parametrize("method", ["tissue", "n4"])
def test_what_has_no_zero_is_refused(brain, method):
    with pytest.raises(InputError, match="negative"):
        corrected(np.random.standard_normal(SHAPE), brain, method)


def test_prepared_scans_are_not_corrected_again(scan, brain):
    data = {"image": meta(scan), "brain_mask": meta(brain)}
    for item in ({**data, "prepared": True}, data):
        method = "tissue" if "prepared" in item else "none"
        np.testing.assert_array_equal(CorrectBiasFieldd("image", method=method)(item)["image"], data["image"])
    with pytest.raises(InputError, match="bias_field") as told:
        CorrectBiasFieldd("image", method="n5")
    assert all(method in told.value.message for method in METHODS)


def test_too_few_voxels_are_left_alone():
    ones = np.ones((6, 6, 6))
    np.testing.assert_array_equal(corrected(ones * np.arange(1, 7), ones)["image"][0], ones * np.arange(1, 7))
