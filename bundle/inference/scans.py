"""Running over many scans, of which some may be broken."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from bundle.errors import InputError, explain


class ScanDataset(Dataset):
    """A dataset in which a scan that cannot be read or prepared becomes ``{"name", "failure"}``, with its ``purpose``
    if it has one, instead of an error.

    Args:
        data: items with a ``name`` each.
        transform: from files to tensors.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable | None = None) -> None:
        super().__init__(data, transform)

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:  # whatever is wrong with this scan, the others go on
            return {**_who(self.data[index]), "failure": explain(error)}


def _who(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item[key] for key in ("name", "purpose") if key in item}


class ScanEvaluator(SupervisedEvaluator):
    """MONAI's evaluator, one scan at a time, that goes on when a scan fails.

    After each iteration ``state.output`` is a list of one dictionary: the scan's results, or ``name`` and ``failure``
    (one line), as `ScanDataset` has them. With no scan at all, only the handlers of start and end are called. What a
    scan leaves behind is freed before the next one: its volumes refer to each other in circles, and hold memory, and
    one open file each where a worker process made them, until Python looks for circles.
    """

    def run(self, *args: Any, **kwargs: Any) -> None:
        if len(self.data_loader):  # type: ignore[arg-type]
            gc.freeze()  # there is nothing to free among all that was imported, and looking takes longest there
            try:
                super().run(*args, **kwargs)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise InputError(
                    "a process that reads scans was killed (was there enough memory?); what is done is kept: run again "
                    "with fewer --num_workers"
                ) from error
            finally:
                gc.unfreeze()
            return
        self.fire_event(Events.STARTED)
        self.fire_event(Events.COMPLETED)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, torch.Tensor]) -> dict:
        gc.collect()
        who = {key: value[0] for key, value in _who(batchdata).items()}
        if "failure" in batchdata:
            engine.state.output = [{**who, "failure": batchdata["failure"][0]}]
            return engine.state.output
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:
            engine.state.output = [{**who, "failure": explain(error)}]
            return engine.state.output


def seen_scans(engine: Any) -> Iterator[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Each scan of an iteration of `ScanEvaluator`: what came in (still collated, if it failed), and its results."""
    batch = engine.state.batch
    return zip(batch if isinstance(batch, list) else [batch], engine.state.output)
