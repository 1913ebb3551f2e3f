import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from bundle.metrics import LocalisationErrorMetric, average_precision


@pytest.mark.parametrize("decimals", [6, 1, 0], ids=["no ties", "ties", "many ties"])
@pytest.mark.parametrize("prevalence", [0.5, 0.01])
def test_average_precision_equals_scikit_learn(decimals, prevalence):
    for n in (1, 2, 50, 3000):
        labels = np.random.rand(n) < prevalence
        labels[np.random.randint(n)] = True
        scores = np.round(np.random.randn(n) + labels, decimals)
        ours = average_precision(torch.as_tensor(scores), torch.as_tensor(labels))
        assert ours == pytest.approx(average_precision_score(labels, scores), abs=1e-9)


def test_awkward_cases():
    assert np.isnan(average_precision(torch.rand(5), torch.zeros(5)))
    assert average_precision(torch.rand(5), torch.ones(5)) == 1
    constant = average_precision(torch.zeros(8), torch.tensor([1, 0, 0, 0, 1, 0, 0, 0]))
    assert constant == pytest.approx(0.25)  # chance is the prevalence


def test_localisation_error_in_mm():
    pred, label = torch.zeros(2, 4, 1, 2), torch.zeros(2, 3, 1, 2)
    pred[0, :2, 0, 0] = torch.tensor([0.03, 0.02])  # 3 mm and 4 mm off
    pred[1, :2, 0, 1] = 5.0  # not counted: no weight
    label[0, 2, 0, 0] = label[1, 2, 0, 0] = 1
    for euclidean, expected in ((False, 3.5 / 2), (True, 5 / 2)):
        metric = LocalisationErrorMetric((100.0, 200.0), euclidean)
        metric(pred, label)
        assert metric.aggregate().item() == pytest.approx(expected)
