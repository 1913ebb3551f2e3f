"""What several configs say alike stays alike.

MONAI cannot include one config in another: a macro (``%configs/train.json#volumes``) is looked for in the working
folder, and nothing inside of it can be overridden. So some things are said in several files, and compared here.
"""

import itertools
import json

import pytest
import torch
from monai.bundle import ConfigParser

from tests.conftest import ROOT

# what differs within a group on purpose; everything else that two of its configs have must be the same
TRAININGS = {
    "train": set(),
    "train_reconstruction": {"network_def", "loss", "learning_rate", "max_epochs", "validate#key_metric"},
    "train_segmentation": {"network_def", "loss", "learning_rate", "max_epochs", "validate#key_metric"}
    | {"subjects_per_batch", "slices_per_subject", "train#slices", "validate#slices"},
}
TRAININGS = {name: {*own, "ckpt_path", "checkpoint_dir", "augmentation"} for name, own in TRAININGS.items()}
for own in TRAININGS.values():
    own |= {f"{part}#{what}" for part in ("train", "validate") for what in ("preprocessing", "dataset#data#contrast")}
PURPOSES = {
    "calibrate": {"fusion_rule", "fusion_weights", "items", "records", "calibration"},
    "evaluate": {"items", "records"},
    "inference": {"contrast", "threshold", "dataloader", "inferer#model_file"},
}
PURPOSES = {
    name: {*own, "section", "volumes", "preprocessing", "dataset", "postprocessing", "evaluator#postprocessing"}
    | {"handlers", "run"}
    for name, own in PURPOSES.items()
}
CHAINS = ["prepare", "train", "train_reconstruction", "train_segmentation", "calibrate", "evaluate"]
# arguments that each config chooses for itself, and those that prepared data do not need
OWN_ARGUMENTS = {"keys", "allow_missing_keys", "mode", "contrast"}
NOT_NEEDED = {"method", "device"}


def config(name):
    return json.loads((ROOT / f"configs/{name}.json").read_text())


def leaves(content, path=""):
    """Every value of a config by its id."""
    if not isinstance(content, dict):
        return {path: content}
    return {k: v for key, part in content.items() for k, v in leaves(part, f"{path}#{key}".strip("#")).items()}


@pytest.mark.parametrize(
    ("group", "one", "other"),
    [(group, *pair) for group in (TRAININGS, PURPOSES) for pair in itertools.combinations(group, 2)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_two_configs_both_say_is_the_same(group, one, other):
    mine, theirs = leaves(config(one)), leaves(config(other))
    own = group[one] | group[other]
    for key in set(mine) & set(theirs):
        if not any(f"{key}#".startswith(f"{name}#") for name in own):
            assert mine[key] == theirs[key], f"{key} differs between {one}.json and {other}.json"
    for name in own:  # an exception that is none any more hides the next difference
        assert name in {key[: len(name)] for key in {**mine, **theirs}}, f"{name}: in neither config"


def test_all_trainings_normalise_alike():
    """Also what only one of them says, which the comparison of what two say cannot see."""
    parts = [
        {key: value for key, value in leaves(config(name)).items() if key.startswith(("normalise#", "normative#"))}
        for name in TRAININGS
    ]
    assert parts[0] and all(part == parts[0] for part in parts)


def chain(content):
    """The steps from file to normalised volume."""
    if "preprocessing" in content:
        return content["preprocessing"]["transforms"]
    return [*content["volumes"], content["normalise"]]


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_is_a_part_of_that_of_inference(name):
    whole = iter(chain(config("inference")))
    made_from_it = {"landmarks", "normative", "highest"} if name == "prepare" else set()
    not_needed = NOT_NEEDED | made_from_it
    for step in chain(config(name)):
        if "head" in (step.get("keys"), step.get("names")):  # of the preparation's quality sheet
            continue
        match = next((other for other in whole if other["_target_"] == step["_target_"]), None)
        assert match, f"{name}.json: {step['_target_']} is not a step of inference.json, or not in its place"
        assert set(match) - set(step) <= OWN_ARGUMENTS | not_needed, f"{name}.json: {step} lacks what inference has"
        for key in set(step) & set(match) - OWN_ARGUMENTS:
            by_recipe = isinstance(step[key], str) and step[key].startswith("$@recipe.")
            spawned = key == "device" and step[key] == "@device"  # its workers are no forks, and can use CUDA
            assert by_recipe or spawned or step[key] == match[key], f"{name}.json: {key} of {step['_target_']}"


@pytest.mark.parametrize("name", ["train", "train_reconstruction", "train_segmentation", "inference"])
@pytest.mark.parametrize(("workers", "where"), [(0, "meta"), (2, "cpu")])
def test_what_forked_workers_do_is_on_the_cpu(name, workers, where):
    parser = ConfigParser(config(name))
    parser.update({"device": "$torch.device('meta')", "num_workers": workers})
    assert parser.get_parsed_content("samples_device") == torch.device(where)
    steps = parser["to_device"] if name != "inference" else chain(parser.config)
    devices = [step["device"] for step in steps if "device" in step]
    assert devices == ["@samples_device"]


@pytest.mark.parametrize("part", ["reconstruction", "segmentation"])
def test_networks_are_run_as_they_were_trained(part):
    training, inference = config(f"train_{part}"), config("inference")[f"{part}_network"]
    trained = dict(training["network_def"])
    if part == "segmentation":
        assert trained["in_channels"] == "$2 * (2 * @neighbours + 1)"
        trained["in_channels"] = 2 * (2 * training["neighbours"] + 1)
    assert trained == inference
