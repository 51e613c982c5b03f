"""What a device's records are to a run, by its task: sequences with their targets.

Shape suffix: T tokens of one sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_agent.backends.base import NO_TARGET
from edge_agent.dataset import IntArray, Sequences
from edge_agent.labelled import Example, labelled, warn_of_one_class
from edge_agent.records import Records
from edge_agent.vocabulary import Vocabulary
from shared.architecture import ModelArchitecture
from shared.errors import DataError
from shared.terms import TrainingTerms

logger = logging.getLogger(__name__)


def sequences_of(
    records: Records,
    vocabulary: Vocabulary,
    *,
    training: TrainingTerms,
    architecture: ModelArchitecture,
    held_out: bool = False,
) -> Sequences:
    """Return the records as the run's task sees them, each of at most ``max_length`` tokens.

    ``held_out``: nothing is learnt from them.

    Raises:
        DataError: a record is not one for this task, or nothing is left to learn.
        ModelError: the tokenizer does not belong to the model, or lacks a chat template.
    """
    if training.task == "causal-lm":
        return vocabulary.tokenise(records, max_length=training.max_length)
    examples = labelled(records, training.classes)
    if not held_out:
        warn_of_one_class(examples, records)
    max_length = training.max_length
    return _classified(
        examples, vocabulary, max_length=max_length, architecture=architecture, path=records.path
    )


def _classified(
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    *,
    max_length: int,
    architecture: ModelArchitecture,
    path: Path,
) -> Sequences:
    """Return one label in each sequence, where the model's classifier reads: the class."""
    texts = [one.text if one.pair is None else (one.text, one.pair) for one in examples]
    encodings = vocabulary.encode_whole(texts, max_length=max_length)
    kept = [(e, one.label) for e, one in zip(encodings, examples, strict=True) if e.ids]
    if not kept:
        raise DataError(f"{path}: the tokenizer makes no token of any text; check them")
    if len(kept) < len(examples):
        dropped = len(examples) - len(kept)
        logger.warning("%s: %d texts without a token are left out", path, dropped)
    at = 0 if architecture.family.classifier.reads == "first" else -1
    paired = examples[0].pair is not None
    sequences = Sequences.join(
        [(_array(e.ids), _one_label(len(e.ids), at, label)) for e, label in kept],
        token_types=[_array(e.type_ids) for e, _ in kept] if paired else None,
    )
    vocabulary.check_ids(sequences)
    return sequences


def _one_label(length: int, at: int, label: int) -> IntArray:
    labels_T = np.full(length, NO_TARGET, dtype=np.int32)
    labels_T[at] = label
    return labels_T


def _array(values: list[int]) -> IntArray:
    return np.asarray(values, dtype=np.int32)
