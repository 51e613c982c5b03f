"""NIST against hand-made sums and against the values of the E2E challenge's mteval-v13a."""

from __future__ import annotations

import math

import pytest

from coordinator.evaluation.bleu import words_of
from coordinator.evaluation.nist import nist

CAT = ("the cat sat on the mat", ["the cat is on the mat", "there is a cat on the mat"])
HEED = "It is a guide to action that ensures that the military will forever heed Party commands"
GUARANTEE = (
    "It is the guiding principle which guarantees the military forces always being under the "
    "command of the Party"
)
ENSURE = (
    "It is a guide to action which ensures that the military always obeys the commands of the party"
)
GUIDE = (ENSURE, [HEED, GUARANTEE])
SHORT = ("a cheap pub .", ["The Eagle, a cheap pub, costs £20-25."])
WORD = ("pub", ["a pub", "pub", "the pub there"])


def score(*pairs: tuple[str, list[str]]) -> float:
    predictions = words_of([prediction for prediction, _ in pairs])
    return nist(predictions, [words_of(references) for _, references in pairs])


def test_one_sentence_by_hand():
    """13 words in the references: the 3, cat 2, is 2, on 2, mat 2, there 1, a 1.

    Matched: the twice, cat, on, mat; "the cat" (1 of 3 the), "on the" (2 of 2 on: no
    information), "the mat" (2 of 3 the); "on the mat" (2 of 2: none). 6 words for 6.5.
    """
    words = 2 * math.log2(13 / 3) + 3 * math.log2(13 / 2)
    pairs = math.log2(3 / 1) + math.log2(3 / 2)
    beta = math.log(2) / math.log(1.5) ** 2
    penalty = math.exp(-beta * math.log(6 / 6.5) ** 2)
    assert score(CAT) == pytest.approx((words / 6 + pairs / 5) * penalty, rel=1e-12)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ((CAT,), 2.423020493903),
        ((GUIDE,), 4.534551763719),
        ((CAT, GUIDE), 4.740948871614),
        ((CAT, GUIDE, SHORT), 4.113298029508),
        ((CAT, GUIDE, SHORT, WORD), 4.951875516466),
    ],
    ids=["cat", "guide", "two references each", "two, two and one", "with one word"],
)
def test_it_is_mtevals_value(pairs, expected):
    """The values come from the functions of the challenge's mteval-v13a-sig.pl, run with perl."""
    assert score(*pairs) == pytest.approx(expected, rel=1e-9)


def test_two_thirds_of_the_length_is_worth_half():
    """Of three equal references of 6 words, 4 words: the penalty alone differs."""
    reference = "a b c d e f"
    whole = score((reference, [reference]))
    assert whole == pytest.approx(math.log2(6))
    assert score(("a b c d", [reference])) == pytest.approx(math.log2(6) / 2)


def test_a_match_counts_as_often_as_one_reference_has_it():
    assert score(("a a a a", ["a b c d", "a a x y"])) == pytest.approx(
        2 / 4 * math.log2(8 / 3) + 1 / 3 * math.log2(3 / 1)
    )


def test_nothing_said_or_nothing_matched_is_worth_nothing():
    assert score(("", ["a b"])) == 0.0
    assert score(("c d", ["a b"])) == 0.0
    assert score(("", ["a b"]), ("a b", ["a b"])) > 0.0
