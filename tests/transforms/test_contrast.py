import numpy as np
import pytest
import torch
from scipy import stats

from bundle.data.dicom import named_contrast, names_agent
from bundle.data.files import calibrated_contrasts, model_file, of_contrast
from bundle.errors import InputError
from bundle.transforms import NormalizeBrainIntensityd, TellContrastd, contrast_likeness, fit_normative
from tests.conftest import ellipsoid, meta

SHAPE = (24, 28, 20)
GRID = {"spacing": 4.0, "spatial_size": list(SHAPE), "center": [0, 0, 0]}
BRAIN = ellipsoid(SHAPE, (11, 13, 9))
CONTRASTS = ("t1", "t2", "flair")
TISSUES = np.kron(np.random.default_rng(0).integers(0, 3, (6, 7, 5)), np.ones((4, 4, 4), int))  # fluid, grey, white
LEVELS = {"t1": (0.2, 0.5, 0.8), "t2": (0.9, 0.5, 0.3), "flair": (0.1, 0.7, 0.5)}


def scan(contrast, seed=99, noise=0.05):
    rng = np.random.default_rng(seed)
    return BRAIN * (np.array(LEVELS[contrast])[TISSUES] + rng.normal(0, noise, SHAPE)).clip(0.01)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    scale = NormalizeBrainIntensityd("image")
    for contrast in CONTRASTS:
        people = [scale({"image": meta(scan(contrast, s)), "brain_mask": meta(BRAIN)}) for s in range(5)]
        fit_normative(people, folder / f"normative_{contrast}.json", contrast, GRID)
        (folder / f"calibration_{contrast}.json").write_text("{}")
    return folder


def tell(models, image, contrast="auto", file="scan.nii.gz", **item):
    image = meta(image)
    image.meta["filename_or_obj"] = file
    out = TellContrastd("image", contrast, models)({"image": image, "brain_mask": meta(BRAIN), **item})
    assert out["image"].meta["contrast"] == out["contrast"] and "contrast" not in image.meta
    return out["contrast"], out.get("flags", "")


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("curve", [lambda v: v, lambda v: 900 * v**2 + 30, lambda v: np.sqrt(v)])
def test_a_contrast_is_told_whatever_the_scale(models, contrast, curve):
    assert tell(models, BRAIN * curve(scan(contrast))) == (contrast, "")


def test_a_large_lesion_changes_nothing(models):
    image = scan("t2")
    image[4:12, 6:16, 6:14] = 2.0
    assert tell(models, image) == ("t2", "")


def test_likeness_is_spearmans_correlation(models):
    image = scan("flair", noise=0.2)
    mean = np.array(LEVELS["t1"])[TISSUES]
    expected = stats.spearmanr(image[BRAIN > 0], mean[BRAIN > 0]).statistic
    found = contrast_likeness(torch.as_tensor(image)[None], models, ["t1"])["t1"]
    assert found == pytest.approx(expected, abs=0.06)  # the map is smoothed


def test_what_is_given_or_listed_is_believed(models):
    assert tell(models, scan("t1"), "flair") == ("flair", "")
    assert tell(models, scan("t1"), contrast="auto") == ("t1", "")
    assert tell(models, scan("t1"), "t2", file="flair.nii") == ("t2", "")
    item = {"image": meta(scan("t1")), "brain_mask": meta(BRAIN), "contrast": "t2"}
    assert TellContrastd("image", "auto", models)(item)["contrast"] == "t2"
    assert TellContrastd("image", "flair", models)(item)["contrast"] == "flair"
    assert TellContrastd("image", "auto", models)({**item, "contrast": "auto"})["contrast"] == "t1"  # of MONAI Label
    with pytest.raises(InputError, match=r"is pd by its list, and .* has t1, t2, flair only"):
        TellContrastd("image", "auto", models)({**item, "contrast": "pd"})
    with pytest.raises(InputError, match="contrast 'pd' is unknown"):
        TellContrastd("image", "pd", models)


def test_a_name_decides_only_between_equals(models):
    contrast, flags = tell(models, scan("t1"), file="x/sub-1_FLAIR.nii.gz")
    assert contrast == "t1" and flags == "its name says flair, its tissues t1, and it was taken for that"
    assert tell(models, scan("t1"), file="x/sub-1_T1w.nii.gz") == ("t1", "")
    noise = BRAIN * np.random.default_rng(3).uniform(0.1, 1, SHAPE)
    contrast, flags = tell(models, noise, file="x/sub-1_FLAIR.nii.gz")
    assert contrast == "flair" and flags.startswith("is like none of the contrasts")
    assert "taken for flair" in flags


def test_one_contrast_needs_no_telling(tmp_path):
    (tmp_path / "calibration_flair.json").write_text("{}")
    assert tell(tmp_path, scan("t1")) == ("flair", "")


def test_constant_scans_do_not_stop_it(models):
    contrast, flags = tell(models, BRAIN)
    assert contrast in CONTRASTS and "like none" in flags


def test_files_of_a_contrast(tmp_path):
    assert of_contrast(model_file("m", "auto"), "t1") == model_file("m", "t1")
    assert of_contrast(model_file("m", "auto"), "flair") == model_file("m", "flair")
    assert of_contrast("m/normative_auto.json", "t2") == "m/normative_t2.json"
    assert of_contrast("m/normative_auto.json", None) == "m/normative_auto.json"
    assert of_contrast("m/mine.pt", "t2") == "m/mine.pt"
    assert calibrated_contrasts(tmp_path) == ["t1"]
    (tmp_path / "calibration_flair.json").write_text("{}")
    assert calibrated_contrasts(tmp_path) == ["flair"]


@pytest.mark.parametrize(
    ("text", "contrast"),
    [
        *(("sub-01_ses-1_T1w", "t1"), ("MPRAGE sag", "t1"), ("AX T2 FLAIR", "flair"), ("t2_tirm_dark-fluid", "flair")),
        *(("T2W", "t2"), ("T2* GRE", None), ("T1 post gd", None), ("scan", None), ("start1", None)),
    ],
)
def test_names_of_contrasts(text, contrast):
    assert named_contrast(text) == contrast


@pytest.mark.parametrize(
    ("text", "agent"),
    [
        *(
            (t, True)
            for t in (
                "BraTS-01_t1ce",
                "sub_t1gd",
                "T1w + C",
                "t1c",
                "T1 post gd",
                "ax t1 KM",
                "sub_t1_post",
                "FLAIR+contrast",
                "T1 +Gd",
                "sub_T1CE_brain",
            )
        ),
        *((t, False) for t in ("t1_cor", "T1_center2", "t1cube", "postop_T1w", "FLAIR", "t2_space", "KM_T1w")),
    ],
)
def test_names_of_contrast_agents(models, text, agent):
    assert names_agent(text) == agent
    if agent:
        assert named_contrast(text) is None
    contrast, flags = tell(models, scan("t1"), file=f"x/{text}.nii.gz")
    assert contrast == "t1" and ("tells of a contrast agent" in flags) == agent
    assert ("tells of a contrast agent" in tell(models, scan("t1"), "t1", file=f"x/{text}.nii.gz")[1]) == agent
