import gc
import os
import signal
import weakref

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader

from bundle.errors import InputError
from bundle.inference import ScanDataset, ScanEvaluator


class Circle:
    """Keeps a volume, and itself, alive."""

    def __init__(self, volume):
        self.volume, self.me = volume, self


def prepare(item):
    if item["name"] == "broken":
        raise OSError("no such\nscan")
    return {**item, "image": torch.full((1, 2, 2), item["value"])}


def run(items, postprocessing, workers=0):
    """What came out for each scan, and how many scans were alive when the next began."""
    outputs, alive, volumes = [], [], []
    evaluator = ScanEvaluator(
        device="cpu",
        val_data_loader=DataLoader(ScanDataset(items, prepare), batch_size=1, num_workers=workers),
        network=torch.nn.Identity(),
        postprocessing=postprocessing,
    )

    @evaluator.on(Events.ITERATION_COMPLETED)
    def look(engine):
        outputs.append(dict(engine.state.output[0]))
        volume = outputs[-1].pop("circle", Circle(torch.zeros(1))).volume
        volumes.append(weakref.ref(volume))
        alive.append(sum(ref() is not None for ref in volumes))

    evaluator.run()
    return outputs, alive


def test_a_scan_that_fails_does_not_stop_the_others():
    def postprocessing(data):
        if data["value"] == 2:
            raise ValueError("two")
        return data

    items = [{"name": "a", "value": 1.0}, {"name": "broken", "value": 0.0}, {"name": "b", "value": 2.0}]
    outputs, _ = run([*items, {"name": "c", "value": 3.0}], postprocessing)
    assert "failure" not in outputs[0] and float(outputs[0]["pred"].max()) == 1
    assert "no such" in outputs[1]["failure"] and "\n" not in outputs[1]["failure"] and outputs[1]["name"] == "broken"
    assert outputs[2] == {"name": "b", "failure": outputs[2]["failure"]} and "two" in outputs[2]["failure"]
    assert float(outputs[3]["pred"].max()) == 3
    assert run([], postprocessing) == ([], [])


def killed(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_is_killed_ends_in_one_line(monkeypatch):
    monkeypatch.setitem(globals(), "prepare", killed)
    with pytest.raises(InputError, match=r"was killed .*fewer --num_workers"):
        run([{"name": "a", "value": 1.0}], lambda data: data, workers=1)


def test_a_scan_is_gone_before_the_one_after_the_next():
    gc.disable()  # Python's own search comes at its own times
    try:
        _, alive = run(
            [{"name": str(k), "value": float(k)} for k in range(6)],
            lambda data: {**data, "circle": Circle(data["pred"].clone())},
        )
    finally:
        gc.enable()
    assert max(alive) <= 2
    assert gc.get_freeze_count() == 0
