"""What this machine can compute, and what is said where something is missing."""

from __future__ import annotations

import shutil
import sys

import pytest

from coordinator.evaluation import metrics
from coordinator.evaluation.metrics import METRICS
from shared.errors import ConfigError

CAPTIONS = ("meteor", "rouge-l", "cider")
PREDICTIONS, REFERENCES = ["a cheap pub ."], [["a cheap pub.", "It is a cheap pub."]]


needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on this machine")


@pytest.fixture
def no_java(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``import package`` fail, as where it is not installed."""
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.usefixtures("no_java")
def test_without_java_the_others_are_computed_and_the_reason_is_said():
    chosen, missing = metrics.possible(None)
    assert chosen == ("perplexity", "bleu", "nist")
    assert tuple(missing) == CAPTIONS
    assert all("Java is not installed" in reason for reason in missing.values())
    found = metrics.score(chosen, PREDICTIONS, REFERENCES)
    assert found.values["bleu"] == pytest.approx(100)
    assert found.values.keys() == {"bleu", "nist"}
    assert found.left_out == {}


@pytest.mark.usefixtures("no_java")
def test_what_was_asked_for_by_name_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"no meteor, cider: Java is not .*out of --metrics"):
        metrics.possible(["bleu", "cider", "meteor"])


def test_without_the_extra_perplexity_is_left(monkeypatch):
    without("sacrebleu", monkeypatch)
    without("pycocoevalcap", monkeypatch)
    chosen, missing = metrics.possible(None)
    assert chosen == ("perplexity",)
    assert all("pip install 'hsplit[evaluation]'" in reason for reason in missing.values())
    assert [names for _, names in metrics.by_reason(missing)] == [["bleu", "nist"], [*CAPTIONS]]
    assert metrics.possible(["perplexity"]) == (("perplexity",), {})
    with pytest.raises(ConfigError, match=r"no nist: sacrebleu is not installed; pip install"):
        metrics.possible(["nist"])


def test_only_what_was_asked_for_is_computed():
    assert metrics.possible(["nist"]) == (("nist",), {})
    found = metrics.score(("nist",), PREDICTIONS, REFERENCES)
    assert found.values.keys() == {"nist"}
    assert found.bleu_signature is None


def test_a_java_that_fails_leaves_its_metrics_out(tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no room' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    chosen, missing = metrics.possible(None)
    assert (chosen, missing) == (METRICS, {})
    found = metrics.score(("bleu", *CAPTIONS), PREDICTIONS, REFERENCES)
    assert found.values.keys() == {"bleu"}
    assert {*found.left_out} == {*CAPTIONS}
    assert all(reason.endswith("failed: no room") for reason in found.left_out.values())


@needs_java
def test_rouge_l_is_in_per_cent_and_cider_is_not():
    found = metrics.score(
        ("rouge-l", "cider"), ["a cheap pub", "x"], [["a cheap pub"], ["far away"]]
    )
    assert found.values["rouge-l"] == pytest.approx(50)
    assert found.values["cider"] == pytest.approx(10 * (3 / 4) / 2)


@needs_java
@pytest.mark.slow
def test_meteor_is_its_formulas_value_over_all_predictions_in_per_cent():
    """4 of 4 words said are among the 7 expected, in 2 pieces; none is a function word.

    P = 1, R = 4/7; α = 0.85, β = 0.2, γ = 0.6 (English).
    """
    precision, recall = 4 / 4, 4 / 7
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    penalty = 0.6 * (2 / 4) ** 0.2
    found = metrics.score(
        ("meteor",),
        ["Red car", "blue boats.", ""],
        [["red car stops"], ["Blue boats drift!"], ["nothing"]],
    )
    assert found.values == {"meteor": pytest.approx(100 * mean * (1 - penalty), rel=1e-9)}
