"""The archive for the Model Zoo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from scripts.package_bundle import NAME, files_of, main, problems_of, write_archive
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, str(ROOT / "scripts/package_bundle.py"), "--output_dir", str(folder)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    checks = ("verify_metadata", "verify_net_in_out", "ckpt_export", "create_workflow, check_properties, load")
    assert all(f"{name}: passed" in result.stdout for name in checks)
    (file,) = folder.iterdir()
    return file


def test_it_holds_what_a_bundle_needs_and_nothing_else(archive):
    version = json.loads((ROOT / "configs/metadata.json").read_text())["version"]
    assert archive.name == f"{NAME}_v{version}.zip"
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        top = {name.removeprefix(f"{NAME}/").split("/")[0] for name in names}
        assert top == {"LICENSE", "bundle", "configs", "docs", "models"} and not any("pycache" in n for n in names)
        for needed in ("docs/README.md", "docs/data_license.txt", "models/model.pt", "configs/metadata.json"):
            assert packed.read(f"{NAME}/{needed}") == (ROOT / needed).read_bytes()


def test_equal_files_make_equal_archives(archive, tmp_path):
    write_archive(ROOT, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_what_the_zoo_refuses_is_named(tmp_path, monkeypatch, capsys):
    for file in files_of(ROOT):
        if file.suffix == ".json" and file.parts[0] == "configs":
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    assert problems_of(tmp_path) == []
    metadata = tmp_path / "configs/metadata.json"
    content = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**content, "version": "9.9.9"}))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/large.pt").write_bytes(bytes(26_000_000))
    (tmp_path / "configs/mine.yaml").write_text("dataset_dir: /home/me/data\nurl: https://a.org/home/b\n")
    found = "\n".join(problems_of(tmp_path))
    assert "changelog lacks version 9.9.9" in found and "models/large.pt: larger than 25 MB" in found
    assert "configs/mine.yaml: absolute path /home/me/data" in found and len(found.splitlines()) == 3
    monkeypatch.setattr("scripts.package_bundle.ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["package_bundle.py", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="not packed"):
        main()
    assert not list((tmp_path / "out").iterdir())
