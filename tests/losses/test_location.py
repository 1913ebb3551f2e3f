import numpy as np
import pytest
import torch
from torch.distributions import Normal

from bundle.losses import BetaNLLLoss, FaithfulLoss, LocationMSELoss

LOSSES = [BetaNLLLoss(0.5), LocationMSELoss(), FaithfulLoss()]


def batch(n=5):
    pred = torch.randn(n, 4, 2, 3, requires_grad=True)
    label = torch.cat([torch.rand(n, 2, 2, 3), torch.randint(0, 2, (n, 1, 2, 3)).float()], 1)
    return pred, label


def test_beta_zero_is_the_likelihood():
    pred, label = batch()
    nll = -Normal(pred[:, :2], (0.5 * pred[:, 2:]).exp()).log_prob(label[:, :2]) - 0.5 * np.log(2 * np.pi)
    expected = (nll * label[:, 2:]).sum() / label[:, 2:].sum()
    torch.testing.assert_close(BetaNLLLoss(0.0)(pred, label), expected)


def test_beta_one_gives_the_mean_the_gradient_of_the_squared_error():
    pred, label = batch()
    (gradient,) = torch.autograd.grad(BetaNLLLoss(1.0)(pred, label), pred)
    (expected,) = torch.autograd.grad(0.5 * LocationMSELoss()(pred, label), pred)
    torch.testing.assert_close(gradient[:, :2], expected[:, :2])


def test_beta_weights_each_term_by_the_variance():
    pred, label = batch(1)
    label[:, 2] = 0
    label[0, 2, 1, 2] = 1
    mean, log_variance, target = pred[0, :2, 1, 2], pred[0, 2:, 1, 2], label[0, :2, 1, 2]
    nll = 0.5 * (log_variance + (mean - target) ** 2 / log_variance.exp())
    torch.testing.assert_close(BetaNLLLoss(0.5)(pred, label), (nll * (0.5 * log_variance).exp()).sum())


def test_the_loss_in_percent_is_that_of_percent():
    pred, label = batch()
    mean, log_variance = 100 * pred[:, :2], pred[:, 2:] + 2 * np.log(100)
    nll = 0.5 * (log_variance + (mean - 100 * label[:, :2]) ** 2 / log_variance.exp()) * (0.5 * log_variance).exp()
    expected = (nll * label[:, 2:]).sum() / label[:, 2:].sum()
    torch.testing.assert_close(BetaNLLLoss(0.5, units=100)(pred, label), expected)
    gradients = [torch.autograd.grad(BetaNLLLoss(0.5, units)(pred, label), pred)[0] for units in (1, 100)]
    torch.testing.assert_close(gradients[1], 100 * gradients[0])  # which Adam does not see


def test_faithful_mean_is_as_without_variance():
    pred, label = batch()
    (gradient,) = torch.autograd.grad(FaithfulLoss()(pred, label), pred)
    (expected,) = torch.autograd.grad(0.5 * LocationMSELoss()(pred, label), pred)
    torch.testing.assert_close(gradient[:, :2], expected[:, :2])
    assert gradient[:, 2:].abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_weightless_patches_do_not_count(loss):
    pred, label = batch()
    changed = torch.where(label[:, 2:] > 0, label, 1e3)
    changed[:, 2] = label[:, 2]
    torch.testing.assert_close(loss(pred, changed), loss(pred, label))
    label[:, 2] = 0
    assert loss(pred, label) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_patches_and_slices_give_one_loss_and_gradient(loss):
    """The same patches, as a batch of patches or as a map over a slice."""
    pred, label = batch(1)
    (dense,) = torch.autograd.grad(loss(pred, label), pred)
    patches, labels = (t.permute(2, 3, 1, 0).reshape(6, -1, 1, 1) for t in (pred, label))
    torch.testing.assert_close(loss(patches, labels), loss(pred, label))
    (single,) = torch.autograd.grad(loss(patches, labels), pred)
    torch.testing.assert_close(single, dense)


def test_mismatched_shapes_and_beta_are_refused():
    with pytest.raises(ValueError, match="expected"):
        LocationMSELoss()(torch.rand(1, 4, 2, 2), torch.rand(1, 3, 3, 3))
    with pytest.raises(ValueError, match="beta"):
        BetaNLLLoss(1.5)
