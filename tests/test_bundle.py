"""The checkout as a bundle: what MONAI, the Model Zoo and users' scripts rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, onnx_export, verify_net_in_out

import bundle
from bundle.networks import PatchLocator, ResNetPatchLocator
from tests.conftest import ROOT

CONFIGS = ["train", "calibrate", "inference", "evaluate", "prepare"]  # those that do one thing and run it


def workflow(name: str, kind: str, **overrides):
    files = [str(ROOT / f"configs/{name}.json"), str(ROOT / "configs/grid_2mm.yaml")]
    parsed = ConfigWorkflow(files, workflow_type=kind, logging_file=False, bundle_root=str(ROOT), **overrides)
    parsed.parser["initialize"] = []
    parsed.initialize()
    return parsed


def test_top_level_is_as_promised():
    for name in ("bundle", "configs", "models", "scripts", "docs", "tests", "metadata.json", "LICENSE", "README.md"):
        assert (ROOT / name).exists(), name
    link = ROOT / "metadata.json"
    assert link.is_symlink() and str(link.readlink()) == "configs/metadata.json"
    assert json.loads(link.read_text()) == json.loads((ROOT / "configs/metadata.json").read_text())


def test_versions_agree():
    metadata = json.loads((ROOT / "metadata.json").read_text())
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert metadata["version"] in metadata["changelog"]
    assert f'__version__ = "{metadata["version"]}"' in (ROOT / "bundle/__init__.py").read_text()
    named = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    stated = {k: metadata[v] for k, v in named.items()} | metadata["required_packages_version"]
    assert {k: pins[k] for k in stated} == stated
    project = (ROOT / "pyproject.toml").read_text().lower()
    dependencies = set(re.findall(r'^    "([a-z0-9-]+)>=', project, re.M))
    assert dependencies == set(stated)


@pytest.mark.parametrize(("name", "kind"), [("train", "train"), ("inference", "infer"), ("evaluate", "infer")])
def test_properties_are_where_monai_looks(name, kind):
    assert workflow(name, kind).check_properties() == []


def test_names_that_others_override_exist():
    train, inference = (json.loads((ROOT / f"configs/{n}.json").read_text()) for n in ("train", "inference"))
    overrides = {
        "contrast",
        "max_epochs",
        "learning_rate",
        "patch_size",
        "beta",
        "val_interval",
        "device",
        "dataset_dir",
    }
    assert overrides <= set(train)
    assert {"contrast", "score", "brain_mask", "output_dir", "network_def", "inferer", "preprocessing"} <= set(
        inference
    )
    assert {"postprocessing", "handlers", "bundle_root", "device", "dataset_dir"} <= set(inference)
    assert any("CheckpointLoader" in str(handler) for handler in inference["handlers"])
    for name in CONFIGS:
        assert "run" in json.loads((ROOT / f"configs/{name}.json").read_text())


def test_no_link_of_the_documentation_is_dead():
    pages = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "models/README.md")
    for page in (*(ROOT / page for page in pages), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
        for config in re.findall(r"configs/[\w/]+\.(?:json|yaml)", page.read_text()):
            assert (ROOT / config).is_file(), f"{page.name}: {config}"


def figures_of(page, label):
    """First figure of each cell of the first row of a page's tables that begins with ``label``."""
    row = re.search(rf"^\| {re.escape(label)} \|[ *]*\d.*", (ROOT / page).read_text(), re.MULTILINE)[0]
    return [float(cell.strip(" *").split(" ")[0]) for cell in row.split("|")[2:-1]]


def test_every_page_has_the_same_figures_of_the_real_patients():
    rows = {"fusion": "fusion (default)", "location": "location alone", "atlas_z": "atlas z-score alone"}
    results = {name: figures_of("docs/results.md", f"`{name}`") for name in (*rows, "intensity")}
    card = {
        name: figures_of("docs/README.md", f"AUPRC, {row}" if name == "fusion" else row) for name, row in rows.items()
    }
    assert card == {name: results[name] for name in rows}
    assert figures_of("README.md", "this bundle") == results["fusion"]
    assert figures_of("README.md", "baseline: z-score of the brightness") == results["atlas_z"]
    assert figures_of("README.md", "baseline: brightness (T1w: darkness)") == results["intensity"]
    told = json.loads((ROOT / "configs/metadata.json").read_text())["eval_metrics"]
    of_fusion = [value for name, value in told.items() if name.endswith("fusion")]
    assert of_fusion == results["fusion"][: len(of_fusion)]


