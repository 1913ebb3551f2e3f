import gzip

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Orientationd

from bundle.errors import InputError
from bundle.transforms import CheckLabelsd, IgnoreLabelsd, LoadScand
from tests.conftest import FORMATS, meta, write_dicom, write_nifti, write_scan

AFFINE = np.array([[0, 0, -3.0, 40], [0.5, 0, 0, -70], [0, 0.5, 0, -60], [0, 0, 0, 1]])


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1)])
def test_one_volume_with_its_geometry(tmp_path, shape):
    volume = np.random.rand(*shape)
    image = LoadScand("image")({"image": write_nifti(tmp_path / "a.nii.gz", volume, AFFINE)})["image"]
    assert image.shape == (1, 5, 6, 7)
    np.testing.assert_allclose(image[0], volume.reshape(5, 6, 7), rtol=1e-6)
    np.testing.assert_allclose(image.affine, AFFINE)


@pytest.mark.parametrize(("shape", "zooms"), [((9, 8, 7), (0.9, 0.90003, 2.999)), ((9, 8, 7, 1), (0.9, 0.9, 3.0, 1.0))])
@pytest.mark.parametrize("qform", [False, True])
def test_the_sform_counts_whatever_the_voxel_size_beside_it(tmp_path, shape, zooms, qform):
    affine = np.array([[-0.9, 0, 0, 80], [0, 0.9, 0, -100], [0, 0, 3.0, -60], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.zeros(shape, np.int16), None)
    image.header.set_sform(affine, 1)
    image.header.set_qform(affine if qform else None, 1 if qform else 0)
    image.header.set_zooms(zooms)
    nib.save(image, tmp_path / "a.nii.gz")
    loaded = LoadScand("image")({"image": tmp_path / "a.nii.gz"})
    np.testing.assert_allclose(loaded["image"].affine, affine, atol=1e-5)
    assert loaded["image"].shape == (1, 9, 8, 7) and "flags" not in loaded


def test_where_sform_and_qform_differ_the_sform_is_used_and_told(tmp_path):
    image = nib.Nifti1Image(np.zeros((30, 30, 20), np.int16), np.diag([1, 1, 3.0, 1]))
    image.header.set_qform(np.diag([1, 1, 2.5, 1]), 1)
    nib.save(image, tmp_path / "a.nii")
    loaded = LoadScand("image")({"image": tmp_path / "a.nii"})
    np.testing.assert_allclose(loaded["image"].affine, np.diag([1, 1, 3.0, 1]))
    assert loaded["flags"].endswith("the sform was used")


def test_integers_with_a_slope_are_scaled(tmp_path):
    stored = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(5, 6, 4), AFFINE)
    stored.header.set_slope_inter(0.5, 10)
    nib.save(stored, tmp_path / "a.nii")
    image = LoadScand("image")({"image": tmp_path / "a.nii"})["image"]
    np.testing.assert_allclose(image[0].numpy().ravel(), nib.load(tmp_path / "a.nii").get_fdata().ravel())


def test_missing_keys_only_where_allowed(tmp_path):
    data = {"image": write_nifti(tmp_path / "a.nii.gz", np.ones((5, 5, 5)))}
    assert set(LoadScand(["image", "label"], allow_missing_keys=True)(data)) == {"image"}
    write_nifti(tmp_path / "flat.nii.gz", np.ones((9, 9, 1)))
    with pytest.raises(InputError, match=r"flat\.nii\.gz: has 9x9x1 voxels"):
        LoadScand("image")({"image": tmp_path / "flat.nii.gz"})
    with pytest.raises(KeyError):
        LoadScand(["image", "label"])(data)


broken_names = ["empty.nii.gz", "truncated.nii.gz", "text.nii.gz", "changed.nii.gz", "short.nii"]


