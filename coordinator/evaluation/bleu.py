"""BLEU by sacrebleu, and the words that BLEU and NIST count: mteval-v13a's, in lower case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a


@dataclass(frozen=True, slots=True)
class BleuScore:
    """BLEU from 0 to 100, and sacrebleu's signature: what another must set to get the same."""

    value: float
    signature: str


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> BleuScore:
    """Return the BLEU of all predictions together, one list of references to each.

    Lower-cased, with 13a's words: the value of the E2E challenge's script.
    """
    # `force`: E2E's texts have spaces around punctuation, and that is meant so.
    metric = BLEU(lowercase=True, tokenize="13a", force=True)
    # sacrebleu takes the first references of all predictions, then the second ones, and so on.
    streams = list(zip_longest(*references))
    score = metric.corpus_score(list(predictions), streams)
    return BleuScore(float(score.score), str(metric.get_signature()))


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """Return each text's words, as mteval-v13a and `bleu` see them."""
    tokenise = Tokenizer13a()  # type: ignore[no-untyped-call]
    return [tokenise(text.lower()).split() for text in texts]
