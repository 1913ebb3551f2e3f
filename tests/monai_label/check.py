"""The packaged bundle in a real MONAI Label server, asked by MONAI Label's own client. Run it by `make test-label`.

Takes a raw head scan (or makes one from the MNI152 head, with a dark ball in it), serves it and a copy with its voxel
axes in another order on loopback, and compares what comes back with what MONAI's runner writes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

NAME = "patch2loc_brain_mri"
THRESHOLD = 1.5  # low enough that there is something to compare in any scan
CHECKS: list[bool] = []
# MONAI Label's command starts whatever is called python
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check(what: str, passed: bool, told: object = "") -> None:
    print(f"{'passed' if passed else 'FAILED'}: {what} {told}", flush=True)
    CHECKS.append(bool(passed))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


def make_head(path: Path) -> None:
    """The MNI152 head on slanted voxels, with a dark ball of 24 mm in the white matter."""
    from nilearn.datasets import load_mni152_template

    head = load_mni152_template(resolution=1)
    places = np.stack(np.indices(head.shape), -1) @ head.affine[:3, :3].T + head.affine[:3, 3]
    values = head.get_fdata() * np.where(np.linalg.norm(places - [28, -20, 30], axis=-1) < 12, 0.45, 1)
    slant = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.15, 0.1, 0.05))
    nib.save(nib.Nifti1Image(values.astype(np.float32), slant @ head.affine), path)


def reorder(source: Path, target: Path) -> np.ndarray:
    """Write the same scan with other voxel axes; returns what brings them back."""
    image = nib.load(source)
    there = np.array([[2, -1], [0, 1], [1, -1]])
    nib.save(image.as_reoriented(there), target)
    return nib.orientations.ornt_transform(
        nib.io_orientation(nib.load(target).affine), nib.io_orientation(image.affine)
    )


def serve(app: Path, studies: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """Start the server on a free port of loopback; returns when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["monailabel", "start_server", "--app", app, "--studies", studies, "--host", "127.0.0.1", "--port", port]
    command += ["--conf", "models", NAME, "--conf", "zoo_source", "ngc", "--conf", "sam2", "false"]
    server = subprocess.Popen(
        list(map(str, command)), stdout=log.open("w"), stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(180):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/info/", timeout=5).read()
            return server, url
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


def draw(path: Path, source: Path, graded: np.ndarray) -> None:
    """Axial slices through the three largest amounts of "strong", with the grades in colour."""
    from matplotlib.figure import Figure

    image = nib.load(source)
    to_ras = nib.io_orientation(image.affine)
    scan, marked = (nib.orientations.apply_orientation(v, to_ras) for v in (image.get_fdata(), graded % 5))
    voxel = np.abs(nib.as_closest_canonical(image).affine[:3, :3]).max(0)
    slices = np.sort(np.argsort((marked == 3).sum((0, 1)))[-3:])
    figure = Figure(figsize=(12, 4.6), facecolor="black", layout="constrained")
    for ax, k in zip(figure.subplots(1, 3), slices):
        ax.imshow(
            scan[..., k].T, cmap="gray", origin="lower", vmax=np.percentile(scan, 99.5), aspect=voxel[1] / voxel[0]
        )
        for value, colour in ((1, "#ffd60a"), (2, "#ff9500"), (3, "#ff3b30")):
            if (marked[..., k] >= value).any():
                ax.contour((marked[..., k] >= value).T, levels=[0.5], colors=[colour], linewidths=1.2)
        ax.set_axis_off()
    figure.savefig(path, dpi=70)


def compare(
    client: MONAILabelClient, bundle: Path, scans: dict[str, Path], contrast: str, folder: Path, picture: Path | None
) -> None:
    """All checks, with the server running."""
    model = client.info()["models"][NAME]
    check(
        "labels",
        model["labels"] == {"mild": 1, "moderate": 2, "strong": 3, "lesion": 4, "not_examined": 5},
        model["labels"],
    )

    options = {"contrast": contrast, "threshold": str(THRESHOLD)}
    command = [sys.executable, "-m", "monai.bundle", "run", "inference", "--dataset_dir", str(scans["scan"])]
    command += ["--config_file", f"{bundle}/configs/inference.json", "--bundle_root", str(bundle)]
    command += ["--output_dir", f"{folder}/out", "--contrast", contrast, "--threshold", str(THRESHOLD)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    written = {k: nib.load(folder / f"out/scan/scan_{k}.nii.gz") for k in ("lesion", "heatmap", "coverage")}
    expected = np.asarray(written["lesion"].dataobj) > 0

    def ask(scan: str, label_map: str, **more: str):
        file, result = client.infer(NAME, scan, {**options, "label_map": label_map, **more})
        image = nib.load(file)
        return image, np.asarray(image.dataobj), result

    image, lesion, result = ask("scan", "lesion")
    source = nib.load(scans["scan"])
    same = image.shape == source.shape and np.allclose(image.affine, source.affine, atol=1e-3)
    check("lesion mask on the scan's own voxels", same, image.shape)
    check("lesion mask holds 0, 4 and 5 only", {0, 4} <= set(np.unique(lesion)) <= {0, 4, 5})
    left_out = np.asarray(written["coverage"].dataobj) == 2
    same = np.array_equal(lesion == 5, left_out & (lesion != 4))
    check("what was not looked at is marked", same, f"{result['not_examined_percent']:.1f} %")
    lesion[lesion == 5] = 0
    check("equal to the runner's", dice(lesion > 0, expected) >= 0.99, f"Dice {dice(lesion > 0, expected):.4f}")
    close = np.isclose(result["lesion_volume_ml"], expected.sum() * abs(np.linalg.det(source.affine[:3, :3])) / 1000)
    check("figures beside it", close and result["threshold"] == THRESHOLD, f"{result['lesion_volume_ml']:.2f} ml")

    _, heatmap, _ = ask("scan", "heatmap")
    apart = float(np.abs(heatmap - written["heatmap"].get_fdata()).max())
    check("heatmap is float and the runner's", heatmap.dtype == np.float32 and apart < 0.05, f"differs by {apart:.4f}")

    _, graded, result = ask("scan", "graded", threshold="calibrated")
    strong = heatmap[graded == 3].min() if (graded == 3).any() else np.inf
    mild = heatmap[graded == 1]
    ordered = set(np.unique(graded)) <= {0, 1, 2, 3, 5} and mild.size and mild.mean() < heatmap[graded == 2].mean()
    check("grades rise with the heatmap", ordered, f"threshold {result['threshold']:.2f}, strong from {strong:.2f}")

    if picture:
        draw(picture, scans["scan"], graded)

    back = reorder(scans["scan"], scans["turned"])
    _, turned, _ = ask("turned", "lesion")
    turned = nib.orientations.apply_orientation(turned, back)
    agreement = dice(turned == 4, lesion == 4)
    check("voxel axes in another order", agreement >= 0.98, f"Dice {agreement:.4f}")

    other = "t1" if contrast != "t1" else "t2"
    _, wrong, _ = ask("scan", "heatmap", contrast=other)
    _, again, _ = ask("scan", "heatmap")
    check("contrasts do not mix", np.abs(wrong - again).max() > 0.5 and np.abs(again - heatmap).max() < 0.05)
    _, told, result = ask("scan", "heatmap", contrast="auto")
    check("the contrast is told", result["contrast"] == contrast and np.abs(told - again).max() < 0.05)
    try:
        ask("broken", "lesion")
        check("a broken scan is refused", False)
    except MONAILabelClientException as error:
        check("a broken scan is refused", True, str(error.msg if hasattr(error, "msg") else error)[:200])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, required=True, help="as scripts/package_bundle.py writes it")
    parser.add_argument("--scan", type=Path, help="raw head, NIfTI; default: made from the MNI152 head")
    parser.add_argument("--contrast", default="t1")
    parser.add_argument("--picture", type=Path, help="PNG of the scan with the grades")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        app, studies = folder / "apps/monaibundle", folder / "studies"
        monailabel = Path(sys.executable).parent / "monailabel"
        download = [monailabel, "apps", "--download", "--name", "monaibundle", "--output", folder / "apps"]
        subprocess.run(download, check=True, capture_output=True, env=ENVIRONMENT)
        with zipfile.ZipFile(args.archive) as packed:
            packed.extractall(app / "model")
        studies.mkdir()
        scans = {name: studies / f"{name}.nii.gz" for name in ("scan", "turned", "broken")}
        if args.scan:
            shutil.copy(args.scan, scans["scan"])
        else:
            make_head(scans["scan"])
        reorder(scans["scan"], scans["turned"])
        scans["broken"].write_bytes(scans["scan"].read_bytes()[:5000])
        log = folder / "server.log"
        server, url = serve(app, studies, log)
        try:
            # the client would write into the server's temporary folder, under the name that the server then removes
            client = MONAILabelClient(url, tmpdir=str(folder / "answers"))
            compare(client, app / "model" / NAME, scans, args.contrast, folder, args.picture)
        except Exception:
            print(log.read_text()[-5000:])
            raise
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    print(f"{sum(CHECKS)} of {len(CHECKS)} checks passed")
    sys.exit(not all(CHECKS))


if __name__ == "__main__":
    main()
