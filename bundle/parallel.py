"""Several processes, one per GPU (or on the CPU, where that is wanted), started by ``torchrun``."""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from monai.data import Dataset
from torch import nn

from bundle.errors import InputError


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
    """The GPU of this process; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def distribute(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` on ``device``, its gradients averaged over the processes; on GPUs, so are batch statistics."""
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return nn.parallel.DistributedDataParallel(network.to(device), device_ids=[device])
    return nn.parallel.DistributedDataParallel(network.to(device))


def share_out(dataset: Dataset) -> range:
    """Indices of each process' part of ``dataset``, every item once; none for some if there are more processes."""
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
