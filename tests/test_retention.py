"""scripts/retention.py on a phantom: what no step takes away is 1, what a mask cuts off is missing."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bundle.data import load_datalist
from tests.conftest import CENTER, GRID, ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import retention

SMALL = {"spacing": GRID["spacing"], "spatial_size": GRID["spatial_size"], "grid_center": list(CENTER)}


@pytest.fixture(scope="module")
def scan(cohort, tmp_path_factory):
    """A phantom whose prepared image is its raw scan too: stripped, and in the atlas' space."""
    folder = tmp_path_factory.mktemp("healthy")
    item = json.loads((cohort / "datalist.json").read_text())["validation"][0]
    item |= {key: str(cohort / item[key]) for key in ("image", "brain_mask")}
    item |= {"to_atlas": np.eye(4).tolist(), "source": {"image": item["image"]}}
    (folder / "datalist.json").write_text(json.dumps({"test": [item]}))
    return load_datalist(folder, "test")[0]


def test_a_lesion_is_followed_through_the_chain(scan):
    chain = retention.Chain("t1", "", {**SMALL, "bias_field": "none"})
    found = retention.follow_planted(chain, scan, 40, "t1", [0, 1])
    assert list(found) == ["planted", "ml", retention.HEALTHY_MASK, *retention.STEPS.values()]
    assert found["planted"] < -retention.LEAST_CONTRAST and 5 < found["ml"] <= 40
    assert found["mask"] == pytest.approx(1, abs=0.05) and found["bias field"] == pytest.approx(found["grid"])
    assert all(0.8 < found[step] < 1.2 for step in retention.STEPS.values()), found


def test_a_lesion_stays_out_of_fluid(scan, tmp_path):
    labels = nib.load(scan["brain_mask"])
    for label in (1, 4):  # all tissue, all fluid
        nib.save(
            nib.Nifti1Image((labels.get_fdata() * label).astype(np.uint8), labels.affine), tmp_path / f"{label}.nii"
        )
    chain = retention.Chain("t1", "", {**SMALL, "bias_field": "none"})
    anatomies = retention.Anatomies([], {"csf": {4}, "grey": {1}})
    use = (chain, {**scan, "anatomy_label": str(tmp_path / "1.nii")}, 40, "t1", [0, 1])
    assert retention.follow_planted(*use, anatomies=None) and not anatomies
    anatomies.files["anybody"] = set()
    assert retention.follow_planted(*use, anatomies=anatomies) == retention.follow_planted(*use)
    use[1]["anatomy_label"] = str(tmp_path / "4.nii")
    assert retention.follow_planted(*use, anatomies=anatomies) == {}


def test_what_the_healthy_mask_leaves_out_too_is_not_the_lesions_doing(scan, monkeypatch):
    chain = retention.Chain("t1", "", {**SMALL, "bias_field": "none"})
    whole, usual = chain.brain(scan["source"]["image"]), retention.follow_planted(chain, scan, 40, "t1", [0, 1])
    assert whole.shape == nib.load(scan["image"]).shape
    assert usual[retention.HEALTHY_MASK] == pytest.approx(usual["mask"])
    monkeypatch.setattr(chain, "brain", lambda file: np.zeros_like(whole))
    found = retention.follow_planted(chain, scan, 40, "t1", [0, 1])
    assert found[retention.HEALTHY_MASK] == 0 and found["mask"] == pytest.approx(usual["mask"])


def test_what_only_the_prepared_mask_calls_brain_gets_no_lesion(scan, monkeypatch):
    chain = retention.Chain("t1", "", {**SMALL, "bias_field": "none"})
    file, mask = scan["source"]["image"], nib.load(scan["brain_mask"])
    brain, use = mask.get_fdata() > 0, (file, mask.affine, mask.affine)  # the scan lies in the atlas' space
    atlas = ndimage.affine_transform(
        chain.atlas[0].numpy(), np.linalg.inv(chain.atlas.affine) @ mask.affine, output_shape=brain.shape, order=0
    )
    everywhere = np.ones_like(brain)
    np.testing.assert_array_equal(chain.agreed(everywhere, *use), brain | (atlas > 0))
    np.testing.assert_array_equal(chain.agreed(~brain, *use), ~brain & (atlas > 0))
    # the same scan in a file that runs the other way along two axes
    turned = nib.as_closest_canonical(mask).affine @ np.diag([-1, -1, 1, 1])
    turned[:3, 3] += mask.affine[:3, :2] @ (np.array(brain.shape[:2]) - 1)
    found = chain.agreed(everywhere, file, turned, turned)
    np.testing.assert_array_equal(found[::-1, ::-1], brain | (atlas > 0))
    planted = []
    odd = np.indices(brain.shape)[0] % 2 == 1
    for part in (everywhere, odd, ~odd):
        monkeypatch.setattr(chain, "agreed", lambda brain, *_, part=part: brain & part)
        planted.append(retention.follow_planted(chain, scan, 40, "t1", [0, 1]).get("ml", 0))
    assert planted[0] == pytest.approx(planted[1] + planted[2]) and planted[0] > max(planted[1:])


def test_shading_is_planted_and_looked_for(scan):
    none = retention.follow_shading(retention.Chain("t1", "", {**SMALL, "bias_field": "none"}), scan, [0])
    assert none == pytest.approx(0, abs=1e-3)
    assert 0.3 < retention.follow_shading(retention.Chain("t1", "", SMALL), scan, [0]) <= 1
