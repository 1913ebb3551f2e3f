import math

import numpy as np
import pytest

from bundle.metrics import Case, measure_case, summarise
from bundle.metrics.summary import bootstrap_interval
from tests.metrics.test_case import BRAIN, SPACING, scan


def case(name, person, purpose, lesions, shift=0.0):
    heatmap, label = scan(lesions, seed=sum(map(ord, name)))
    found = BRAIN & (heatmap > 1.5)
    other = heatmap + shift * label + np.random.RandomState(1).randn(*heatmap.shape)
    methods = {"fusion": (heatmap, found), "other": (other, BRAIN & (other > 1.5))}
    return Case(name, person, purpose, {m: measure_case(h, f, label, BRAIN, SPACING) for m, (h, f) in methods.items()})


TEST = [case(f"t{i}", f"p{i // 2}", "test", 2) for i in range(6)]


def test_means_are_over_cases_with_lesions_and_empty_ones_are_named():
    content = summarise([*TEST, case("empty", "p9", "test", 0)], "fusion")
    assert content["cases_with_lesions"] == 6 and content["cases_without_lesions"] == ["empty"]
    assert content["cases"]["empty"]["fusion"]["dice"] is None
    figures = content["methods"]["fusion"]
    dice = [c.methods["fusion"].values["dice"] for c in TEST]
    assert figures["dice_mean"] == pytest.approx(np.mean(dice))
    assert figures["dice_sd"] == pytest.approx(np.std(dice, ddof=1))
    assert figures["healthy"]["scans"] == 1
    assert figures["dice_tuned_mean"] is None and content["tuning_cases"] == 0
    assert figures["lesions"]["all"]["lesions"] == sum(len(c.methods["fusion"].lesion_ml) for c in TEST)
    by_size = [v["lesions"] for k, v in figures["lesions"].items() if k != "all"]
    assert sum(by_size) == figures["lesions"]["all"]["lesions"]


def test_thresholds_are_tuned_on_other_scans_and_never_beat_the_bound():
    tuning = [case(f"u{i}", f"q{i}", "tuning", 3) for i in range(3)]
    content = summarise([*TEST, *tuning], "fusion")
    assert content["tuning_cases"] == 3 and len(content["cases"]) == 6
    figures = content["methods"]["fusion"]
    assert (
        figures["tuned_threshold"] == summarise([*TEST[:1], *tuning], "fusion")["methods"]["fusion"]["tuned_threshold"]
    )
    for c in TEST:
        values = content["cases"][c.name]["fusion"]
        heatmap, label = scan(2, seed=sum(map(ord, c.name)))
        marked, lesion = (heatmap > figures["tuned_threshold"])[BRAIN], label[BRAIN] > 0
        dice = 2 * (marked & lesion).sum() / (marked.sum() + lesion.sum())
        assert values["dice_tuned"] == pytest.approx(dice, abs=2e-3)
        assert values["dice_best"] >= max(values["dice"], values["dice_tuned"])


def test_healthy_scans_count_false_findings():
    healthy = [case(f"h{i}", f"h{i}", "healthy", 0) for i in range(4)]
    figures = summarise([*TEST, *healthy], "fusion")["methods"]["fusion"]["healthy"]
    false = [c.methods["fusion"].false_findings for c in healthy]
    assert figures["scans"] == 4 and figures["false_findings_per_scan"] == np.mean(false)
    assert figures["scans_with_findings"] == np.mean(np.array(false) > 0)


def test_interval_resamples_people_not_scans():
    values = np.random.RandomState(0).randn(40)
    people = [str(i) for i in range(40)]
    low, high = bootstrap_interval(values.tolist(), people)
    error = values.std() / math.sqrt(40)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.4 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.4 * error)
    assert bootstrap_interval(values.tolist(), people) == [low, high]  # seeded
    repeated = bootstrap_interval([*values.tolist(), *values.tolist()], people * 2)
    assert repeated == pytest.approx([low, high])  # a second scan of everyone is no news
    assert bootstrap_interval([1.0, 2.0], ["a", "a"]) == [None, None]
    assert bootstrap_interval([math.nan, 1.0], ["a", "b"]) == [None, None]


def test_the_gain_over_another_method_is_paired():
    content = summarise(TEST, "fusion")
    gains = [c.methods["fusion"].values["auprc"] - c.methods["other"].values["auprc"] for c in TEST]
    expected = bootstrap_interval(gains, [c.person for c in TEST])
    assert content["methods"]["other"]["auprc_gain_of_score_ci95"] == expected
