"""METEOR, ROUGE-L and CIDEr against values computed by hand from the papers' formulas."""

from __future__ import annotations

import math
import shutil

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from coordinator.evaluation.captions import (
    JavaError,
    TokenisedPairs,
    cider,
    meteor,
    rouge_l,
    tokenised,
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on this machine")


def pairs(*each: tuple[str, list[str]]) -> TokenisedPairs:
    return TokenisedPairs(
        {number: [prediction] for number, (prediction, _) in enumerate(each)},
        dict(enumerate(references for _, references in each)),
    )


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    """Best precision 4 of 5 and best recall 4 of 6, β = 1.2; the mean over predictions."""
    one = ("the cat on a mat", ["the cat sat on the mat", "a cat on the red mat now"])
    precision, recall, beta = 4 / 5, 4 / 6, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert rouge_l(pairs(one)) == pytest.approx(expected)
    assert rouge_l(pairs(one, ("x", ["y"]))) == pytest.approx(expected / 2)


def test_cider_is_ten_for_the_reference_itself_and_nothing_for_other_words():
    said = ("red car stops here", ["red car stops here"])
    other = ("tall green trees sway", ["old blue boats drift"])
    assert cider(pairs(said, other)) == pytest.approx((10 + 0) / 2)


def test_cider_is_the_mean_cosine_of_tf_idf_with_a_penalty_for_length():
    """Every n-gram is in one of two examples: weight log 2 each. Two words of four.

    Cosines: 2 / (√2 √4) of words, 1 / (√1 √3) of pairs. Lengths differ by 2 (counted in
    pairs of words): exp(-2² / (2 · 6²)).
    """
    shorter = ("red car", ["red car stops here"])
    other = ("tall green trees sway", ["old blue boats drift"])
    cosines = 2 / math.sqrt(2 * 4) + 1 / math.sqrt(3) + 0 + 0
    expected = 10 * cosines / 4 * math.exp(-4 / 72)
    assert cider(pairs(shorter, other)) == pytest.approx(expected / 2)


def test_cider_of_references_without_words_is_nothing():
    assert cider(pairs(("a", [""]), ("", [""]))) == 0.0


@needs_java
def test_words_are_those_of_the_captions_tokenizer():
    texts = ["The Café isn't family-friendly, £20-25.", "", "A (cheap) 'pub' -- see?", "a | b"]
    theirs = PTBTokenizer().tokenize({0: [{"caption": text} for text in texts]})
    assert tokenised(texts) == theirs[0]
    assert theirs[0][0].startswith("the café is n't family-friendly")


@needs_java
def test_no_line_break_puts_texts_out_of_step():
    assert tokenised(["a\u2028b\nc\r\nd", "", " \x85 ", "e"]) == ["a b c d", "", "", "e"]


@needs_java
def test_every_prediction_keeps_its_own_references():
    found = TokenisedPairs.of(["Pub.", "", "C!"], [["One", "two,"], ["Three"], ["four"]])
    assert found.predictions == {0: ["pub"], 1: [""], 2: ["c"]}
    assert found.references == {0: ["one", "two"], 1: ["three"], 2: ["four"]}


def test_a_java_that_fails_is_said_in_its_own_words(tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Could not reserve enough space' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaError, match="Stanford tokenizer failed: Could not reserve enough"):
        tokenised(["a"])
    with pytest.raises(JavaError, match="METEOR failed: Could not reserve enough space"):
        meteor(pairs(("a", ["a"])))
    java.unlink()
    with pytest.raises(JavaError, match="Stanford tokenizer could not be run"):
        tokenised(["a"])
    with pytest.raises(JavaError, match="METEOR could not be run"):
        meteor(pairs(("a", ["a"])))