def broken_files(folder):
    write_nifti(folder / "good.nii.gz", np.random.rand(9, 9, 9))
    packed = (folder / "good.nii.gz").read_bytes()
    return {
        "empty.nii.gz": b"",
        "truncated.nii.gz": packed[: len(packed) // 2],
        "text.nii.gz": b"not an image",
        "changed.nii.gz": packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],  # as by one bit of the content
        "short.nii": gzip.decompress(packed)[:500],
    }


@pytest.mark.parametrize("name", [*broken_names, "gone.nii.gz"])
def test_broken_files_are_named(tmp_path, name):
    for file, content in broken_files(tmp_path).items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: (cannot be read|its header tells of 9x9x9 voxels)"):
        LoadScand("image")({"image": tmp_path / name})


@pytest.mark.parametrize(("shape", "message"), [((5, 6), "dimensions"), ((5, 6, 7, 3), "holds 3 volumes")])
def test_what_is_not_one_volume_is_named(tmp_path, shape, message):
    with pytest.raises(InputError, match=rf"a\.nii\.gz: .*{message}"):
        LoadScand("image")({"image": write_nifti(tmp_path / "a.nii.gz", np.ones(shape))})


def test_singular_affine_is_named(tmp_path):
    file = write_nifti(tmp_path / "a.nii", np.ones((3, 3, 3)))
    content = bytearray(file.read_bytes())
    content[312:328] = bytes(16)  # third row of the sform
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.nii"):
        LoadScand("image")({"image": file})


def labels(change=None, shift=0.0):
    """A scan of 2 mm voxels, and a mask of 8 of them on it."""
    affine = np.diag([2.0, 2, 2, 1])
    mask = np.zeros((60, 60, 60))
    mask[20:22, 20:22, 20:22] = 1
    if change:
        change(mask)
    return {"image": meta(np.ones((60, 60, 60)), affine), "label": meta(mask, affine + shift * np.eye(4, k=3))}


def test_labels_that_are_good_pass():
    check = CheckLabelsd("label")
    for data in (labels(), labels(lambda mask: mask.fill(0)), labels(shift=70.0)):
        assert check(data)["label"] is data["label"]
    assert "label" not in CheckLabelsd("label", allow_missing_keys=True)({"image": labels()["image"]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (labels(lambda mask: mask.__setitem__((0, 0, 0), np.nan)), "not finite"),
        (labels(lambda mask: np.add(mask, 1, out=mask)), "marks 1728 ml"),
        (labels(lambda mask: np.subtract(1, mask, out=mask)), "marks 1728 ml"),
        (labels(shift=500.0), "lie outside the scan"),
    ],
    ids=["not a number", "1 and 2", "inverted", "elsewhere"],
)
def test_labels_that_are_none_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        CheckLabelsd("label")(data)


def test_labels_that_lie_elsewhere_than_their_scan_are_told():
    shifted = CheckLabelsd("label")(labels(shift=70.0))
    assert "lies up to 70 mm elsewhere" in shifted["flags"] and shifted["has_lesions"]
    stored = labels()
    stored["label"].affine = np.diag([-2.0, 2, 2, 1]) + np.array(
        [[0, 0, 0, 118.0], *np.zeros((3, 4))]
    )  # other way round
    assert "flags" not in CheckLabelsd("label")(stored) and "flags" not in CheckLabelsd("label")(labels())
    assert CheckLabelsd("label")(labels(lambda mask: mask.fill(0)))["has_lesions"] is False
    beyond = labels(lambda mask: mask.__setitem__((slice(0, 8), slice(20, 22), slice(20, 22)), 1))
    beyond["image"] = meta(np.ones((40, 60, 60)), np.diag([2.0, 2, 2, 1]) + 30 * np.eye(4, k=3))
    assert "of its lesions lie outside the scan" in CheckLabelsd("label")(beyond)["flags"]


DICOM_AFFINE = np.array([[-0.9, 0, 0.6, 40], [0, -1, 0, 50], [0.12, 0, 4.5, -60], [0, 0, 0, 1]])


