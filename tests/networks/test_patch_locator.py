import pytest
import torch

from bundle.networks import PatchLocator, ResNetPatchLocator
from bundle.networks.patch_locator import plan_layers
from tests.published import Published

NETWORKS = [
    lambda: PatchLocator(patch_size=8, channels=4, features=8),
    lambda: PatchLocator(patch_size=12, channels=4, features=8),
    lambda: PatchLocator(patch_size=24, channels=4, features=8),
    lambda: ResNetPatchLocator(patch_size=8, chunk=7),
]


def trained(network):
    """Running statistics as after training, so that the normalisation is not the identity."""
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def one_by_one(network, image):
    """Every patch of ``[2, H, W]`` cut out and run alone: ``[4, H', W']``."""
    p = network.patch_size
    rows, cols = (n - p + 1 for n in image.shape[1:])
    answers = torch.stack(
        [network(image[None, :, i : i + p, j : j + p])[0, :, 0, 0] for i in range(rows) for j in range(cols)], -1
    )
    return answers.view(4, rows, cols)


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@torch.no_grad()
def test_dense_equals_every_patch_alone(make, stride):
    network = trained(make())
    image = torch.rand(2, network.patch_size + 9, network.patch_size + 6)
    image[1] = 0.37
    network.stride = 1
    alone = one_by_one(network, image)
    network.stride = stride
    dense = network(image[None])[0]
    torch.testing.assert_close(dense, alone[:, ::stride, ::stride], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slices", [100, 50])
@torch.no_grad()
def test_the_published_network_equals_its_restatement(slices):
    """Random weights and batch-norm statistics; outputs in percent, slices counted from 0."""
    network = trained(ResNetPatchLocator(chunk=5, slices=slices))
    for p in network.parameters():  # weights that hand on what comes in, biases and scales that are not trivial
        torch.nn.init.kaiming_normal_(p) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    patches, k = torch.rand(12, 1, 24, 24), torch.arange(12) * 4
    plane = ((k + 0.5) / slices).view(-1, 1, 1, 1).expand_as(patches)
    location, log_variance = network(torch.cat([patches, plane], 1))[..., 0, 0].chunk(2, 1)
    expected = Published().take_weights(network)(patches, 100 * k / slices)
    torch.testing.assert_close(100 * location, expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(log_variance + torch.tensor(100.0**2).log(), expected[1], atol=1e-4, rtol=0)
    assert expected[0].std(0).min() > 0.5  # percent: the answers differ


def test_the_published_network_trains_on_all_patches_at_once():
    """Batch norm sees one batch, whatever fits in a chunk."""
    network = ResNetPatchLocator(patch_size=8, chunk=3)
    image = torch.rand(8, 2, 8, 8)
    some = network(image)
    network.chunk = 100
    torch.testing.assert_close(network(image), some)


@pytest.mark.parametrize("make", NETWORKS)
def test_a_patch_gives_one_answer_and_gradients(make):
    network = make()
    pred = network(torch.rand(3, 2, network.patch_size, network.patch_size))
    assert pred.shape == (3, 4, 1, 1)
    pred.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_receptive_field_is_exactly_one_patch():
    network = trained(PatchLocator(patch_size=12, channels=4, features=8))
    image = torch.rand(1, 2, 16, 16, requires_grad=True)
    network(image)[0, :, 2, 1].sum().backward()
    touched = image.grad[0, 0].abs() > 0
    rows, cols = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (2, 13, 1, 12)


def test_slice_position_matters():
    network = trained(PatchLocator(patch_size=8, channels=4, features=8))
    image = torch.rand(1, 2, 8, 8)
    low, high = (torch.cat([image[:, :1], torch.full_like(image[:, 1:], z)], 1) for z in (0.1, 0.9))
    assert not torch.allclose(network(low), network(high), atol=1e-4)


@pytest.mark.parametrize("patch_size", [8, 12, 16, 20, 24, 28, 32, 36])
def test_layers_cover_exactly_the_patch(patch_size):
    field, jump = 1, 1
    for kernel, stride in plan_layers(patch_size):
        field += (kernel - 1) * jump
        jump *= stride
    assert field == patch_size


@pytest.mark.parametrize("patch_size", [5, 7, 18, 25])
def test_impossible_patch_sizes_are_refused(patch_size):
    with pytest.raises(ValueError, match="patch_size"):
        PatchLocator(patch_size=patch_size)


@pytest.mark.parametrize("make", [PatchLocator, ResNetPatchLocator])
def test_detached_variance_leaves_the_shared_layers_alone(make):
    network = make(patch_size=8, detach_variance=True)
    network(torch.rand(4, 2, 8, 8))[:, 2:].sum().backward()
    with_gradient = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {"variance_head"}


def test_torchscript_gives_the_same(tmp_path):
    network = trained(PatchLocator(patch_size=8, channels=4, features=8))
    torch.jit.script(network).save(tmp_path / "network.ts")
    image = torch.rand(1, 2, 14, 11)
    torch.testing.assert_close(torch.jit.load(tmp_path / "network.ts")(image), network(image))
