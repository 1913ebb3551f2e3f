"""Pack the bundle for the Model Zoo or MONAI Label, and check what was packed, in a folder of its own.

Writes OUT/patch2loc_brain_mri_v<version>.zip; equal files make equal archives. The checks run MONAI's own commands on
the unpacked archive, without a network; the archive is written only if all of them pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "patch2loc_brain_mri"
PARTS = ("LICENSE", "bundle", "configs", "docs", "models")
LARGEST_FILE = 25e6  # bytes; what the Model Zoo takes without a download link
CHECK = f"""
import sys
from pathlib import Path
import torch
from monai.bundle import create_workflow, load

root = Path(sys.argv[1])
for name, kind in (("train", "train"), ("inference", "infer")):
    config = str(root / "configs" / (name + ".json"))
    workflow = create_workflow(config_file=config, workflow_type=kind, bundle_root=str(root), logging_file=False)
    missing = workflow.check_properties()
    assert not missing, f"{{name}}: properties that MONAI expects are missing: {{missing}}"
state = torch.load(root / "models/model.pt", weights_only=True)
assert all(isinstance(v, torch.Tensor) for v in state.values()), "model.pt is not a flat state dict"
workflow.network_def.load_state_dict(state, strict=True)
code = Path(sys.modules["bundle"].__file__)
assert code.is_relative_to(root), f"another bundle was imported: {{code}}"
network = load("{NAME}", bundle_dir=str(root.parent), workflow_type="inference", device="cpu")
for key, value in network.state_dict().items():
    assert torch.equal(value, state[key]), f"load gives other weights than model.pt: {{key}}"
"""


def files_of(root: Path) -> Iterator[Path]:
    """What belongs into the archive, relative to ``root``, in a fixed order."""
    for part in PARTS:
        # beside the models lie the checkpoints of a training
        pattern = "*" if part == "models" else "**/*"
        found = [root / part] if (root / part).is_file() else sorted((root / part).glob(pattern))
        for file in found:
            inside = file.relative_to(root)
            if file.is_file() and not any(p.startswith((".", "__pycache__")) for p in inside.parts):
                yield inside


def problems_of(root: Path) -> list[str]:
    """What the Model Zoo would refuse, one line each."""
    problems = []
    metadata = json.loads((root / "configs/metadata.json").read_text())
    if metadata["version"] not in metadata["changelog"]:
        problems.append(f"configs/metadata.json: changelog lacks version {metadata['version']}")
    for file in files_of(root):
        if (root / file).stat().st_size > LARGEST_FILE:
            problems.append(f"{file}: larger than {LARGEST_FILE / 1e6:g} MB")
        if file.suffix in (".json", ".yaml", ".py", ".md", ".txt", ".conf"):
            found = re.search(r"(?<![\w.:/])/(home|root|work|tmp|Users|mnt)/\S+", (root / file).read_text())
            if found:
                problems.append(f"{file}: absolute path {found.group()}")
    return problems


def write_archive(root: Path, archive: Path) -> None:
    """Pack ``root``: files as they are (links as what they point to), no times, no owners."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for file in files_of(root):
            entry = zipfile.ZipInfo(f"{NAME}/{file.as_posix()}", (1980, 1, 1, 0, 0, 0))
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            packed.writestr(entry, (root / file).read_bytes())


def check_archive(archive: Path, schema: Path) -> Iterator[tuple[str, str]]:
    """Name and complaint (empty: passed) of each check, on the unpacked archive, from another working directory."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as unpacked, tempfile.TemporaryDirectory() as elsewhere:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(unpacked)
        root = Path(unpacked) / NAME
        (Path(elsewhere) / "check.py").write_text(CHECK)
        configs = ["--meta_file", root / "configs/metadata.json", "--config_file", root / "configs/inference.json"]
        configs += ["--bundle_root", root]
        monai = [sys.executable, "-m", "monai.bundle"]
        exported = ["--filepath", Path(elsewhere) / "model.ts", "--ckpt_file", root / "models/model.pt"]
        commands = {
            "verify_metadata": [*monai, "verify_metadata", *configs[:2], "--filepath", schema],
            "verify_net_in_out": [*monai, "verify_net_in_out", "network_def", *configs],
            "ckpt_export": [*monai, "ckpt_export", "network_def", *exported, *configs],
            "create_workflow, check_properties, load": [sys.executable, "check.py", root],
        }
        for name, command in commands.items():
            result = subprocess.run(
                list(map(str, command)), cwd=elsewhere, env=environment, capture_output=True, text=True
            )
            yield name, "" if result.returncode == 0 else result.stderr.strip()[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--schema", type=Path, default=ROOT / "scripts/metadata_schema.json", help="of the metadata")
    args = parser.parse_args()
    if find_spec("jsonschema") is None:
        sys.exit("error: the metadata is checked with jsonschema: pip install jsonschema, or `make package`")
    problems = problems_of(ROOT)
    version = json.loads((ROOT / "configs/metadata.json").read_text())["version"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".partial-") as partial:
        archive = Path(partial) / f"{NAME}_v{version}.zip"
        write_archive(ROOT, archive)
        for name, complaint in [] if problems else check_archive(archive, args.schema):
            print(f"{name}: {'failed' if complaint else 'passed'}", flush=True)
            problems += [f"{name}: {complaint}"] if complaint else []
        if problems:
            sys.exit("error: not packed:\n" + "\n".join(problems))
        final = archive.replace(args.output_dir / archive.name)
    print(f"{final}: {final.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