def test_one_version_everywhere():
    version = json.loads((ROOT / "configs/metadata.json").read_text())["version"]
    assert bundle.__version__ == version
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    "goal, given, expected", [("infer", [], "auto"), ("train", [], "t1"), ("infer", ["CONTRAST=t2"], "t2")]
)
def test_make_hands_over_the_contrast(goal, given, expected):
    command = ["make", "--silent", "-o", ".venv/installed", "RUN=echo", "SCAN=a b", goal, *given]
    environment = {k: v for k, v in os.environ.items() if k != "CONTRAST"}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"--contrast {expected}" in said


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_no_python_hides_in_the_configs():
    for file in (ROOT / "configs").glob("*.json"):
        for expression in re.findall(r'"(\$[^"]*)"', file.read_text()):
            assert len(expression) <= 100, f"{file.name}: {expression}"


def test_no_target_of_the_configs_is_a_module_too():
    """From Python 3.12 on `pydoc.locate`, by which MONAI finds a target, finds the module."""
    texts = [file.read_text() for file in [*(ROOT / "configs").glob("*.json"), *(ROOT / "configs/datasets").iterdir()]]
    targets = {target for text in texts for target in re.findall(r'_target_"?: "?(bundle\.[\w.]+)', text)}
    assert "bundle.scoring.model_files" in targets
    for target in targets:
        path = ROOT / target.replace(".", "/")
        assert not path.is_dir() and not path.with_suffix(".py").exists(), target


@pytest.mark.parametrize("name", ["train", "inference"])
def test_network_matches_the_metadata(name):
    verify_net_in_out(
        "network_def",
        meta_file=str(ROOT / "configs/metadata.json"),
        config_file=str(ROOT / f"configs/{name}.json"),
        device="cpu",
    )


def test_one_override_switches_the_network():
    default = workflow("inference", "infer").network_def
    published = workflow("inference", "infer", **{"network_def#_target_": "bundle.networks.ResNetPatchLocator"})
    assert isinstance(default, PatchLocator) and isinstance(published.network_def, ResNetPatchLocator)
    assert default.patch_size == published.network_def.patch_size == 8


def test_both_grids_train_the_network_that_they_infer_with():
    for name, size in (("grid_2mm", 8), ("grid_1mm", 24), (None, 8)):
        files = [
            [f"{ROOT}/configs/{c}.json", *([f"{ROOT}/configs/{name}.yaml"] if name else [])]
            for c in ("train", "inference")
        ]
        states = []
        for file in files:
            parsed = ConfigWorkflow(file, workflow_type=None, logging_file=False, bundle_root=str(ROOT))
            parsed.parser["initialize"] = []
            parsed.initialize()
            network = parsed.parser.get_parsed_content("network_def")
            assert network.patch_size == size
            states.append({k: v.shape for k, v in network.state_dict().items()})
        assert states[0] == states[1]


def test_other_runtimes_equal_torch(tmp_path):
    """TorchScript as `ckpt_export` makes it, and ONNX with any height and width, from the shipped weights."""
    runtime = pytest.importorskip("onnxruntime")
    files = {"meta_file": str(ROOT / "configs/metadata.json"), "config_file": str(ROOT / "configs/inference.json")}
    weights = str(ROOT / "models/model.pt")
    network = PatchLocator(patch_size=8).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    ckpt_export("network_def", str(tmp_path / "model.ts"), weights, **files)
    scripted = torch.jit.load(tmp_path / "model.ts", map_location="cpu")
    axes = {"image": [0, 2, 3], "pred": [0, 2, 3]}
    options = {"input_names": ["image"], "output_names": ["pred"], "dynamic_axes": axes, "dynamo": False}
    onnx = str(tmp_path / "model.onnx")
    onnx_export("network_def", onnx, weights, use_trace=True, converter_kwargs=options, **files)
    session = runtime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    for shape in ((1, 2, 8, 8), (3, 2, 31, 20)):
        image = torch.rand(shape)
        expected = network(image).detach()
        torch.testing.assert_close(scripted(image), expected, atol=1e-5, rtol=1e-5)
        (out,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("contrast", ["t1", "t2", "flair"])
def test_shipped_weights_fit_the_default_configs(contrast):
    parsed = workflow("inference", "infer", contrast=contrast)
    model = Path(parsed.parser.get_parsed_content("ckpt_path"))
    assert model.name == ("model.pt" if contrast == "t1" else f"model_{contrast}.pt")
    parsed.network_def.load_state_dict(torch.load(model, weights_only=True), strict=True)
    calibration = parsed.parser.get_parsed_content("calibration").load()  # refused beside another model or grid
    assert calibration.contrast == contrast and calibration.provenance["subjects"] >= 15
    point = parsed.parser.get_parsed_content("operating_point")
    assert calibration.point("fusion", point) > calibration.point("fusion", "screening") > 1
    for file in model.parent.iterdir():
        assert file.stat().st_size < 10e6, f"{file} is too large to be shipped"
