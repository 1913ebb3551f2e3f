"""Several processes: one per GPU (or on the CPU, where that is wanted), started by ``torchrun``; or the tasks of a job
array, which never speak to each other (``--shard 3/40``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from monai.data import Dataset
from torch import nn

from bundle.errors import InputError

T = TypeVar("T")


def join_processes() -> None:
    """Join the group of processes that ``torchrun`` started: NCCL on GPUs, Gloo on the CPU.

    Raises:
        InputError: not started by ``torchrun``.
    """
    if "LOCAL_RANK" not in os.environ:
        raise InputError("the multi_gpu configs need several processes: start them with torchrun --nproc_per_node=N")
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        # Ignite's own set-up, all processes at once: it would otherwise wait for the others when one first asks
        idist.initialize("nccl" if torch.cuda.is_available() else "gloo")


def leave_processes() -> None:
    """Close the group, together: a process that goes first can take another, still in a call, down with it."""
    if dist.is_initialized():
        dist.barrier()
    idist.finalize()


def local_device() -> torch.device:
    """The GPU of this process; the CPU where there is none.

    Raises:
        InputError: more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, number = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= number:
        raise InputError(
            f"process {rank + 1} has no GPU, of which there are {number}: start torchrun with"
            f" --nproc_per_node={number}, or with CUDA_VISIBLE_DEVICES= before it, which takes the CPU"
        )
    return torch.device("cuda", rank)


def distribute(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` on ``device``, its gradients averaged over the processes; on GPUs, so are batch statistics."""
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return nn.parallel.DistributedDataParallel(network.to(device), device_ids=[device])
    return nn.parallel.DistributedDataParallel(network.to(device))


def share_out(dataset: Dataset, each: bool = False) -> range:
    """Indices of each process' part of ``dataset``, every item once; none for some if there are more processes.

    Raises:
        InputError: there are more, but ``each`` needs an item, as where processes wait for each other's figures.
    """
    number, of = len(dataset), dist.get_world_size()
    if each and number < of:
        raise InputError(
            f"{of} processes, but {number} scans in 'validation': start torchrun with --nproc_per_node={max(number, 1)}"
        )
    return range(dist.get_rank(), len(dataset), dist.get_world_size())


def is_main() -> bool:
    """Whether this is the process that writes what there is one of: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of their ranks, in every process."""
    if not dist.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return list(chain.from_iterable(parts))


@dataclass(frozen=True)
class Shard:
    """Which part of a run this process does: the ``number``-th (from 0) of ``total``."""

    number: int = 0
    total: int = 1

    @classmethod
    def of(cls, text: str | Shard) -> Shard:
        """Of ``3/40``, the third of forty; of ``torchrun``, this process' part of those that it started; an empty text
        is the whole.

        Raises:
            InputError: anything else.
        """
        if isinstance(text, Shard):
            return text
        if text == "torchrun" and {"RANK", "WORLD_SIZE"} <= set(os.environ):
            text = f"{int(os.environ['RANK']) + 1}/{os.environ['WORLD_SIZE']}"
        match = re.fullmatch(r"(\d+)/(\d+)", str(text))
        if match and 1 <= int(match[1]) <= int(match[2]):
            return cls(int(match[1]) - 1, int(match[2]))
        if text:
            raise InputError(f"--shard {text}: name a part and how many there are, such as 3/40; the first is 1/40")
        return cls()

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``total``-th of ``items``: neighbours, which are alike, go to different shards."""
        return list(items)[self.number :: self.total]

    def __bool__(self) -> bool:
        """Whether there are others."""
        return self.total > 1

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.total}" if self else ""


def share(items: Sequence[T], shard: str = "") -> list[T]:
    """Those of ``items`` that belong to a shard, see `Shard`."""
    return Shard.of(shard).share(items)
