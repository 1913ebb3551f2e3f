"""Pages of inference and evaluation; the last test opens them in a real browser, where there is one."""

import base64
import gzip
import io
import json
import re
import shutil

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from bundle.reports.pages import _halved, write_overview, write_viewer
from tests.reports.test_figure import CORONAL, found

EVIL = "<script>alert(1)</script> & 'a' \"b\""


def write(path, name="a", flags="", limit=15_000_000, noise=0.0, **kwargs):
    view, lesions = found(CORONAL, **kwargs)
    view.image[:] += noise * np.random.rand(*view.image.shape)
    result = {"lesions": lesions, "lesion_volume_ml": 1.0, "threshold": 2.5, "not_examined_percent": 3.0}
    write_viewer(path, name, view, result, flags=flags, limit=limit)
    volumes = json.loads(re.search(r"const volumes = (\{.*?\}), range", path.read_text()).group(1))
    images = {k: nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(v))) for k, v in volumes.items()}
    return view, images


def test_a_page_holds_the_scan_on_its_own_voxels(tmp_path):
    view, images = write(tmp_path / "a.html")
    for image in images.values():
        assert image.shape == view.image.shape
        np.testing.assert_allclose(image.affine, view.affine, atol=1e-5)
    assert np.abs(images["heatmap"].get_fdata() - np.where(view.brain, view.heatmap, 0)).max() < 0.03
    inside = view.image < view.grey_range()[1]
    assert np.abs(images["scan"].get_fdata() - view.image)[inside].max() < 0.01
    np.testing.assert_array_equal(np.asarray(images["marks"].dataobj), view.found + 2 * view.truth)
    assert "coarser than" not in (tmp_path / "a.html").read_text()


def test_a_large_scan_is_made_coarser_until_it_fits(tmp_path):
    view, images = write(tmp_path / "a.html", limit=1)
    assert images["scan"].shape == view.image.shape  # too small a volume to be made smaller
    half = _halved(view)
    assert half.image.shape == (10, 16, 12)  # the slices of 4 mm stay
    for corner in ((-0.5, -0.5, -0.5), (9.5, 15.5, 11.5)):
        whole = (np.array(corner) + 0.5) * (2, 1, 2) - 0.5
        np.testing.assert_allclose((half.affine @ [*corner, 1])[:3], (view.affine @ [*whole, 1])[:3])
    assert half.heatmap.max() == view.heatmap.max() and half.found.any() and half.truth.any()


def test_names_and_doubts_cannot_break_the_pages(tmp_path):
    write(tmp_path / "a.html", EVIL, f"{EVIL}; its tissues are odd")
    page = (tmp_path / "a.html").read_text()
    assert "<script>alert" not in page and "Its tissues are odd." in page and "Look twice" in page
    name = "a b'c\"d\n\u65e5#?%"
    for what in ("report.html", "report.png"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{name}_{what}").write_text("")
    rows = [
        {"name": name, "status": f"flagged: {EVIL}; b", "lesions": 1},
        {"name": EVIL, "status": "failed: broken"},
        {"name": "c", "status": "ok", "lesions": "2", "lesion_volume_ml": "1.00"},
    ]
    write_overview(tmp_path / "report.html", rows, {"contrast": "t1"})
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and "<strong>No answer.</strong> broken" in page and "No doubts." in page
    assert "a%20b%27c%22d%0A%E6%97%A5%23%3F%25_report.png" in page and page.count("<img") == 1


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    arguments = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


def test_pages_in_a_browser(tmp_path, browser):
    """No console error and no request but for files; the planes are drawn, move by a click, and jump to a finding."""
    folder = tmp_path / "out of täglich" / "a"
    folder.mkdir(parents=True)
    write(folder / "a_report.html", flags="lies badly")
    shutil.copy(folder / "a_report.html", folder / "a_report.png")
    rows = [{"name": n, "status": "ok", "lesions": k} for n, k in (("a", 2), ("b", 10), ("c", 9))]
    write_overview(folder.parent / "report.html", rows, {})
    page, heard = browser.new_page(viewport={"width": 1200, "height": 700}), []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
    page.goto((folder.parent / "report.html").as_uri())
    page.click("th:nth-child(3)")
    assert page.locator("tbody td:nth-child(3)").all_inner_texts() == ["2", "9", "10"]
    page.click("th:nth-child(3)")
    assert page.locator("tbody td:nth-child(3)").all_inner_texts() == ["10", "9", "2"]
    page.click("a.thumb")
    page.wait_for_function("window.viewer", timeout=60000)
    page.wait_for_timeout(500)

    def told_score():
        return float(page.inner_text("#where").split()[1])

    first, second = (row.locator("td").all_inner_texts() for row in page.locator("tbody tr").all())
    assert (first[2], second[2]) == ("9.0", "4.0") and told_score() == pytest.approx(9, abs=0.05)

    def picture():
        return matplotlib.image.imread(io.BytesIO(page.locator("canvas").screenshot()), format="png")

    start = picture()
    assert (start[..., :3].max(-1) > 0.3).mean() > 0.02  # not all black
    page.locator("tbody tr").nth(1).click()
    page.wait_for_timeout(500)
    assert told_score() == pytest.approx(4, abs=0.05) and np.abs(picture() - start).mean() > 1e-3
    before = page.evaluate("Array.from(viewer.scene.crosshairPos)")
    box = page.locator("canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
    page.wait_for_timeout(300)
    assert page.evaluate("Array.from(viewer.scene.crosshairPos)") != before
    shown = picture()
    page.uncheck("#outlines")
    page.wait_for_timeout(300)
    assert np.abs(picture() - shown).max() > 0.2
    page.fill("#threshold", "8")
    page.fill("#opacity", "0")
    page.wait_for_timeout(300)
    assert page.inner_text("#from") == "8.00" and page.evaluate("viewer.volumes[1].cal_min") == 8
    assert not [line for line in heard if "GPU stall" not in line], heard
    page.close()


def test_a_page_without_findings(tmp_path):
    write(tmp_path / "a.html", with_lesion=False, with_label=False)
    page = (tmp_path / "a.html").read_text()
    assert "0 lesions" in page and 'class="both"' not in page
