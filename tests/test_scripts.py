"""The scripts, run as users run them."""

import json
import subprocess
import sys

from tests.conftest import ROOT


def test_benchmark_reports_every_ratio(tmp_path):
    out = tmp_path / "benchmark.json"
    command = [sys.executable, ROOT / "scripts/benchmark.py", "--quick", "--device", "cpu", "--output", out]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert {f"{p}, stride {s}" for p in ("float32", "bfloat16") for s in (1, 2, 4)} == set(report["dense"])
    for row in report["dense"].values():
        assert row["times_faster"] > row["times_faster_brain_only"] > 0 and row["share_of_matmul"] > 0
    assert all(rate > 0 for rate in report["training_patches_per_second"].values())
    assert report["published_whole_slice"] > 0
    assert report["auprc"]["difference"] < 1e-9 and report["peak_memory_gib"] > 0
    assert "share of matmul" in result.stdout
