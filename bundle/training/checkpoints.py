"""Checkpoints from which a training goes on as if nothing had happened."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel

from bundle.command_line import record_run
from bundle.data.files import claim_folder, numbered_folder
from bundle.errors import InputError
from bundle.networks.weights import load_weights, save_weights, write_torch
from bundle.parallel import is_main

from .random_states import RandomStates


class TrainingCheckpoints:
    """Handler of a trainer: validate and save regularly and at the end, keep the model, go on where one stopped.

    Every ``interval`` epochs, after the validation, ``folder/MODEL_epoch=N.pt`` is written: network, optimiser,
    schedule, epoch, best metric and all random states. The last ``keep`` stay. Whenever the validation was the best so
    far, or after each with ``model="last"``, ``model_file`` gets the network as a flat state dict. Files are written
    under a temporary name, synced and renamed. On a CPU a training that was killed and resumed ends with the very
    weights of one that was not; with several processes the random states are not restored.

    Checkpoints beside those it starts from or makes, of an earlier training, are moved to ``folder/earlier_K``; so is,
    as a copy, the model file that a training replaces when it starts anew.

    Args:
        folder: of the checkpoints.
        model_file: the model, see ``model``.
        state: "network" and what else has a state, each with ``state_dict`` and ``load_state_dict``.
        validator: its evaluator; tells the best metric. It has been run by others at multiples of ``interval``.
        interval: epochs between checkpoints.
        transforms: whatever holds the random transforms.
        about: strings that a checkpoint must agree in, such as the contrast.
        resume: "" starts anew; "auto" goes on from the newest checkpoint that can be read, if there is one; else the
            checkpoint's path.
        init: model file whose weights a training that starts anew begins with; "": those of the network.
        keep: number of checkpoints.
        half: the model file's weights have 16 bit; checkpoints keep 32.
        model: whose weights are kept, of the "best" validation or the "last".

    Raises:
        InputError: a checkpoint that cannot be read, of another network, or of more epochs than are asked for; an
            interval below 1; another model to keep than these two.
    """

    def __init__(
        self,
        folder: str | Path,
        model_file: str | Path,
        state: Mapping[str, Any],
        validator: Any,
        interval: int,
        transforms: Any = (),
        about: Mapping[str, str] | None = None,
        resume: str = "",
        keep: int = 3,
        half: bool = False,
        model: str = "best",
        init: str = "",
    ) -> None:
        if model not in ("best", "last"):
            raise InputError(f"the model to keep is '{model}': use best or last")
        if interval < 1:
            raise InputError(f"val_interval {interval}: validate every epoch (1) or more rarely")
        self.folder, self.model_file, self.state = Path(folder), Path(model_file), dict(state)
        self.validator, self.interval, self.keep = validator, interval, keep
        self.random, self.about, self.resume = RandomStates(transforms), dict(about or {}), str(resume or "")
        self.half, self.model, self.init, self._validated = half, model, init, 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        self.validator.add_event_handler(Events.COMPLETED, self.keep_model)

    def files(self) -> list[Path]:
        """Checkpoints of this model, the newest first."""
        pattern = re.compile(re.escape(self.model_file.stem) + r"_epoch=\d+\.pt")
        return sorted((f for f in self.folder.glob("*.pt") if pattern.fullmatch(f.name)), key=_epoch, reverse=True)

    def start(self, engine: Engine) -> None:
        claim_folder(self.model_file.parent)
        record_run(self.model_file.parent, f"training {self.model_file.stem}")
        if self.resume in ("auto", "True"):
            for file in self.files():
                try:
                    content = self._read(file)
                except InputError as error:
                    warnings.warn(f"{error.message}: skipped", stacklevel=1)
                    continue
                self._restore(engine, file, content)
                return
            print(f"{self.folder}: no checkpoint to go on from; the training starts anew", flush=True)
        elif self.resume:
            self._restore(engine, Path(self.resume), self._read(Path(self.resume)))
            return
        if self.init:
            load_weights(_unwrapped(self.state["network"]), self.init)
        self._set_aside(self.files(), self.model_file)

    def _set_aside(self, files: Sequence[Path], model_file: Path | None = None) -> None:
        """Move checkpoints that this training does not go on from, so that nobody takes them for its own, and copy a
        model that it will replace.
        """
        replaced = [] if model_file is None or not model_file.is_file() else [model_file]
        if not [*files, *replaced] or not is_main():
            return
        away = numbered_folder(self.folder, "earlier")
        for file in files:
            file.rename(away / file.name)
        for file in replaced:
            shutil.copy2(file, away / file.name)
        what = f"{len(files)} checkpoints" + " and a copy of the model" * bool(replaced)
        print(f"{away}: {what} of an earlier training, which this one does not go on from", flush=True)

    def _read(self, file: Path) -> dict[str, Any]:
        if not file.is_file():
            raise InputError(
                f"{file}: no such checkpoint; --resume takes a checkpoint's file, or 'auto' for the newest"
            )
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, pickle and zipfile each have their own for a broken file
            raise InputError(f"{file}: cannot be read as a checkpoint of numbers; it is damaged or not ours") from error
        missing = {*self.state, "random", "best", "about"} - set(content if isinstance(content, dict) else ())
        if missing:
            raise InputError(f"{file}: no checkpoint of such a training (it has no '{sorted(missing)[0]}')")
        return content

    def _restore(self, engine: Engine, file: Path, content: Mapping[str, Any]) -> None:
        if content["about"] != self.about:
            raise InputError(f"{file}: is of a training with {content['about']}, not {self.about}")
        epochs, scheduler = engine.state.max_epochs or 0, self.state.get("lr_scheduler")
        cycle = getattr(scheduler, "T_max", None)
        for name, thing in self.state.items():
            try:
                _unwrapped(thing).load_state_dict(content[name])
            except Exception as error:  # each object has its own way to say that it is another's
                raise InputError(
                    f"{file}: its {name} does not fit; go on with the configs that it was trained with"
                ) from error
        if engine.state.epoch > epochs:
            raise InputError(f"{file}: has {engine.state.epoch} epochs already; --max_epochs {epochs} is less")
        engine.state.max_epochs = epochs
        # the schedule is that of the epochs asked for now
        if scheduler is not None and cycle is not None and cycle != scheduler.T_max:
            scheduler.T_max = cycle
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._get_closed_form_lr()):
                group["lr"] = rate
        self.validator.state.best_metric, self.validator.state.best_metric_epoch = content["best"]
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self.random.load_state_dict(content["random"])
        self._validated = engine.state.epoch
        self._set_aside([f for f in self.files() if _epoch(f) > engine.state.epoch])
        print(f"{file}: goes on after epoch {engine.state.epoch}", flush=True)

    def keep_model(self, validator: Any) -> None:
        self._validated = validator.state.epoch
        if is_main() and (self.model == "last" or validator.state.best_metric_epoch == validator.state.epoch):
            save_weights(_unwrapped(self.state["network"]), self.model_file, self.about, self.half)

    def save(self, engine: Engine) -> None:
        if not is_main():
            return
        state = {name: _unwrapped(thing).state_dict() for name, thing in self.state.items()}
        best = [float(self.validator.state.best_metric), int(self.validator.state.best_metric_epoch)]
        content = {**state, "random": self.random.state_dict(), "best": best, "about": self.about}
        write_torch(self.folder / f"{self.model_file.stem}_epoch={engine.state.epoch}.pt", content)
        for file in self.files()[self.keep :]:
            file.unlink()

    def finish(self, engine: Engine) -> None:
        """Validate and keep what was trained after the last multiple of the interval."""
        if self._validated < engine.state.epoch:
            self.validator.run(engine.state.epoch)
            self.save(engine)


def _epoch(file: Path) -> int:
    return int(file.stem.rpartition("=")[2])


def _unwrapped(thing: Any) -> Any:
    return thing.module if isinstance(thing, DistributedDataParallel) else thing
