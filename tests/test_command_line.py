import json
import re

import pytest

from bundle.command_line import check_overrides, configured, impersonal, record_run, runner_arguments
from bundle.errors import InputError, require_device
from tests.conftest import ROOT

RUN = ["run", "inference", "--config_file", str(ROOT / "configs/inference.json")]


def test_words_are_read_as_the_runner_reads_them():
    words = ["run", "x", "--a-b", "3", "--c=[1, 2]", "--d#e", "-1.5", "--flag", "--last", "a b"]
    assert runner_arguments(words) == {"a_b": 3, "c": [1, 2], "d#e": -1.5, "flag": True, "last": "a b"}


def test_a_file_of_arguments_counts_too(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"config_file": RUN[3], "contrast": "t2", "score": "location"}))
    config, overrides = configured(
        ["run", "inference", "--args_file", str(tmp_path / "args.json"), "--score", "atlas_z"]
    )
    assert overrides == {"contrast": "t2", "score": "atlas_z"} and "network_def" in config
    assert configured(["run"]) == ({}, {})


@pytest.mark.parametrize(
    "word", ["--contrast t2", "--network_def#features 1", "--fusion_maps#theirs x", "--handlers#0#x 1"]
)
def test_what_exists_or_may_be_added_is_not_told(word, recwarn):
    check_overrides([*RUN, *word.split()])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--contrst t2", "--contrast"),
        ("--grid#spacng 2", "--grid#spacing"),
        ("--network_def#featurs 96", "--network_def#features"),
        ("--zzz 1", ""),
        ("--nothing#here 1", ""),
    ],
)
def test_what_does_not_exist_is_refused(word, hint):
    with pytest.raises(InputError, match=rf"{word.split()[0]}: nothing of that name") as told:
        check_overrides([*RUN, *word.split()])
    assert (f"did you mean {hint}?" in told.value.message) == bool(hint)


def test_arguments_of_another_component(recwarn):
    other = ["--network_def#_target_", "bundle.networks.ResNetPatchLocator"]
    check_overrides([*RUN, *other, "--network_def#slices", "76"])
    with pytest.raises(InputError, match="network_def#slices"):
        check_overrides([*RUN, "--network_def#slices", "76"])


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("--spacing abc", "a number, such as 2.0"),
        ("--overwrite 3", "True or False"),
        ("--curvature_flow 1.5", "a whole number, such as 0"),
        ("--spatial_size 3", "a list"),
        ("--fusion_maps 3", "a dictionary"),
        ("--section 7", "would be read as 7; write ./7"),
        ("--score 7", "text; for a file or folder of that name write ./7"),
        ("--dataset_dir run#2", "would be read as 'run'; write ./run#2"),
        ("--output_dir a,b", "would be read as ('a', 'b'); write ./a,b"),
        ("--score sum#1", "would be read as 'sum'"),
        ("--dataset_dir --contrast t2", "--dataset_dir: needs a value"),
        ("--brain_mask", "--brain_mask: needs a value"),
    ],
)
def test_values_of_another_type_are_refused(word, wanted):
    with pytest.raises(InputError, match=re.escape(wanted)):
        check_overrides([*RUN, *word.split()])


def test_odd_paths_pass_as_they_are(recwarn):
    for path in ("./run#2", "/a,b/c", "it's", "'quoted'", "a b", "$@bundle_root + '/x'"):
        check_overrides([*RUN, "--dataset_dir", path, "--overwrite"])
    assert not recwarn.list


def test_a_process_without_home_and_name(monkeypatch):
    def nobody(*_):
        raise KeyError("uid")

    monkeypatch.setattr("bundle.command_line.getpass.getuser", nobody)
    monkeypatch.setattr("bundle.command_line.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert impersonal("/home/ann/x") == "/home/ann/x"


def test_a_record_keeps_others_and_no_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("LOGNAME", "ann")
    model = tmp_path / "model.pt"
    model.write_bytes(b"abc")
    record_run(tmp_path, "training", [model, tmp_path / "gone"], scan="/home/ann/x", other="/data/ann/y and ann")
    record_run(tmp_path, "inference")
    records = json.loads((tmp_path / "run.json").read_text())
    assert list(records) == ["training", "inference"]
    assert records["training"]["sha256"]["model.pt"].startswith("ba7816bf8f01cfea")
    assert records["training"]["scan"] == "~/x" and records["training"]["other"] == "/data/USER/y and ann"
    (tmp_path / "run.json").write_text("{broken")
    record_run(tmp_path, "again")
    assert list(json.loads((tmp_path / "run.json").read_text())) == ["again"]
    assert impersonal('"/mnt/ann"') == '"/mnt/USER"'


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x"])
def test_devices_that_are_not_there(device):
    require_device("cpu")
    with pytest.raises(InputError, match=device):
        require_device(device)
