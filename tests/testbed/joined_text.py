"""The text of several devices as one data set, for benchmarks that train in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_agent.dataset import Sequences
from edge_agent.records import Records
from edge_agent.vocabulary import Vocabulary


def joined(vocabulary: Vocabulary, files: Sequence[Path], *, max_length: int) -> Sequences:
    """Return all records of the files, in their order."""
    parts = []
    for file in files:
        tokens = vocabulary.tokenise(Records.load(file), max_length=max_length)
        for index in range(len(tokens)):
            rows = slice(tokens.starts[index], tokens.starts[index + 1])
            parts.append((tokens.input_ids_M[rows], tokens.labels_M[rows]))
    return Sequences.join(parts)
