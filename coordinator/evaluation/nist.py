"""The NIST score, as the E2E challenge's script (an mteval-v13a) computes it. Pure.

Written here because no kept library has it: nltk's gives other values (7.22 where mteval gives
8.54), and mteval itself is a Perl script.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

Words: TypeAlias = Sequence[str]
NGram: TypeAlias = tuple[str, ...]

LONGEST = 5

_HALF_AT = 1.5
"""Translations whose length is 1 / this of the references' score half."""


def nist(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Return the NIST score of predictions, one list of references to each.

    ::

        NIST = Σ_{n=1..5} [Σ_{matched n-grams} info(w_1 … w_n)] / [number of n-grams predicted]
               · exp(−β ln²(min(1, L_sys / L_ref)))

        info(w_1 … w_n) = log2( #(w_1 … w_{n-1}) / #(w_1 … w_n) )

    Symbols: # counts in all references together (of the empty sequence: all words); an n-gram
    matches as often as the one reference that has it most often (clipping); L_sys words
    predicted; L_ref all words of the references over their mean number per prediction;
    β = ln 2 / ln² 1.5.
    Paper: Doddington, Automatic evaluation of machine translation quality using n-gram
    co-occurrence statistics, HLT 2002. L_ref is of the E2E challenge's mteval, which takes a
    varying number of references; where the number is the same for all it is the paper's.
    """
    counts = _occurrences(references)
    total = sum(
        _information(predictions, references, counts=counts, n=n) / max(1, _length(predictions, n))
        for n in range(1, LONGEST + 1)
    )
    per_prediction = sum(map(len, references)) / len(predictions)
    expected = counts[()] / per_prediction
    return total * _penalty(_length(predictions, 1) / expected if expected else 0.0)


def _occurrences(references: Sequence[Sequence[Words]]) -> Counter[NGram]:
    """Return how often every n-gram occurs in all references; the empty one: all words."""
    counts: Counter[NGram] = Counter()
    for words in (words for of_one in references for words in of_one):
        counts[()] += len(words)
        for n in range(1, LONGEST + 1):
            counts.update(_ngrams(words, n))
    return counts


def _information(
    predictions: Sequence[Words],
    references: Sequence[Sequence[Words]],
    *,
    counts: Counter[NGram],
    n: int,
) -> float:
    """Return Σ info over the n-grams of the predictions that match."""
    nats = 0.0
    for words, of_one in zip(predictions, references, strict=True):
        most: Counter[NGram] = Counter()
        for reference in of_one:
            most |= Counter(_ngrams(reference, n))
        matched = Counter(_ngrams(words, n)) & most
        nats += sum(m * math.log(counts[gram[:-1]] / counts[gram]) for gram, m in matched.items())
    return nats / math.log(2)


def _length(predictions: Sequence[Words], n: int) -> int:
    return sum(max(0, len(words) - n + 1) for words in predictions)


def _penalty(ratio: float) -> float:
    if ratio <= 0:
        return 0.0
    beta = math.log(2) / math.log(_HALF_AT) ** 2
    return math.exp(-beta * math.log(min(1.0, ratio)) ** 2)


def _ngrams(words: Words, n: int) -> list[NGram]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))
