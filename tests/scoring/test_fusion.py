import numpy as np
import pytest
import torch
from scipy import stats

from bundle.errors import InputError
from bundle.scoring import Fusion, usual_weights

INSIDE = torch.rand(1, 5, 6, 4) > 0.4
MAPS = {name: torch.randn(1, 5, 6, 4) for name in ("location", "atlas_z", "other")}
WEIGHTS = {"location": 2.0, "atlas_z": 1}


@pytest.mark.parametrize("rule", ["sum", "product", "maximum", "rank"])
def test_rules_are_what_they_say(rule):
    a, b = (MAPS[name][INSIDE].double().numpy() for name in WEIGHTS)
    expected = {
        "sum": (2 * np.where(a < 0, 0.05 * a, a) + np.where(b < 0, 0.05 * b, b)) / 3,
        "product": np.cbrt(np.maximum(a, 0) ** 2 * np.maximum(b, 0)),
        "maximum": np.maximum(a, b / 2),
        "rank": (2 * (stats.rankdata(a) - 1) + stats.rankdata(b) - 1) / 3 / (len(a) - 1),
    }[rule]
    fused = Fusion(rule, WEIGHTS)(MAPS, INSIDE)
    np.testing.assert_allclose(fused[INSIDE], expected, atol=1e-6)
    assert (fused[~INSIDE] == 0).all()


def test_what_one_map_finds_is_not_taken_away_by_the_others():
    one = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    maps = {"location": torch.tensor([[[[4.0, 0.0]]]]), "atlas_z": torch.tensor([[[[-5.0, 0.0]]]])}
    fused = Fusion("sum", {"location": 1.0, "atlas_z": 1.0})(maps, one)[0, 0, 0]
    assert fused[0] > 1.8 > fused[1] == 0


def test_weight_0_leaves_a_map_out():
    fusion = Fusion("sum", {"location": 1.0, "nobody's": 0})
    assert list(fusion.weights) == ["location"] and torch.equal(
        fusion(MAPS, INSIDE), Fusion("sum", {"location": 1})(MAPS, INSIDE)
    )


def test_what_cannot_be_made_is_not_fused(tmp_path):
    wanted = {"atlas_z": 1.0, "embedding": 0.5, "reconstruction": 1.0}
    assert usual_weights(wanted, tmp_path, "t2") == {"atlas_z": 1.0}
    (tmp_path / "embedding_t2.json").write_text("{}")
    (tmp_path / "reconstruction_t1.pt").write_bytes(b"")  # of another contrast
    assert usual_weights(wanted, tmp_path, "t2") == {"atlas_z": 1.0, "embedding": 0.5}


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
        ("sum", {"location": 0.0}, "must name the maps"),
        ("sum", {"location": 1, "atlas_z": -1.0}, "at least 0"),
        ("sum", {"location": "much"}, "weight of 'location'"),
        ("sum", {"location": float("nan")}, "at least 0"),
    ],
)
def test_mistakes_are_told(rule, weights, message):
    with pytest.raises(InputError, match=message):
        Fusion(rule, weights)
