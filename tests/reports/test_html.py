"""The report is exercised through the runner in tests/test_runner.py; here are its pictures and awkward cases."""

import re

import numpy as np
import pytest

from bundle.metrics import summarise
from bundle.reports.html import Strip, draw_strip, write_report
from tests.conftest import ellipsoid, meta
from tests.metrics.test_summary import TEST, case


def strip(name="a", affine=None, label=True):
    brain, lesion = ellipsoid((20, 24, 16), (8, 10, 6)), ellipsoid((20, 24, 16), (2, 2, 3), (12, 12, 10))
    data = {"image": brain + lesion, "heatmap": 5 * lesion - 1, "lesion": lesion}
    if label:
        data["label"] = lesion
    return Strip.of({"name": name, **{k: meta(v, affine) for k, v in data.items()}})


def test_a_strip_shows_the_lesion_whichever_way_the_scan_lies():
    one, turned = strip(), strip(affine=np.array([[0, 0, -2, 0], [0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1.0]]))
    assert one.image.shape == (20, 24, 3) and turned.image.shape == (16, 24, 3)
    for s in (one, turned, strip(label=False)):
        assert s.found.any((0, 1)).all()
        assert len(draw_strip(s).axes) == 9
    assert not strip(label=False).truth.any()


@pytest.mark.parametrize("lesions", [True, False])
def test_names_cannot_break_the_page(tmp_path, lesions):
    cases = TEST if lesions else [case("e1", "p", "test", 0)]
    content = summarise([*cases, case("healthy", "h", "healthy", 0)], "fusion")
    content |= {"settings": {"score": "fusion", "contrast": "t1", "space": "atlas"}, "failed": ["<b>x: failed: y"]}
    content["threshold"] = {"value": 1.5, "chosen_by": "healthy", "tuned_by": "nobody", "dice_best": "bound"}
    evil = "<script>alert(1)</script>"
    content["cases"][evil] = content["cases"].pop(cases[0].name)
    strips = [strip(evil), *(strip(c.name) for c in cases[1:])]
    write_report(tmp_path / "report.html", content, cases, strips)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "<b>x" not in page and page.count("data:image/png") == (5 if lesions else 0)
    assert not re.search(r"[>\s]nan[<\s]", page, re.IGNORECASE)
