import copy

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor

from bundle.errors import InputError
from bundle.inference import AutocastInferer, PatchLocationInferer
from bundle.networks import PatchLocator, save_weights
from bundle.scoring import anomaly_channels
from tests.conftest import ellipsoid
from tests.networks.test_patch_locator import trained

P = 8


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return trained(PatchLocator(patch_size=P, channels=4, features=8))


@pytest.fixture
def volume():
    brain = torch.as_tensor(ellipsoid((18, 16, 9), (7, 8, 3), center=(7, 8, 5)))
    return brain * (0.1 + torch.rand(brain.shape))


def brute_force(network, volume, voxel):
    """Anomaly channels of one voxel: its patch cut out of the padded slice, and where it should be."""
    i, j, k = voxel
    h, w, d = volume.shape
    padded = F.pad(volume[:, :, k], (P, P, P, P))
    start = (i - P // 2, j - P // 2)
    patch = padded[P + start[0] : 2 * P + start[0], P + start[1] : 2 * P + start[1]]
    pred = network(torch.stack([patch, torch.full_like(patch, (k + 0.5) / d)])[None])
    location = torch.tensor([(start[0] + P / 2) / h, (start[1] + P / 2) / w]).view(1, 2, 1, 1)
    return anomaly_channels(pred, location).flatten()


@pytest.mark.parametrize("max_positions", [1, 60, 400, 2**17])
@torch.no_grad()
def test_every_brain_voxel_equals_its_patch_alone(network, volume, max_positions):
    """One row, some rows, some slices or everything at once."""
    out = PatchLocationInferer(P, max_positions=max_positions)(volume[None, None], network)
    assert out.shape == (1, 2, *volume.shape)
    for voxel in torch.nonzero(volume)[::7].tolist():
        torch.testing.assert_close(
            out[0, :, voxel[0], voxel[1], voxel[2]], brute_force(network, volume, voxel), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("max_positions", [3, 2**17])
@torch.no_grad()
def test_strided_evaluation_is_exact_where_it_evaluates_and_bilinear_between(network, volume, stride, max_positions):
    dense = PatchLocationInferer(P, output="location")(volume[None, None], network)[0]
    inferer = PatchLocationInferer(P, stride, max_positions, output="location")
    with pytest.raises(ValueError, match="stride"):
        inferer(volume[None, None], network)
    strided = copy.deepcopy(network)
    strided.stride = stride
    out = inferer(volume[None, None], strided)[0]
    evaluated = torch.zeros_like(volume, dtype=torch.bool)
    evaluated[::stride, ::stride] = True
    assert (volume > 0)[evaluated].sum() > 10
    at = evaluated & (volume > 0)
    torch.testing.assert_close(out[:, at], dense[:, at], atol=1e-4, rtol=1e-4)
    between = [
        v for v in torch.nonzero(volume).tolist() if v[0] % stride == 1 and v[1] % stride == 0 and v[0] + stride < 18
    ]
    for i, j, k in between:
        a, b = out[:, i - 1, j, k], out[:, i - 1 + stride, j, k]
        if volume[i - 1, j, k] > 0 and volume[i - 1 + stride, j, k] > 0:
            torch.testing.assert_close(out[:, i, j, k], a + (b - a) / stride, atol=1e-4, rtol=1e-4)


def test_whole_slices_of_one_size_give_the_same(network, volume):
    shapes = set()

    def watched(image):
        shapes.add(tuple(image.shape))
        return network(image)

    one = PatchLocationInferer(P)(volume[None, None], network)
    other = PatchLocationInferer(P, whole_slices=True)(volume[None, None], watched)
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    h, w = volume.shape[:2]
    assert shapes == {(1, 2, h + P - 1, w + P - 1)}


def test_weights_are_loaded_once_and_those_of_another_network_refused(volume, tmp_path):
    """MONAI Label hands over a network with the weights of another contrast."""
    torch.manual_seed(1)
    scan = volume[None, None]
    own, given = (PatchLocator(P, channels=4, features=8).eval() for _ in range(2))
    save_weights(own, tmp_path / "model.pt")
    inferer = PatchLocationInferer(P, model_file=str(tmp_path / "model.pt"))
    expected = PatchLocationInferer(P)(scan, own)
    torch.testing.assert_close(inferer(scan, given), expected)
    (tmp_path / "model.pt").unlink()
    torch.testing.assert_close(inferer(scan, given), expected)
    save_weights(PatchLocator(P, channels=4, features=16), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt: no weights of the configured PatchLocator"):
        inferer(scan, PatchLocator(P, channels=4, features=8))


def test_outside_is_the_lowest_inside(network, volume):
    out = PatchLocationInferer(P)(volume[None, None], network)[0]
    inside = volume > 0
    for channel in out:
        assert (channel[~inside] == channel[inside].min()).all()


def test_volumes_do_not_mix_and_geometry_is_kept(network, volume):
    inferer = PatchLocationInferer(P)
    batch = MetaTensor(torch.stack([volume, volume.flip(0)])[:, None], affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    out = inferer(batch, network)
    torch.testing.assert_close(out[1].as_tensor(), inferer(volume.flip(0)[None, None], network)[0])
    torch.testing.assert_close(out.affine, batch.affine)


def test_location_output_is_the_networks(network, volume):
    out = PatchLocationInferer(P, output="location")(volume[None, None], network)
    assert out.shape == (1, 4, *volume.shape) and (out[:, :, volume == 0] == 0).all()
    anomaly = PatchLocationInferer(P)(volume[None, None], network)
    i, j, k = torch.nonzero(volume)[40].tolist()
    location = torch.tensor([i / 18, j / 16]).view(1, 2, 1, 1)
    expected = anomaly_channels(out[:, :, i, j, k].view(1, 4, 1, 1), location).flatten()
    torch.testing.assert_close(anomaly[0, :, i, j, k], expected)


@pytest.mark.parametrize(
    "can, expected", [({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False), (None, False)]
)
def test_auto_is_bfloat16_where_the_processor_has_it(network, volume, monkeypatch, can, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", can and (lambda: can), raising=False)
    out = {
        p: PatchLocationInferer(P, precision=p, output="location")(volume[None, None], network)
        for p in ("auto", "float32", "bfloat16")
    }
    assert torch.equal(out["auto"], out["bfloat16" if expected else "float32"])
    assert not torch.equal(out["float32"], out["bfloat16"])


def test_bfloat16_is_close(network, volume):
    out = [
        PatchLocationInferer(P, precision=p, output="location")(volume[None, None], network)
        for p in ("float32", "bfloat16")
    ]
    assert out[1].dtype == torch.float32
    torch.testing.assert_close(out[1], out[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8, 8), (8, 8, 8)])
def test_wrong_input_is_refused(network, shape):
    with pytest.raises(ValueError, match="expected volumes"):
        PatchLocationInferer(P)(torch.ones(shape), network)
    with pytest.raises(ValueError, match="no brain"):
        PatchLocationInferer(P)(torch.zeros(1, 1, 9, 9, 2), network)
    with pytest.raises(InputError, match="precision"):
        PatchLocationInferer(P, precision="float8")


def test_autocast_trains_in_bfloat16_on_the_cpu_too():
    network, image = PatchLocator(patch_size=8, channels=4, features=8), torch.rand(2, 2, 20, 20)
    network.train()
    plain, rounded = (AutocastInferer(enabled)(image, network) for enabled in (False, True))
    assert plain.dtype == torch.float32 and rounded.dtype == torch.float32  # losses are summed in it
    assert (rounded != plain).any() and torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, plain, atol=0.1, rtol=0.1)
    rounded.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())
    with pytest.raises(InputError, match="--amp yes is unknown"):
        AutocastInferer("yes")


@pytest.mark.parametrize("can", [True, False])
def test_training_takes_bfloat16_where_the_processor_has_it(monkeypatch, can):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": can}, raising=False)
    network, image = PatchLocator(patch_size=8, channels=4, features=8), torch.rand(1, 2, 20, 20)
    told, auto = (AutocastInferer(enabled)(image, network) for enabled in (can, "auto"))
    assert torch.equal(auto, told)


class LittleMemory:
    """A network on a GPU that holds so many voxels; 0 holds none, until it is moved to the CPU."""

    def __init__(self, network, voxels):
        self.network, self.voxels, self.calls = network, voxels, []

    def __call__(self, image):
        self.calls.append(image[:, 0].numel())
        if self.voxels is not None and image[:, 0].numel() > self.voxels:
            raise torch.cuda.OutOfMemoryError
        return self.network(image)

    def cpu(self):
        self.voxels = None
        return self

    def to(self, device):
        return self


@pytest.mark.parametrize(("voxels", "told"), [(3000, "chunks of 2048 patches"), (0, "done on the CPU")])
def test_memory_that_runs_out_gives_the_same_answer_in_smaller_chunks(network, volume, voxels, told):
    infer = PatchLocationInferer(P)
    expected = infer(volume[None, None], network)
    little = LittleMemory(network, voxels)
    with pytest.warns(UserWarning, match=told):
        torch.testing.assert_close(infer(volume[None, None], little), expected, atol=1e-5, rtol=1e-5)
    assert little.calls[0] > voxels and len(little.calls) > 1
