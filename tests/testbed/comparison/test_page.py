"""The comparison's page is looked at as a browser reads it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from coordinator.report import page as report
from shared.errors import DataError
from tests.support.comparisons import LIKELY, comparison, run
from tests.support.html_page import Page, charts_are_whole, needs_no_other_file
from tests.testbed.comparison import caveats, curves, page, settings, tables
from tests.testbed.comparison.outcomes import methods
from tests.testbed.comparison.results import Comparison

LEARNING = ("by steps", "by emulated time", "by bytes over the network")
CHARTS = [
    *(f"Perplexity {along}" for along in LEARNING),
    *(f"Loss {along}" for along in LEARNING),
    "Time to a perplexity, times hsplitlora's",
    "Aggregation error",
    "Training loss",
    *(f"Perplexity {along}" for along in LEARNING),
    "Peak memory, GB",
    "Split layer",
    "Largest rank",
]
HOSTILE = "<script>alert(1)</script> $x$"


def rendered(of):
    return Page(page.render(of))


def told(of):
    """Return the words of the page without its charts, which take seconds to draw."""
    target = page.target_of(of)
    sections = [tables.result(of, target), settings.section(of), caveats.section(of, target)]
    return Page(report.render("A", sections, subtitle="", headline=[], made_from="")).text


def drawings(found):
    """Return each chart's title and words."""
    svgs = found.html.split("<svg")[1:]
    return [(title, Page("<svg" + svg).text) for title, svg in zip(found.charts, svgs, strict=True)]


@pytest.fixture(scope="module")
def whole():
    return rendered(comparison())


def test_a_comparison_is_drawn_in_all_its_aspects(whole):
    assert whole.charts == CHARTS
    charts_are_whole(whole)


def test_the_page_needs_no_other_file_and_runs_nothing(whole):
    needs_no_other_file(whole)


def test_each_curve_has_its_name_beside_it_and_a_chart_has_no_more_than_eight(whole):
    by_steps = drawings(whole)[0][1]
    strategies = [like.name for like in LIKELY if like.kind != "ablation"]
    assert len(strategies) == 8
    assert all(name in by_steps for name in strategies)
    assert "no importance" not in by_steps
    assert "no importance" in drawings(whole)[9][1]


def test_what_sent_nothing_is_in_no_chart_over_bytes(whole):
    assert "cenlora" in drawings(whole)[1][1]
    assert "cenlora" not in drawings(whole)[2][1]


def test_the_table_has_the_figures_and_what_they_are_times_of():
    """10 is half the way from 100 to 1 on the scale of log perplexity."""
    runs = (run("hsplitlora", 100, 1, step_s=1.0, errors=[0.0]),
            run("b", 100, 2, step_s=3.0, errors=[0.25, 0.125]),
            run("b", 100, 4, step_s=3.0, seed=1))  # fmt: skip
    of = Comparison(settings={"target_perplexity": 10}, methods=runs)
    subject, other = (row.cells for row in tables.result(of, page.target_of(of)).tables[0].rows)
    first, second = (30 * math.log(10) / math.log(100 / final) for final in (2, 4))
    assert subject == ("hsplitlora", "1.00", "–", "5 s", "1.00", "500 B", "1.00", "100 B", "0")
    assert other[:3] == ("b", "3.00 (2.00 to 4.00)", "+200.0%")
    assert other[3:5] == (f"{(first + second) / 2:.1f} s", f"{(first + second) / 2 / 5:.2f}")
    assert other[-2:] == ("101 B", "0.25")


def test_exact_methods_have_no_curve_of_errors_and_a_zero_in_the_table(whole):
    errors = drawings(whole)[7][1]
    assert "fedlora" in errors
    assert "flora" not in errors.replace("fedlora", "")


def test_settings_are_shown_with_a_table_of_devices(whole):
    assert "devices speed uplink memory agx 1 100 Mbit/s 20.0 GB" in whole.text
    assert "seeds 0, 1, 2" in whole.text
    assert "quick comparison · tiny-gpt2 · E2E" in whole.text


def test_caveats_are_said(whole):
    assert "Time is emulated" in whole.text
    assert "Peak memory is predicted" in whole.text
    assert "the lowest that every seed of every strategy reached" in whole.text


def test_one_seed_has_figures_without_brackets():
    found = told(comparison(seeds=1))
    assert (
        "(" not in found[found.index("method final perplexity") : found.index("Means over seeds")]
    )


def test_a_method_that_diverged_is_told_and_does_not_spoil_the_rest():
    ends = {"hsplitlora": (9, 8), "b": (math.nan, math.nan), "c": (math.nan, 20)}
    runs = [run(name, 100, end, seed=s) for name, of in ends.items() for s, end in enumerate(of)]
    found = told(Comparison(settings={}, methods=tuple(runs)))
    assert "b diverged – not reached –" in found
    assert "c 20.00 +135.3%" in found
    assert "Diverged with 1 of 2 seeds." in found
    assert "higher with every seed: b, c" in found


def test_a_method_that_stayed_far_above_has_no_time_to_the_target():
    stuck = replace(LIKELY[6], final=150.0)
    found = told(comparison([*LIKELY[:2], stuck]))
    assert "Not so low came ffa-lora." in found
    assert "not reached" in found


def test_methods_are_told_apart_only_where_no_seed_overlaps():
    runs = (run("hsplitlora", 100, 9), run("hsplitlora", 100, 10, seed=1), run("a", 100, 9.5),
            run("b", 100, 8.9), run("c", 100, 10.1))  # fmt: skip
    found = told(Comparison(settings={}, methods=runs))
    assert "higher with every seed: c; lower with every seed: b; not told apart" in found
    assert "over these seeds: a." in found


def test_methods_without_the_one_to_compare_with_are_still_shown():
    found = rendered(comparison(LIKELY[1:3]))
    assert "Perplexity by steps" in found.charts
    assert "Time to a perplexity, times hsplitlora's" not in found.charts


def test_a_comparison_that_has_only_begun_has_a_page():
    assert rendered(Comparison(settings={}, methods=())).charts == []
    begun = comparison(LIKELY[:1], seeds=1)
    first = replace(begun.methods[0], points=begun.methods[0].points[:1], rounds=())
    assert "Split layer" in rendered(replace(begun, methods=(first,))).charts


def test_words_in_the_results_are_words_in_the_page():
    like = replace(LIKELY[1], name=HOSTILE)
    found = rendered(comparison([LIKELY[0], like], title=HOSTILE, devices={HOSTILE: {HOSTILE: 1}}))
    assert "script" not in found.elements
    assert found.text.count(HOSTILE) >= 4


def test_a_fleet_of_methods_has_a_key_each():
    many = methods(comparison([replace(LIKELY[0], name=f"m{i}") for i in range(14)]), "strategy")
    keys = curves.keys_of(many)
    assert len({(key.colour, key.dash) for key in keys.values()}) == len(keys) == 15


def test_the_command_writes_the_same_page_beside_the_results(whole, tmp_path, capsys):
    results = tmp_path / "results.json"
    comparison().save(results)
    assert page.main([str(results)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == whole.html
    results.write_text("{}")
    assert page.main([str(results)]) == DataError.exit_code
