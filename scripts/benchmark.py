"""How fast the bundle is on this machine: ratios measured in one run, as text and, with --output, as JSON.

python scripts/benchmark.py [--device cuda] [--output benchmark.json] [--quick]
python scripts/benchmark.py --head FILE       # where the time of one head goes, from its file to the answer
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def resident_gib() -> float:
    """Most memory this process has held so far, GiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: the other figure starts at what the calling program held
        return int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


TORCH_LOADED = resident_gib()  # before anything of ours is imported

from monai.bundle import ConfigWorkflow  # noqa: E402
from monai.transforms import Compose, Orientationd, compose  # noqa: E402
from sklearn.metrics import average_precision_score  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from bundle.data import load_atlas  # noqa: E402
from bundle.data.files import write_json  # noqa: E402
from bundle.errors import report_in_one_line, require_device  # noqa: E402
from bundle.inference import PatchLocationInferer  # noqa: E402
from bundle.losses import BetaNLLLoss  # noqa: E402
from bundle.metrics import average_precision  # noqa: E402
from bundle.networks import PatchLocator, ResNetPatchLocator  # noqa: E402
from bundle.reports import SaveFindings  # noqa: E402
from bundle.transforms import DenseLocationsd, LoadScand, RandPatchesd, ResampleToGrid  # noqa: E402
from bundle.transforms.brain import strip_with_deepbet  # noqa: E402
from bundle.transforms.sampling import slice_position  # noqa: E402

CENTER, PATCH = (0.0, -17.0, 5.0), 24
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Shortest of some runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def brain(device: torch.device, quick: bool) -> torch.Tensor:
    """The atlas' brain on the paper's grid of 1 mm (quick: 2 mm), ``[1, 1, H, W, D]``, 0 outside."""
    atlas = load_atlas()
    grid = ResampleToGrid(2.0, (96, 96, 76), CENTER) if quick else ResampleToGrid(1.0, (192, 192, 100), CENTER)
    inside = grid(atlas.brain_mask, "nearest").as_tensor() > 0
    image = grid(atlas.template).as_tensor()
    return torch.where(inside, image.clamp(0.05, 1), 0.0)[None].to(device)