def test_dicom_series_is_the_same_volume(tmp_path):
    volume = np.random.randint(0, 4000, (12, 10, 7))
    image = LoadScand("image")({"image": write_dicom(tmp_path / "series", volume, DICOM_AFFINE)})["image"]
    assert image.shape == (1, 12, 10, 7)
    np.testing.assert_array_equal(image[0], volume)
    voxel = np.linalg.norm(DICOM_AFFINE[:3, :3], axis=0)
    expected = DICOM_AFFINE.copy()  # the slices are stacked along their normal, 4.5 mm and a little apart
    expected[:3, 2] = np.cross(expected[:3, 0], expected[:3, 1])
    expected[:3, 2] *= (DICOM_AFFINE[:3, 2] @ expected[:3, 2]) / (expected[:3, 2] @ expected[:3, 2])
    np.testing.assert_allclose(image.affine, expected, atol=1e-3)
    assert abs(np.linalg.norm(expected[:3, 2]) - voxel[2]) < 0.05


@pytest.mark.parametrize(
    ("said", "agent"),
    [
        *(({}, False), ({"ContrastBolusAgent": "NONE"}, False), ({"ContrastBolusAgent": "Gadovist"}, True)),
        *(({"SeriesDescription": "T1 MPRAGE +C"}, True), ({"SeriesDescription": "T1 MPRAGE"}, False)),
    ],
)
def test_dicom_tells_of_a_contrast_agent(tmp_path, said, agent):
    import pydicom

    for path in write_dicom(tmp_path / "a", np.zeros((6, 5, 4), int), DICOM_AFFINE).iterdir():
        file = pydicom.dcmread(path)
        for tag, value in said.items():
            setattr(file, tag, value)
        file.save_as(path)
    assert LoadScand("image")({"image": tmp_path / "a"})["image"].meta["contrast_agent"] is agent


def test_dicom_that_is_not_one_volume_is_named(tmp_path):
    volume = np.random.randint(0, 4000, (12, 10, 7))
    straight = np.diag([-1.0, -1.0, 3.0, 1.0])
    missing = write_dicom(tmp_path / "missing", volume, straight, skip=(3,))
    with pytest.raises(InputError, match=r"missing: slices lie 3\.00 to 6\.00 mm apart"):
        LoadScand("image")({"image": missing})
    import pydicom

    many = next(write_dicom(tmp_path / "many", volume, straight, skip=(1, 2, 3, 4, 5, 6)).iterdir())
    file = pydicom.dcmread(many)
    file.NumberOfFrames = 7
    file.save_as(many)
    with pytest.raises(InputError, match=r"many: DICOM of many frames in a file; convert it"):
        LoadScand("image")({"image": tmp_path / "many"})
    two = write_dicom(tmp_path / "two", volume, straight)
    for file in write_dicom(tmp_path / "other", volume, straight).iterdir():
        file.rename(two / f"b{file.name}")
    with pytest.raises(InputError, match=r"two: holds 2 DICOM series"):
        LoadScand("image")({"image": two})
    with pytest.raises(InputError, match=r"other: holds 0 DICOM series"):
        LoadScand("image")({"image": tmp_path / "other"})


def test_ignored_labels_are_neither_lesion_nor_healthy():
    label = meta(np.arange(4).reshape(1, 2, 2))
    out = IgnoreLabelsd("label")({"label": label, "ignored_labels": [2, 7]})
    assert out["label"].flatten().tolist() == [0, 1, -1, 3]
    assert IgnoreLabelsd("label")({"label": label})["label"].flatten().tolist() == [0, 1, 2, 3]


