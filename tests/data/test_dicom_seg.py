import shutil
import sys
import zipfile

import numpy as np
import pytest

from bundle.data import list_scans
from bundle.data.dicom import dicom_files, is_dicom_scan, read_dicom
from bundle.data.dicom_seg import HINT, has_highdicom, write_segmentation
from bundle.errors import InputError
from tests.conftest import write_dicom

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

SHAPE = (20, 16, 7)
TILT, TURN = np.deg2rad(20), np.deg2rad(10)
ROTATION = np.array([[np.cos(TURN), -np.sin(TURN), 0], [np.sin(TURN), np.cos(TURN), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(TILT), -np.sin(TILT)], [0, np.sin(TILT), np.cos(TILT)]]
)
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = ROTATION @ np.diag([-0.9, -1.1, 4.0]), [12, 30, -50]


@pytest.fixture
def series(tmp_path):
    return write_dicom(tmp_path / "head", np.random.default_rng(0).integers(0, 900, SHAPE), AFFINE)


@pytest.fixture
def lesion():
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:9, 2:5, 2:4] = mask[15, 11, 6] = 1
    return mask


def read_raw(path, shape, affine):
    """The mask by the standard's own words: one frame for each slice, its place in the frame's functional groups."""
    data = pydicom.dcmread(path)
    found = np.zeros(shape, np.uint8)
    frames = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    shared = data.SharedFunctionalGroupsSequence[0]
    for frame, groups in zip(frames, data.PerFrameFunctionalGroupsSequence):
        for row, column in np.argwhere(frame):
            corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
            plane = shared.PlaneOrientationSequence if "PlaneOrientationSequence" in shared else None
            cosines = np.array((plane or groups.PlaneOrientationSequence)[0].ImageOrientationPatient, float)
            spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
            place = corner + cosines[:3] * spacing[1] * column + cosines[3:] * spacing[0] * row
            voxel = np.linalg.solve(affine, [-place[0], -place[1], place[2], 1])[:3]
            assert np.abs(voxel - voxel.round()).max() < 0.01
            found[tuple(voxel.round().astype(int))] = 1
    return data, found


def write(path, series, lesion, facts=None):
    affine = read_dicom(str(series)).affine.numpy()
    with dicom_files(str(series)) as files:
        write_segmentation(path, lesion, affine, files, facts)
    return affine


def test_the_voxels_and_the_series_are_those_of_the_scan(series, lesion, tmp_path):
    affine = write(tmp_path / "x.seg.dcm", series, lesion, {"score": "fusion", "threshold": 2.5})
    np.testing.assert_allclose(affine, AFFINE, atol=1e-6)
    data, found = read_raw(tmp_path / "x.seg.dcm", SHAPE, AFFINE)
    np.testing.assert_array_equal(found, lesion)
    source = [pydicom.dcmread(file) for file in series.iterdir()]
    for tag in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert data[tag].value == source[0][tag].value
    assert data.Modality == "SEG" and data.SeriesInstanceUID != source[0].SeriesInstanceUID
    (referred,) = data.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == source[0].SeriesInstanceUID
    named = {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence}
    assert named == {image.SOPInstanceUID for image in source}
    (segment,) = data.SegmentSequence
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lesion"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    write(tmp_path / "y.seg.dcm", series, lesion, {"score": "fusion", "threshold": 2.5})
    again = pydicom.dcmread(tmp_path / "y.seg.dcm")
    assert again.SOPInstanceUID == data.SOPInstanceUID  # the same answer
    lesion[0, 0, 0] = 1
    write(tmp_path / "y.seg.dcm", series, lesion)
    assert pydicom.dcmread(tmp_path / "y.seg.dcm").SOPInstanceUID != data.SOPInstanceUID


def test_it_may_lie_beside_its_series_and_is_no_scan(series, lesion, tmp_path):
    write(series / "head_lesion.seg.dcm", series, lesion)
    (tmp_path / "out/head").mkdir(parents=True)
    shutil.copy(series / "head_lesion.seg.dcm", tmp_path / "out/head")
    assert read_dicom(str(series)).shape == (1, *SHAPE)
    assert [scan["name"] for scan in list_scans(tmp_path)] == ["head"]


def test_without_highdicom_nothing_else_is_lost(monkeypatch):
    assert has_highdicom()
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert not has_highdicom() and "pip install highdicom" in HINT and "\n" not in HINT


@pytest.mark.filterwarnings("ignore")
def test_a_scan_without_findings_has_an_empty_one(series, tmp_path):
    write(tmp_path / "x.seg.dcm", series, np.zeros(SHAPE, np.uint8))
    assert not read_raw(tmp_path / "x.seg.dcm", SHAPE, AFFINE)[1].any()


def test_a_zip_is_a_series(series, lesion, tmp_path):
    with zipfile.ZipFile(tmp_path / "head.zip", "w") as archive:
        for file in series.iterdir():
            archive.write(file, file.name)
    assert is_dicom_scan(tmp_path / "head.zip") and is_dicom_scan(series) and not is_dicom_scan(tmp_path / "a.nii")
    with dicom_files(str(tmp_path / "head.zip")) as files:
        write_segmentation(tmp_path / "x.seg.dcm", lesion, AFFINE, files)
        folder = files[0].rpartition("/")[0]
    np.testing.assert_array_equal(read_raw(tmp_path / "x.seg.dcm", SHAPE, AFFINE)[1], lesion)
    shutil.rmtree(folder, ignore_errors=True)


def test_what_does_not_fit_is_refused_and_nothing_is_written(series, lesion, tmp_path):
    with dicom_files(str(series)) as files:
        for mask, affine, message in (
            (lesion[:, :, :-1], AFFINE, "is not of 20x16x6 voxels"),
            (lesion.transpose(1, 0, 2), AFFINE, "is not of 16x20x7 voxels"),
            (lesion, AFFINE @ np.diag([1, 1, 2.0, 1]), "do not lie where"),
        ):
            with pytest.raises(InputError, match=message):
                write_segmentation(tmp_path / "x.seg.dcm", mask, affine, files)
        for file in files:
            image = pydicom.dcmread(file)
            del image.FrameOfReferenceUID
            image.save_as(file)
        with pytest.raises(InputError, match="lack what a Segmentation must repeat"):
            write_segmentation(tmp_path / "x.seg.dcm", lesion, AFFINE, files)
    assert [f.name for f in tmp_path.iterdir()] == ["head"]