def matmul_throughput(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the machine's own matrix multiplication."""
    n = 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def dense_passes(volume: torch.Tensor, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds per volume of the default network, and its share of the machine's throughput."""
    network = PatchLocator(PATCH).to(device).eval()
    found: dict[str, dict[str, float]] = {}
    for precision, dtype in PRECISIONS.items():
        peak = matmul_throughput(device, dtype)
        for stride in (1, 2, 4):
            network.stride = stride
            tile = 2**19 if device.type == "cuda" else 2**15
            inferer = PatchLocationInferer(PATCH, stride, tile, precision)
            taken = seconds(partial(inferer, volume, network), device, repeats)
            with FlopCounterMode(display=False) as counter:
                inferer(volume, network)
            share = counter.get_total_flops() / taken / peak
            found[f"{precision}, stride {stride}"] = {"seconds": taken, "share_of_matmul": share}
    return found


@torch.no_grad()
def published_pass(device: torch.device, precision: str, patches: int, chunk: int | None = None) -> float:
    """Patches per second of the published network, patch by patch, on a sample, so many at once."""
    # the fastest chunks on a CPU, of those tried (64 to 36,864)
    chunk = chunk or (2048 if device.type == "cuda" else 256)
    network = ResNetPatchLocator(PATCH, chunk=chunk).to(device).eval()
    batch = torch.rand(patches, 2, PATCH, PATCH, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return patches / seconds(lambda: network(batch), device, 1)


def training_rate(slices: list[torch.Tensor], stride: int | None, device: torch.device, repeats: int) -> float:
    """Patches per second of training steps, from slices to updated weights: all patches of the slices at ``stride``
    in one pass, or (None) random patches one by one, with the same network and loss.
    """
    network, loss = PatchLocator(PATCH, stride=stride or 1).to(device).train(), BetaNLLLoss()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    dense, patches = DenseLocationsd(patch_size=PATCH, stride=stride or 1), RandPatchesd(patch_size=PATCH)
    counted = []

    def step() -> None:
        if stride:
            samples = [dense({"image": s}) for s in slices]
        else:
            samples = [p for s in slices for p in patches({"image": s})]
        image, label = (torch.stack([s[key] for s in samples]).to(device) for key in ("image", "label"))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pred = network(image)
        loss(pred, label).backward()
        optimizer.step()
        counted.append(label[:, 2].sum())

    taken = seconds(step, device, repeats)
    return float(counted[-1]) / taken


def training_rates(volume: torch.Tensor, device: torch.device, repeats: int) -> dict[str, float]:
    """`training_rate` of both modes, 24 slices a step as in ``configs/train.json``."""
    depth = volume.shape[-1]
    slices = [
        torch.stack([volume[0, 0, :, :, k], torch.full_like(volume[0, 0, :, :, k], slice_position(k, depth))])
        for k in torch.linspace(0.15 * depth, 0.85 * depth, 24).long().tolist()
    ]
    modes = {"patch by patch": None, "dense, stride 4": 4, "dense, stride 2": 2, "dense, stride 1": 1}
    return {name: training_rate(slices, stride, device, repeats) for name, stride in modes.items()}


def auprc_ratio(voxels: int, repeats: int) -> dict[str, float]:
    """The bundle's average precision over a volume's voxels against scikit-learn's."""
    generator = torch.Generator().manual_seed(0)
    label = torch.rand(voxels, generator=generator) < 0.01
    score = torch.randn(voxels, generator=generator) + label
    ours = average_precision(score, label)
    theirs = average_precision_score(label.numpy(), score.numpy())
    cpu = torch.device("cpu")
    ratio = seconds(lambda: average_precision_score(label.numpy(), score.numpy()), cpu, repeats)
    ratio /= seconds(lambda: average_precision(score, label), cpu, repeats)
    return {"times_faster_than_scikit_learn": ratio, "difference": abs(float(ours) - float(theirs))}


class Clock:
    """Seconds of named steps, of the processor (all threads) and of the wall; of steps within a step it takes none."""

    def __init__(self) -> None:
        self.times: dict[str, list[np.ndarray]] = {}
        self.busy = False

    def time(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``work`` returns."""
        outermost, self.busy = not self.busy, True
        started = np.array([time.process_time(), time.perf_counter()])
        try:
            return work(*args, **kwargs)
        finally:
            if outermost:
                self.busy = False
                taken = np.array([time.process_time(), time.perf_counter()]) - started
                self.times.setdefault(name, []).append(taken)


def one_head(file: str, repeats: int) -> None:
    """Print where the time of a raw head goes, from its file to the answer, as multiples of what deepbet alone takes
    for its mask; all of it in this process, the first time (everything is read for the first time), and the shortest
    of some more.
    """
    clock, apply, save = Clock(), compose.apply_transform, SaveFindings.save

    def timed(transform: Any, *args: Any, **kwargs: Any) -> Any:
        told = type(transform).__name__ + (f" {transform.keys[0]}" if type(transform).__name__ == "IfNeededd" else "")
        return clock.time(told, apply, transform, *args, **kwargs)

    compose.apply_transform = timed
    SaveFindings.save = lambda self, engine: clock.time("files and pictures", save, self, engine)
    image = Compose([LoadScand("image"), Orientationd("image", axcodes="RAS", labels=None)])({"image": file})["image"]
    clock.times.clear()
    root = Path(__file__).resolve().parents[1]
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as out, redirect_stdout(None):
            options = {"bundle_root": str(root), "dataset_dir": file, "output_dir": out, "device": "cpu"}
            files = {"config_file": str(root / "configs/inference.json"), "logging_file": False}
            evaluator = ConfigWorkflow(**files, workflow_type="inference", **options).parser.get_parsed_content(
                "evaluator"
            )
            evaluator.inferer = partial(clock.time, "network", evaluator.inferer)
            started = np.array([time.process_time(), time.perf_counter()])
            evaluator.run()
            whole = np.array([time.process_time(), time.perf_counter()]) - started
        clock.times.setdefault("the whole way", []).append(whole)
        clock.time("deepbet alone", strip_with_deepbet, image, "cpu")
    alone = np.min(clock.times["deepbet alone"], 0)
    print(f"{file}, {'x'.join(map(str, image.shape[1:]))} voxels, {torch.get_num_threads()} threads")
    print(f"{'':<28}{'first':>8}{'later':>8} s   x deepbet alone     (processor; and wall)")
    for name, taken in clock.times.items():
        first, later = taken[0], np.min(taken[1:], 0)
        if later[0] >= 0.005 or later[1] >= 0.005:
            print(
                f"{name:<28}{first[0]:>8.2f}{later[0]:>8.2f}{later[0] / alone[0]:>12.2f}"
                f"     {first[1]:>8.2f}{later[1]:>8.2f}{later[1] / alone[1]:>12.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a small volume, one run each: is everything there?")
    parser.add_argument("--head", help="a scan of a whole head: only where its time goes is told")
    args = parser.parse_args()
    report_in_one_line()
    require_device(args.device)
    if args.head:
        one_head(args.head, 1 if args.quick else 3)
        return
    device = torch.device(args.device)
    repeats, sample = (1, 256) if args.quick else (3, 4096)
    name = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    volume = brain(device, args.quick)
    positions, filled = volume.numel(), int((volume > 0).sum())
    print(f"{name}, {platform.processor() or platform.machine()}, torch {torch.__version__}", flush=True)
    print(
        f"one volume: {'x'.join(map(str, volume.shape[2:]))}, {positions} positions, {filled} of them brain\n",
        flush=True,
    )

    inferer = PatchLocationInferer(PATCH)
    inferer(volume, PatchLocator(PATCH).to(device).eval())
    peak = resident_gib() - TORCH_LOADED
    where = "above Python with torch loaded"
    if device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(device) / 2**30, "on the GPU"
    print(f"peak memory of the dense pass, stride 1: {peak:.2f} GiB {where}", flush=True)

    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "peak_memory_gib": peak}
    report["dense"] = dense_passes(volume, device, repeats)
    report["published_patches_per_second"] = {p: published_pass(device, p, sample) for p in PRECISIONS}
    print(f"\npublished network, patch by patch, timed on {sample} patches, extrapolated to a volume:")
    for precision, rate in report["published_patches_per_second"].items():
        print(f"  {precision}: {rate:.0f} patches/s, {positions / rate:.0f} s; brain only {filled / rate:.0f} s")
    # its code runs the patches of several slices at once; those of one still fit into the memory of most machines
    slice_patches = sample if args.quick else volume.shape[2] * volume.shape[3]
    whole = report["published_whole_slice"] = published_pass(device, "float32", slice_patches, slice_patches)
    times = positions / whole / report["dense"]["float32, stride 1"]["seconds"]
    print(f"  float32, all {slice_patches} of a slice at once, as its code does: {whole:.0f} patches/s,")
    print(f"  {positions / whole:.0f} s: the dense pass at stride 1 is {times:.0f} times faster than that")
    print("\ndense PatchLocator      s/volume   faster than published   (brain only)   share of matmul")
    for key, row in report["dense"].items():
        rate = report["published_patches_per_second"][key.split(",")[0]]
        row["times_faster"], row["times_faster_brain_only"] = (n / rate / row["seconds"] for n in (positions, filled))
        print(
            f"  {key:<20}{row['seconds']:>10.2f}{row['times_faster']:>20.0f} x"
            f"{row['times_faster_brain_only']:>13.0f} x{row['share_of_matmul']:>16.0%}",
            flush=True,
        )
    report["training_patches_per_second"] = training_rates(volume, device, repeats)
    print("\ntraining, patches/s of whole steps")
    alone = report["training_patches_per_second"]["patch by patch"]
    for key, rate in report["training_patches_per_second"].items():
        print(f"  {key:<20}{rate:>10.0f}{rate / alone:>10.1f} x", flush=True)
    report["auprc"] = auprc_ratio(positions, repeats)
    faster, difference = report["auprc"].values()
    print(f"\nAUPRC of a volume: {faster:.1f} x faster than scikit-learn, difference {difference:.1e}")
    if args.output:
        write_json(args.output, report)


if __name__ == "__main__":
    main()