SIDEWAYS = np.array([[-0.5, 0, 0, 3.0], [0, 0.5, 0, -3.5], [0, 0, 2.0, -9], [0, 0, 0, 1]])


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_is_the_same_volume(tmp_path, ending):
    volume = np.random.randint(0, 4000, (12, 14, 10)).astype(float)
    affine = SIDEWAYS.copy()
    if ending == "hdr":  # the middle of the volume is the origin, for it knows no other
        affine[:3, 3] = -affine[:3, :3] @ (np.array(volume.shape) - 1) / 2
    turn = Orientationd("image", axcodes="RAS", labels=None)  # a series has the order of its slices, not of its files
    file = write_scan(tmp_path, "head", ending, volume, affine)
    (tmp_path / "head.mat").unlink(missing_ok=True)  # plain Analyze has none
    data = turn(LoadScand("image")({"image": file}))
    expected = turn({"image": meta(volume, affine)})["image"]
    np.testing.assert_array_equal(data["image"], expected)
    assert data["image"].meta["filename_or_obj"] == str(tmp_path / f"head.{ending}")
    np.testing.assert_allclose(data["image"].affine, expected.affine, atol=1e-5)
    assert data.get("flags", "").endswith("from right to left" if ending == "hdr" else "")


@pytest.mark.parametrize("ending", [f for f in FORMATS if f != "nii.gz"])
def test_broken_files_of_other_formats_are_named(tmp_path, ending):
    file = write_scan(tmp_path, "head", ending, np.random.randint(0, 4000, (12, 14, 10)).astype(float), SIDEWAYS)
    voxels = {"nhdr": "raw.gz", "mhd": "zraw", "hdr": "img"}.get(ending)
    voxels = file if voxels is None else file.with_suffix(f".{voxels}")
    good = voxels.read_bytes()
    for content in (b"", b"not an image", good[: len(good) // 2], good[:-400]):
        voxels.write_bytes(content)
        with pytest.raises(InputError, match=rf"head\.{ending}: (cannot be|its header tells of|holds 0|its DICOM)"):
            LoadScand("image")({"image": file})
    if voxels != file:
        voxels.unlink()
        with pytest.raises(InputError, match=rf"head\.{ending}: .* beside it"):
            LoadScand("image")({"image": file})


def damaged(file, old, new):
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    return file


@pytest.mark.parametrize(
    ("ending", "old", "new", "message"),
    [
        ("nrrd", b"space: left-posterior-superior", b"space dimension: 3", "has no orientation"),
        ("nrrd", b"sizes: 12 14 10", b"sizes: 99999 99999 9", "which it cannot hold|cannot be read"),
        ("nhdr", b"data file: head.raw.gz", b"data file: /etc/passwd", "in one file beside it, not in '/etc/passwd'"),
        ("nhdr", b"data file: head.raw.gz", b"data file: LIST", "in one file beside it"),
        ("mhd", b"ElementDataFile = head.zraw", b"ElementDataFile = ../head.zraw", "in one file beside it"),
        ("mhd", b"ElementDataFile = head.zraw", b"ElementDataFile = h%03d.raw 1 9 1", "in one file beside it"),
        ("mha", b"NDims = 3", b"NDims = 99", "cannot be read as MetaImage"),
        ("mha", b"DimSize = 12 14 10", b"DimSize = 99999 99999 9", "which it cannot hold"),
        ("mha", b"TransformMatrix = 1", b"TransformMatrix = 0", "no usable orientation|cannot be read"),
    ],
)
def test_headers_of_itk_that_cannot_be_trusted(tmp_path, ending, old, new, message):
    file = write_scan(tmp_path, "head", ending, np.random.randint(0, 4000, (12, 14, 10)).astype(float), SIDEWAYS)
    with pytest.raises(InputError, match=rf"head\.{ending}: .*({message})"):
        LoadScand("image")({"image": damaged(file, old, new)})


def test_what_other_formats_hold_besides_a_scan_is_named(tmp_path):
    import SimpleITK as sitk

    sitk.WriteImage(sitk.Image([9, 9, 9], sitk.sitkVectorFloat32, 3), str(tmp_path / "rgb.nrrd"))
    sitk.WriteImage(sitk.Image([9, 9, 9, 2], sitk.sitkFloat32), str(tmp_path / "two.mha"))
    sitk.WriteImage(sitk.Image([9, 9], sitk.sitkFloat32), str(tmp_path / "flat.mha"))
    sitk.WriteImage(sitk.Image([9, 8, 7, 1], sitk.sitkFloat32), str(tmp_path / "one.nrrd"))
    for name, message in (("rgb.nrrd", "holds colours"), ("two.mha", "holds 2 volumes"), ("flat.mha", "has 2 dim")):
        with pytest.raises(InputError, match=rf"{name}: {message}"):
            LoadScand("image")({"image": tmp_path / name})
    mgh = write_scan(tmp_path, "head", "mgh", np.ones((9, 9, 9)), SIDEWAYS)
    content = bytearray(mgh.read_bytes())
    content[28:30] = bytes(2)
    mgh.write_bytes(content)
    with pytest.raises(InputError, match="goodRASFlag is 0"):
        LoadScand("image")({"image": mgh})
    changed = write_scan(tmp_path, "packed", "mha", np.random.rand(9, 9, 9), SIDEWAYS)
    content = bytearray(changed.read_bytes())
    content[-40] ^= 4
    changed.write_bytes(content)
    with pytest.raises(InputError, match="its checksum does not fit"):
        LoadScand("image")({"image": changed})


def series(folder, volume, names):
    """Several series in one folder, each with its description, or its repetition, echo and inversion time."""
    import pydicom

    for number, what in enumerate(names):
        for file in write_dicom(folder / "new", volume + number, np.diag([-1.0, -1.0, 3.0, 1.0])).iterdir():
            slice_ = pydicom.dcmread(file)
            if isinstance(what, str):
                slice_.SeriesDescription = what
            else:
                slice_.RepetitionTime, slice_.EchoTime, slice_.InversionTime = what
            slice_.save_as(folder / f"{number}_{file.name}")
            file.unlink()
    (folder / "new").rmdir()
    return folder


def test_of_several_series_that_of_the_contrast_is_taken(tmp_path):
    volume = np.random.randint(0, 4000, (12, 10, 7))
    names = ("localizer", "t2_tirm_tra_dark-fluid", "T1 MPRAGE sag", "T2w TSE", "t1_mprage post")
    times = ((500, 15, 0), (9000, 120, 2500), (5000, 90, 0))
    for folder, order in (
        (series(tmp_path / "named", volume, names), {"flair": 1, "t1": 2, "t2": 3}),
        (series(tmp_path / "timed", volume, times), {"t1": 0, "flair": 1, "t2": 2}),
    ):
        for contrast, number in order.items():
            image = LoadScand("image", contrast=contrast)({"image": folder})["image"]
            np.testing.assert_array_equal(image[0], volume + number)
    image = LoadScand("image")({"image": tmp_path / "named", "contrast": "t2"})["image"]
    np.testing.assert_array_equal(image[0], volume + 3)
    told = r"named: holds 5 DICOM series, 0 of them pd: .*'T1 MPRAGE sag' \(7 files, t1\).*; give a folder with one"
    with pytest.raises(InputError, match=told):
        LoadScand("image", contrast="pd")({"image": tmp_path / "named"})


@pytest.mark.parametrize(("space", "told"), [("left-anterior-superior", False), ("RAS", False), ("scanner-xyz", True)])
def test_a_space_that_knows_no_left_and_right_is_told(tmp_path, space, told):
    header = f"NRRD0004\ntype: uchar\ndimension: 3\nspace: {space}\nsizes: 5 6 7\n"
    header += "space directions: (2,0,0) (0,2,0) (0,0,2)\nkinds: domain domain domain\nencoding: raw\n"
    header += "space origin: (0,0,0)\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + bytes(210))
    assert ("knows no left and right" in LoadScand("image")({"image": tmp_path / "a.nrrd"}).get("flags", "")) == told
