import json
import os

import nibabel as nib
import numpy as np
import pytest

from bundle.data.files import atomic_path, claim_folder, read_json, write_json, write_text
from bundle.data.formats import stem
from bundle.data.volumes import nifti_header, write_volume
from bundle.errors import InputError, explain, flag


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "result.json"
    write_json(file, {"old": 1})
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*output folder"), atomic_path(tmp_path / "file" / "x.json"):
        pass


@pytest.mark.parametrize("content", [None, "{broken", "\xff\xfe"])
def test_unreadable_json_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content, encoding="latin1")
    with pytest.raises(InputError, match=r"a\.json: list"):
        read_json(tmp_path / "a.json", "list")


def test_long_names_can_be_written(tmp_path):
    write_json(tmp_path / f"{'ü' * 120}.json", 1)
    assert [f.name for f in tmp_path.iterdir()] == [f"{'ü' * 120}.json"]


def test_leftovers_go_but_not_those_of_a_run_below(tmp_path):
    for name in ("a", "sub", "busy/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ".partial-1").write_text("")
    (tmp_path / ".replaced-2" / "old").mkdir(parents=True)
    (tmp_path / "busy/.lock").write_text("")
    claim_folder(tmp_path)
    left = {
        f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.name.startswith(".") and f.name != ".lock"
    }
    assert left == {"busy/deep/.partial-1"}


def test_no_text_of_a_header_leaves(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 4, 4)), np.diag([2.0, 2, 2, 1]))
    image.header["descrip"], image.header["db_name"], image.header["aux_file"] = b"DOE", b"JOHN", b"1970"
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"PatientName=DOE^JOHN"))
    nib.save(image, tmp_path / "a.nii")
    assert b"DOE" in (tmp_path / "a.nii").read_bytes()
    write_volume(tmp_path / "b.nii", np.ones((4, 4, 4)), image.affine, nifti_header(tmp_path / "a.nii"))
    content = (tmp_path / "b.nii").read_bytes()
    assert not any(word in content for word in (b"DOE", b"JOHN", b"1970"))
    assert nib.load(tmp_path / "b.nii").header.get_xyzt_units() == ("mm", "sec")


def test_volume_keeps_geometry_and_units(tmp_path):
    affine = np.array([[0, 0, -3.0, 40], [0.5, 0, 0, -70], [0, 0.5, 0, -60], [0, 0, 0, 1]])
    source = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    source.header.set_xyzt_units("mm", "sec")
    source.header.set_slope_inter(0.1, 5)
    volume = np.random.rand(4, 5, 6).astype(np.float32)
    write_volume(tmp_path / "a.nii.gz", volume, affine, source.header)
    back = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(back.get_fdata(dtype=np.float32), volume)
    np.testing.assert_allclose(back.affine, affine)
    assert back.header.get_xyzt_units() == ("mm", "sec") and back.get_data_dtype() == np.float32


def test_stem():
    assert [stem(n) for n in ("a/b.nii.gz", "b.NII", "b.x.nii")] == ["b", "b", "b.x"]


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    name = os.fsdecode(b"M\xfcller")
    write_text(tmp_path / "a.csv", f"{name} \u2264\n")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "M?ller \u2264\n"
    explain(InputError(f"{name}: not there")).encode()
    flag({}, f"{name} lies badly")["flags"].encode()
