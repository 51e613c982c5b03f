"""BLEU as the E2E challenge's script has it: sacrebleu's, in lower case, with 13a's words."""

from __future__ import annotations

import pytest

from coordinator.evaluation.bleu import bleu, words_of


def test_one_sentence_by_hand():
    """5 of 6 words, 3 of 5 pairs, 1 of 4 triples; no run of four: half of 1 of 3."""
    found = bleu(
        ["the cat sat on the mat"], [["the cat is on the mat", "there is a cat on the mat"]]
    )
    assert found.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


def test_case_and_spaces_around_punctuation_make_no_difference():
    found = bleu(["there is a Pub , cheap ."], [["There is a pub, cheap."]])
    assert found.value == pytest.approx(100)


def test_the_closest_of_a_varying_number_of_references_sets_the_length():
    predictions = ["a b c d e", "f g h i j"]
    references = [["a b c d e x y z"], ["f g h i j k l", "f g h i j"]]
    # Lengths 8 and 5 for 5 and 5; every run matches.
    assert bleu(predictions, references).value == pytest.approx(100 * 2.718281828 ** (1 - 13 / 10))


def test_the_signature_says_how_to_get_the_same():
    signature = bleu(["a"], [["a", "b"]]).signature
    assert signature.startswith("nrefs:2|case:lc|eff:no|tok:13a|smooth:exp|version:")
    assert "nrefs:var" in bleu(["a", "b"], [["a"], ["a", "b"]]).signature


def test_words_are_13as():
    assert words_of(["The family-friendly Pub, £20-25 (or 3.50)."]) == [
        ["the", "family-friendly", "pub", ",", "£20", "-", "25", "(", "or", "3.50", ")", "."]
    ]
