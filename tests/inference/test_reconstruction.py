import numpy as np
import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.inference import ReconstructionMapd
from bundle.networks import save_weights
from tests.conftest import ellipsoid, meta

BRAIN = ellipsoid((12, 14, 9), (5, 6, 3.5))


class Halve(nn.Module):
    """Takes off half, and notes what it saw."""

    def __init__(self):
        super().__init__()
        self.share, self.slices = nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, image):
        self.slices += len(image)
        return image * self.share


@pytest.fixture
def weights(tmp_path):
    save_weights(Halve(), tmp_path / "reconstruction_t1.pt")
    return tmp_path / "reconstruction_t1.pt"


@pytest.mark.parametrize(("contrast", "sign"), [("t1", -1), ("t2", 1), ("flair", 1)])
def test_residual_is_signed_and_inside_the_brain(weights, contrast, sign):
    image = meta(BRAIN * np.random.rand(*BRAIN.shape))
    network = Halve()
    nn.init.zeros_(network.share)  # the file's weights count, not these
    out = ReconstructionMapd("image", network, weights, contrast)({"image": image})["reconstruction"]
    np.testing.assert_allclose(out.numpy(), sign * 0.5 * image.numpy(), atol=1e-6)
    assert (out.affine == image.affine).all() and not network.training
    assert network.slices == (BRAIN > 0).any((0, 1)).sum()  # those without brain are left out


class TooMuch(Halve):
    """A GPU with room for one batch of slices."""

    def forward(self, image):
        if self.slices and image.device.type == "cpu" and not hasattr(self, "told"):
            self.told = True
            raise torch.cuda.OutOfMemoryError
        return super().forward(image)


def test_memory_that_runs_out_changes_nothing(weights):
    image = meta(np.random.rand(6, 7, 40))
    expected = ReconstructionMapd("image", Halve(), weights, "t1")({"image": image})["reconstruction"]
    with pytest.warns(UserWarning, match="goes on on the CPU"):
        found = ReconstructionMapd("image", TooMuch(), weights, "t1")({"image": image})["reconstruction"]
    torch.testing.assert_close(found, expected)


def test_without_weights_there_is_no_map_and_other_weights_are_refused(tmp_path, weights):
    data = {"image": meta(BRAIN)}
    assert set(ReconstructionMapd("image", Halve(), tmp_path / "none.pt", "t1")(data)) == {"image"}
    for content in (b"", b"not a model"):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"reconstruction_t1.pt: no weights of the configured Halve"):
            ReconstructionMapd("image", Halve(), weights, "t1")(data)
    save_weights(nn.Linear(2, 2), weights)
    with pytest.raises(InputError, match="no weights of the configured Halve"):
        ReconstructionMapd("image", Halve(), weights, "t1")(data)
