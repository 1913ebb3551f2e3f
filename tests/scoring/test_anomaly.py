import torch

from bundle.scoring import anomaly_channels, fill_outside
from bundle.scoring.anomaly import SQUARED_ERROR_FLOOR


def test_channels_by_hand():
    pred = torch.tensor([0.5, 0.25, -2.0, -3.0]).view(1, 4, 1, 1)
    location = torch.tensor([0.2, 0.65]).view(1, 2, 1, 1)
    channels = anomaly_channels(pred, location).flatten()
    torch.testing.assert_close(channels[0].exp(), torch.tensor(0.3**2 + 0.4**2))
    torch.testing.assert_close(channels[1].exp(), torch.exp(torch.tensor(-2.0)) + torch.exp(torch.tensor(-3.0)))


def test_a_perfect_answer_stays_finite():
    pred = torch.zeros(1, 4, 2, 2)
    error = anomaly_channels(pred, pred[:, :2])[:, 0]
    torch.testing.assert_close(error, torch.full_like(error, SQUARED_ERROR_FLOOR).log())


def test_outside_gets_the_lowest_score_of_each_channel_and_not_zero():
    scores = torch.randn(2, 4, 4, 4) - 10
    inside = torch.rand(1, 4, 4, 4) > 0.5
    filled = fill_outside(scores, inside)
    for channel, original in zip(filled, scores):
        torch.testing.assert_close(channel[inside[0]], original[inside[0]])
        assert (channel[~inside[0]] == original[inside[0]].min()).all()
