"""The page is looked at as a browser reads it: elements, attributes, words."""

import itertools
import json
import logging

import pytest

from coordinator import report_page
from coordinator.report import reading, sections
from shared.errors import ConfigError, StorageError
from tests.support.html_page import Page, charts_are_whole, needs_no_other_file
from tests.support.run_folders import write_run
from tests.testbed.in_process import coordinator_main

HOSTILE = '<script>alert("nano")</script><img src=x onerror=alert(1)> $x^2$ & "quoted"'
FILES = ("metrics.jsonl", "plans.jsonl", "importance.jsonl", "summary.json", "run.yaml")


def page(folder):
    return Page(report_page.write(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def whole(run):
    return page(run)


def test_a_run_is_drawn_in_all_its_aspects(whole):
    assert whole.charts == [
        "Held-out perplexity by steps",
        "Held-out perplexity by time",
        "Training loss by steps",
        "Training loss by time",
        "Seconds a step",
        "Seconds a round",
        "Split layer",
        "Sequences a step",
        "Mean rank",
        "Who did what",
        "Temperature",
        "Accelerator load",
        "Free memory",
        "Bytes in all",
        "Bytes by round",
        "Importance",
        "Rank, the mean over who holds a copy",
        "Importance by kind of module",
        "Norm of the update",
        "Largest rank of a module",
        "Error of the aggregation",
    ]


def test_the_head_says_which_run_it_was_and_how_it_went(whole):
    assert "my-run" in whole.text
    how = "org/tiny by hsplitlora · 1970-01-01 00:16 UTC to 1970-01-01 00:17 UTC · finished"
    assert how in whole.text
    assert "held-out perplexity 100 → 33.2" in whole.text
    assert "optimizer steps 12 of 12" in whole.text
    assert "time 33 s" in whole.text
    assert "sent by devices 12.0 MB sent to devices 24.0 MB" in whole.text


def test_what_a_step_took_stands_beside_what_was_predicted(whole):
    expected = "A step took 2 s under the latest plan, which predicted 1 s (+100 %)."
    assert expected in whole.text


def test_each_device_has_its_plan_and_the_reason(whole):
    row = "nano 3 8 (4 at a time) 4 1 s 2 s 270 memory allows 5, but the link makes 3 faster"
    assert row in whole.text
    assert "refused pi-zero memory allows 5" in whole.text


def test_the_page_needs_no_other_file_and_runs_nothing(whole):
    needs_no_other_file(whole)


def test_charts_are_whole_and_take_their_colours_from_the_page(whole):
    charts_are_whole(whole)


def test_words_from_devices_are_words_in_the_page(tmp_path):
    """No device can have such a name; whoever can write the files still cannot run a script."""
    write_run(tmp_path, devices=(HOSTILE, r"$\frac$"), reason=HOSTILE)
    settings = {"run": {"id": HOSTILE}, "model": {"name": HOSTILE}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    found = page(tmp_path)
    assert {"script", "img"} & set(found.elements) == set()
    assert found.text.count(HOSTILE) >= 6  # title, id, model, device, reason, refusal
    assert len(found.charts) == 21


def test_a_run_without_metrics_still_shows_what_was_planned(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    found = page(tmp_path)
    assert {"Split layer", "Importance"} <= set(found.charts)
    assert {"Seconds a step", "Training loss by steps"} & set(found.charts) == set()


def test_a_run_of_metrics_alone_still_shows_what_was_measured(tmp_path):
    write_run(tmp_path)
    for name in FILES[1:]:
        (tmp_path / name).unlink()
    found = page(tmp_path)
    assert {"Seconds a step", "Training loss by steps", "Who did what"} <= set(found.charts)
    assert {"Split layer", "Importance"} & set(found.charts) == set()
    assert "The importance of weights was not measured in this run." in found.text
    assert "optimizer steps 12 time" in found.text
    assert "nano – – none – – 270" in found.text


def test_every_file_may_be_cut_off_by_a_crash(tmp_path):
    write_run(tmp_path)
    for name in FILES:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-20] + b"\xff")
    assert len(page(tmp_path).charts) == 21


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {name: gpt2}\n")
    found = page(tmp_path)
    assert found.charts == []
    assert f"{tmp_path.name} gpt2 · – to – · not finished" in found.text


def test_a_run_at_work_is_shown_as_far_as_it_came(tmp_path):
    write_run(tmp_path, rounds=1, finished=False)
    found = page(tmp_path)
    assert "not finished" in found.text
    assert "optimizer steps 4 of 12" in found.text
    assert "held-out perplexity 100 → 100" in found.text


def test_a_summary_from_before_a_run_went_on_is_not_believed(tmp_path):
    write_run(tmp_path, rounds=1)
    old = (tmp_path / "summary.json").read_bytes()
    assert reading.read(tmp_path).summary is not None
    write_run(tmp_path, rounds=2, finished=False)
    (tmp_path / "summary.json").write_bytes(old)
    assert reading.read(tmp_path).summary is None


def test_devices_that_train_alone_have_curves_by_rounds(tmp_path):
    """Their losses are known only once a round (no ``train/loss``)."""
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("train/loss", "another"))
    run = reading.read(tmp_path)
    titles = [chart.title for chart in sections.learning(run, {}).charts]
    assert titles[2:] == ["Training loss by steps", "Training loss by time"]
    assert "A step took 2.75 s" in sections.pace(run).text  # (4 steps x 2 s + 3 s) / 4


def test_no_measured_value_spoils_the_page(tmp_path):
    write_run(tmp_path, rounds=2, steps=6)
    path = tmp_path / "metrics.jsonl"
    strange = itertools.cycle([None, 0, -1.5, 1e308, 10**400, "text", [1], True])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    with path.open("a") as file:
        for line in lines:
            spoilt = {key: next(strange) for key in line.keys() - {"time", "round", "step"}}
            file.write(json.dumps(line | spoilt) + "\n")
    assert len(page(tmp_path).charts) == 21


def test_a_fleet_of_hundreds_has_a_page_that_can_be_read(tmp_path):
    write_run(tmp_path, devices=[f"device-{i}" for i in range(300)], rounds=1, steps=2)
    found = page(tmp_path)
    assert "260 more devices are not shown." in found.text
    assert len(found.html) < 3e6


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match="is no run folder"):
        report_page.write(tmp_path)


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run.yaml").write_text("{}")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html cannot be written"):
        report_page.write(tmp_path)


def test_a_run_does_not_fail_for_its_report(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        report_page.write_if_possible(tmp_path)
    assert "the report could not be made; the run itself is whole" in caplog.text
    assert f"hsplit-coordinator report {tmp_path}" in caplog.text


def test_the_command_makes_the_same_page_of_the_same_files_and_says_where(run, whole, tmp_path):
    to = tmp_path / "shared" / "page.html"
    assert coordinator_main("report", str(run), "--to", str(to)).output == f"{to}\n"
    assert to.read_text(encoding="utf-8") == whole.html
    ended = coordinator_main("report", str(tmp_path))
    assert (ended.code, "is no run folder" in ended.words) == (ConfigError.exit_code, True)
