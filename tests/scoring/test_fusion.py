import numpy as np
import pytest
import torch
from scipy import stats

from bundle.errors import InputError
from bundle.scoring import Fusion

INSIDE = torch.rand(1, 5, 6, 4) > 0.4
MAPS = {name: torch.randn(1, 5, 6, 4) for name in ("location", "atlas_z", "other")}
WEIGHTS = {"location": 2.0, "atlas_z": 1}


@pytest.mark.parametrize("rule", ["sum", "product", "maximum", "rank"])
def test_rules_are_what_they_say(rule):
    a, b = (MAPS[name][INSIDE].double().numpy() for name in WEIGHTS)
    expected = {
        "sum": (2 * a + b) / 3,
        "product": np.cbrt(np.maximum(a, 0) ** 2 * np.maximum(b, 0)),
        "maximum": np.maximum(a, b / 2),
        "rank": (2 * (stats.rankdata(a) - 1) + stats.rankdata(b) - 1) / 3 / (len(a) - 1),
    }[rule]
    fused = Fusion(rule, WEIGHTS)(MAPS, INSIDE)
    np.testing.assert_allclose(fused[INSIDE], expected, atol=1e-6)
    assert (fused[~INSIDE] == 0).all()


def test_ties_share_their_rank_and_one_voxel_has_one():
    constant = {"location": torch.ones(1, 2, 2, 2)}
    fused = Fusion("rank", {"location": 1.0})(constant, torch.ones(1, 2, 2, 2) > 0)
    assert (fused == 0.5).all()
    single = torch.zeros(1, 2, 2, 2) > 0
    single[0, 0, 0, 0] = True
    assert Fusion("rank", {"location": 1.0})(constant, single).sum() == 0


def test_a_missing_map_is_an_error_not_a_zero():
    with pytest.raises(InputError, match="needs the map 'diffusion'"):
        Fusion("sum", {"location": 1.0, "diffusion": 1.0})(MAPS, INSIDE)


@pytest.mark.parametrize(
    ("rule", "weights", "message"),
    [
        ("mean", WEIGHTS, "'mean' is unknown: use one of sum, product"),
        ("sum", {"location": 1, "intensity": 1}, "'intensity' is no z-score; only fusion_rule 'rank'"),
        ("sum", {}, "must name the maps"),
        ("sum", {"fusion": 1.0}, "must name the maps"),
        ("sum", {"location": 0.0}, "above 0"),
        ("sum", {"location": "much"}, "weight of 'location'"),
        ("sum", {"location": float("nan")}, "above 0"),
    ],
)
def test_mistakes_are_told(rule, weights, message):
    with pytest.raises(InputError, match=message):
        Fusion(rule, weights)
