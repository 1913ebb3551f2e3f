import numpy as np
import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.inference import SegmentationMapd
from bundle.networks import save_weights
from bundle.transforms import NormalizeBrainIntensityd, fit_normative, load_normative, with_normative
from tests.conftest import ellipsoid, meta

SHAPE = (12, 14, 9)
GRID = {"spacing": 4.0, "spatial_size": list(SHAPE), "center": [0, 0, 0]}
BRAIN = ellipsoid(SHAPE, (5, 6, 3.5))


class Middle(nn.Module):
    """Shows the slice itself of the second volume: the z-score, times a factor."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, slabs):
        assert slabs.shape[1] == 2 * 5
        return self.factor * slabs[:, 7:8]


def scan(seed):
    return meta(BRAIN * (0.5 + np.random.RandomState(seed).normal(0, 0.1, SHAPE)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    scale = NormalizeBrainIntensityd("image")
    for contrast, factor in (("t1", 1.0), ("flair", 2.0)):
        people = [scale({"image": scan(s), "brain_mask": meta(BRAIN)}) for s in range(4)]
        fit_normative(people, folder / f"normative_{contrast}.json", contrast, GRID)
        save_weights(Middle(factor), folder / f"segmentation_{contrast}.pt")
    return folder


def z_of(folder, contrast, image, sign):
    maps = load_normative(folder / f"normative_{contrast}.json")
    z = sign * (image[0].numpy() - maps.mean[0].numpy()) / maps.spread[0].numpy()
    return np.clip(z, -4, 10) / 4 * (image[0].numpy() > 0)


def mark(folder, contrast):
    files = folder / f"segmentation_{contrast}.pt", str(folder / f"normative_{contrast}.json")
    return SegmentationMapd("image", Middle(), files[0], contrast, normative=files[1])


def test_the_network_sees_intensity_and_z_score_of_five_slices(models):
    image = scan(9)
    out = mark(models, "t1")({"image": image})["segmentation"]
    np.testing.assert_allclose(out[0].numpy(), z_of(models, "t1", image, -1), rtol=1e-4, atol=1e-5)
    assert (out.affine == image.affine).all()


def test_a_network_that_learned_on_held_intensities_sees_such(models, tmp_path):
    maps = load_normative(models / "normative_t1.json")
    for file in models.glob("normative_t1.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_weights(Middle(), tmp_path / "segmentation_t1.pt", {"intensities": "held"})
    image = scan(9)
    image[0, 5, 6, 3] = 0.1  # as dark as fluid
    out = mark(tmp_path, "t1")({"image": image})["segmentation"]
    expected = maps.z(image.as_tensor(), "t1", telling=True).clamp(-4, 10) / 4
    torch.testing.assert_close(out.as_tensor(), expected, rtol=1e-4, atol=1e-5)
    assert expected[0, 5, 6, 3] < maps.z(image.as_tensor(), "t1").clamp(-4, 10)[0, 5, 6, 3] / 4
    volumes = with_normative(image.as_tensor(), maps, "t1", held=True)
    assert volumes[0][0, 5, 6, 3] == pytest.approx(0.35) and (volumes[0][image.as_tensor() == 0] == 0).all()


def test_of_the_contrast_auto_each_scan_has_its_own_network_and_normative_map(models):
    image, both = scan(9), mark(models, "auto")
    for contrast, sign, factor in (("flair", 1, 2.0), ("t1", -1, 1.0), ("flair", 1, 2.0)):
        out = both({"image": image, "contrast": contrast})["segmentation"][0].numpy()
        np.testing.assert_allclose(out, factor * z_of(models, contrast, image, sign), rtol=1e-4, atol=1e-5)


def test_without_weights_there_is_no_map_and_without_a_normative_map_an_error(models, tmp_path):
    assert "segmentation" not in mark(tmp_path, "t1")({"image": scan(9)})
    (tmp_path / "segmentation_t1.pt").write_bytes((models / "segmentation_t1.pt").read_bytes())
    with pytest.raises(InputError, match=r"normative_t1\.json: no normative map"):
        mark(tmp_path, "t1")({"image": scan(9)})
