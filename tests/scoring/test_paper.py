import numpy as np
import pytest
import torch

from bundle.errors import InputError
from bundle.inference import PatchLocationInferer
from bundle.metrics import measure_methods
from bundle.networks import ResNetPatchLocator
from bundle.scoring import Fusion, fit_calibration
from bundle.scoring.paper import PAPER_SCORES, near, paper_channels, paper_quantiles, paper_score
from bundle.scoring.transforms import check_score
from tests.conftest import ellipsoid, meta
from tests.networks.test_patch_locator import trained
from tests.published import Published, published_heatmap


def test_channels_by_hand():
    pred = torch.tensor([0.5, 0.25, -2.0, -3.0]).view(1, 4, 1, 1, 1)
    channels = paper_channels(pred, torch.tensor([0.2, 0.65]).view(1, 2, 1, 1, 1)).flatten()
    torch.testing.assert_close(channels[0].exp(), torch.tensor(30.0**2 + 40.0**2))
    torch.testing.assert_close(channels[1], torch.tensor(-2.5 + np.log(1e4), dtype=torch.float32))
    same = paper_channels(pred, pred[:, :2])
    torch.testing.assert_close(same[0, 0], torch.full_like(same[0, 0], np.log(1e-10)))


@pytest.mark.parametrize("shift", [0, 5])
def test_heatmap_equals_the_published_one_of_every_voxel(shift):
    """Network, places, score, median filter and mask together, against plain torch; a brain at the grid's rim, too."""
    shape, patch = (18, 15, 7), 8
    inside = torch.as_tensor(ellipsoid(shape, (6, 5, 2), [8.5 - shift, 7 - shift, 3]))
    volume = torch.where(inside > 0, torch.rand(shape) + 0.1, 0.0)
    network = trained(ResNetPatchLocator(patch_size=patch, slices=shape[2]))
    for p in network.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    channels = PatchLocationInferer(patch, max_positions=97, output="paper")(volume[None, None], network)[0]
    expected = published_heatmap(Published().take_weights(network), volume, patch)
    score = paper_score("paper_masked", channels, inside[None] > 0)[0]
    torch.testing.assert_close(score, expected, atol=1e-3, rtol=1e-4)
    assert score[inside > 0].std() > 0.1
    lowest = paper_score("paper", channels, inside[None] > 0)[0]
    assert (lowest[inside == 0] == score[inside > 0].min()).all()
    torch.testing.assert_close(lowest[inside > 0], score[inside > 0])


def test_near_is_what_the_median_reaches():
    inside = torch.zeros(12, 12, 12, dtype=torch.bool)
    inside[5, 5, 0] = True
    assert near(inside).nonzero().min(0).values.tolist() == [2, 2, 0]
    assert near(inside).nonzero().max(0).values.tolist() == [8, 8, 3]


def test_thresholds_are_of_all_healthy_voxels_together():
    inside = torch.as_tensor(ellipsoid((10, 10, 8), (4, 4, 3)))[None]
    channels = [torch.randn(2, 10, 10, 8) + k for k in range(3)]
    quantiles = paper_quantiles(channels, [inside] * 3, (0.5, 0.98))
    values = torch.cat([c.sum(0)[inside[0] > 0] for c in channels])
    assert set(quantiles) == set(PAPER_SCORES)
    assert quantiles["paper"]["0.98"] == pytest.approx(float(values.quantile(0.98)), abs=1e-5)
    # a calibration without them refuses to guess
    calibration = fit_calibration(channels, [inside] * 3, "t1", 6.0, fusion=Fusion("sum", {"location": 1.0}))
    torch.testing.assert_close(
        calibration.score("paper", channels[0], inside), paper_score("paper", channels[0], inside > 0)
    )
    with pytest.raises(InputError, match="holds no score 'paper'"):
        calibration.threshold("paper", 0.98)
    assert all(check_score(name) == name for name in PAPER_SCORES)


def test_the_masked_score_is_judged_with_the_background():
    """Its zeros rank above a brain whose scores are below, as in the paper's figures."""
    inside = ellipsoid((12, 12, 8), (4, 4, 3))
    label, heatmap = np.zeros_like(inside), -2 * inside
    label[6, 6, 4] = 1
    heatmap[6, 6, 4] = -1  # the highest of the brain
    data = {"image": meta(inside), "label": meta(label), "heatmap": meta(heatmap), "lesion": meta(0 * label)}
    assert measure_methods(data, "paper")["paper"].values["auprc"] == 1
    masked = measure_methods(data, "paper_masked")["paper_masked"].values["auprc"]
    assert masked == pytest.approx(1 / (1 + (inside == 0).sum()))
