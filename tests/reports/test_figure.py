import matplotlib.image
import numpy as np
import pytest

from bundle.reports import draw_report
from bundle.reports.figure import choose_panels, scanned_plane
from bundle.reports.view import View, describe_place
from bundle.reports.viewer import describe_findings
from tests.conftest import ellipsoid, meta

SHAPE = (20, 24, 16)
# slices from front to back, rows from right to left: a scanner's coronal planes
CORONAL = np.array([[-1.0, 0, 0, 10], [0, 0, -4.0, 30], [0, 1.0, 0, -10], [0, 0, 0, 1]])


def found(affine=None, with_label=True, with_lesion=True):
    """A brain with a large weak lesion and a small strong one; what was found in it."""
    image = ellipsoid(SHAPE, (8, 10, 6)) * 0.7
    weak, strong = ellipsoid(SHAPE, (3, 3, 3), (12, 8, 8)), ellipsoid(SHAPE, (1.5, 1.5, 1.5), (6, 15, 6))
    heatmap = np.where(image > 0, 0.0, -5.0) + 4 * weak + 9 * strong
    lesion = (weak + strong) * with_lesion
    volumes = [meta(v, affine) for v in (image, heatmap, image, lesion)]
    label = meta(weak, affine) if with_label else None
    return View.of(*volumes, label), describe_findings(volumes[1], volumes[3], volumes[2])["lesions"]


def test_a_view_is_turned_and_keeps_places():
    view, lesions = found(CORONAL)
    assert view.image.shape == (20, 16, 24) and np.allclose(view.spacing, (1, 4, 1))
    assert (np.diag(view.affine)[:3] > 0).all()
    place = view.voxel(lesions[0]["peak_mm"])
    assert view.heatmap[place] == 9 and view.found[place] and not view.truth[place]
    assert scanned_plane(view) == 1 and scanned_plane(found()[0]) == 2
    assert describe_place((-26.2, 0.4, -3)) == "26 left, 0 front, 3 down"


def test_the_strongest_findings_stand_in_a_row():
    view, lesions = found(CORONAL)
    assert [(axis, number) for _, axis, number in choose_panels(view, lesions)] == [(1, 1), (1, 2), (2, 1), (0, 1)]
    same = [{**lesions[0], "peak_mm": lesions[0]["peak_mm"]}] * 3
    assert [number for *_, number in choose_panels(view, same)] == [1, 1, 1]  # one plane, and two others through it
    none, lesions = found(with_lesion=False)
    panels = choose_panels(none, lesions)
    assert [axis for _, axis, _ in panels] == [2, 1, 0] and {n for *_, n in panels} == {0}
    assert none.heatmap[panels[0][0]] == 9


@pytest.mark.parametrize("with_label", [True, False])
@pytest.mark.parametrize("affine", [None, CORONAL])
def test_report_is_drawn_with_outlines(tmp_path, with_label, affine):
    view, lesions = found(affine, with_label)
    draw_report(tmp_path / "r.png", "title", view, lesions)
    picture = matplotlib.image.imread(tmp_path / "r.png")
    red = (picture[..., 0] > 0.8) & (picture[..., 1] < 0.4) & (picture[..., 2] < 0.4)
    green = (picture[..., 1] > 0.75) & (picture[..., 0] < 0.5) & (picture[..., 2] < 0.6)
    assert red.sum() > 20 and (green.sum() > 20) == with_label


def test_the_patients_left_is_on_the_right(tmp_path):
    image = np.zeros((20, 20, 10), np.float32)
    image[4:16, 2:18, 2:8] = 1
    image[4:8] *= 3  # RAS: the first rows are the patient's left
    view = View(image, np.zeros_like(image), image > 0, image < 0, None, np.diag([1.0, 1, 3, 1]))
    draw_report(tmp_path / "r.png", "", view, [])
    picture = matplotlib.image.imread(tmp_path / "r.png")[150:300, :, 0]
    columns = picture[:, : picture.shape[1] // 4].mean(0)
    lit = np.flatnonzero(columns > 0.1)
    assert columns[lit[-1] - 5] > 2 * columns[lit[0] + 5] > 0
