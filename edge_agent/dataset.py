"""A device's tokenised sequences, and which of them make up each step.

To learn to write, a sequence of T + 1 tokens is input = tokens[:-1] and labels = tokens[1:],
both (T,). To learn to classify, all T tokens are input, and the one label is the class.

Shape suffixes: M all input tokens of all sequences, N those of one micro-batch, S sequences.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edge_agent.backends.base import NO_TARGET, TokenBatch
from shared.protocol.messages import DeviceId
from shared.protocol.profile import DataShape

IntArray: TypeAlias = npt.NDArray[np.int32]

_SAMPLED = 1024
"""Sequences that are looked at to say how much of what is computed is padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Tokenised records, packed without padding.

    ``input_ids_M`` and ``labels_M`` int32 (`NO_TARGET` where nothing is to be learnt);
    sequence i is [starts[i], starts[i + 1]) of both, ``starts`` (S + 1,) int64. ``token_types_M``
    int32: as in `TokenBatch`.
    """

    input_ids_M: IntArray
    labels_M: IntArray
    starts: npt.NDArray[np.int64]
    token_types_M: IntArray | None = None

    @classmethod
    def join(
        cls,
        parts: Sequence[tuple[IntArray, IntArray]],
        *,
        token_types: Sequence[IntArray] | None = None,
    ) -> Sequences:
        """Return sequences from one (input_ids (T,), labels (T,)) pair each; at least one pair.

        ``token_types``: one (T,) each; None: all 0.
        """
        lengths = [len(ids) for ids, _ in parts]
        return cls(
            input_ids_M=np.concatenate([ids for ids, _ in parts]),
            labels_M=np.concatenate([labels for _, labels in parts]),
            starts=np.cumsum([0, *lengths], dtype=np.int64),
            token_types_M=None if token_types is None else np.concatenate(token_types),
        )

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.starts) - 1

    @property
    def target_tokens(self) -> int:
        """How many positions predict something, over all sequences."""
        return int(np.count_nonzero(self.labels_M != NO_TARGET))

    def batches(self, indices: Iterable[int], size: int) -> tuple[TokenBatch, ...]:
        """Return these sequences, the longest first, at most ``size`` to a micro-batch.

        Which micro-batch a sequence is in changes no result (losses are sums over tokens).
        Ordered by length, less of what is computed is padding (E2E, 24 sequences in
        micro-batches of 8: 12 % of the positions, not 27 %); and with the longest first, a
        device with too little memory finds out at once.
        """
        ordered = sorted(indices, key=self._length, reverse=True)
        return tuple(self._pack(ordered[i : i + size]) for i in range(0, len(ordered), size))

    def _pack(self, indices: Sequence[int]) -> TokenBatch:
        where = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        types_M = self.token_types_M
        types = None if types_M is None else np.concatenate([types_M[part] for part in where])
        return TokenBatch(
            input_ids=np.concatenate([self.input_ids_M[part] for part in where]),
            labels=np.concatenate([self.labels_M[part] for part in where]),
            lengths=tuple(self._length(i) for i in indices),
            token_types=types,
        )

    def _length(self, index: int) -> int:
        return int(self.starts[index + 1] - self.starts[index])


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """What a device trains on and what it is evaluated on (None: nothing was held out)."""

    training: Sequences
    held_out: Sequences | None
    seed: int
    device_id: DeviceId

    def micro_batches(
        self, position: int, *, batch: int, micro_batch: int
    ) -> tuple[TokenBatch, ...]:
        """Return ``batch`` sequences from ``position`` on, by at most ``micro_batch``.

        A function of the arguments, the seed and the device id alone (see `indices_from`).
        """
        indices = indices_from(
            position,
            count=batch,
            sequences=len(self.training),
            seed=self.seed,
            device_id=self.device_id,
        )
        return self.training.batches(indices, micro_batch)

    def shape(self, micro_batch: int) -> DataShape:
        """Return how long the training sequences are, in micro-batches of ``micro_batch``."""
        lengths = np.diff(self.training.starts)
        sample = min(len(lengths), _SAMPLED // micro_batch * micro_batch or micro_batch)
        # As in training: two micro-batches to a step, the longest sequences first.
        batches = [
            batch
            for position in range(0, sample, 2 * micro_batch)
            for batch in self.micro_batches(
                position, batch=2 * micro_batch, micro_batch=micro_batch
            )
        ]
        computed = sum(len(batch.lengths) * max(batch.lengths) for batch in batches)
        return DataShape(
            mean_length=float(lengths.mean()),
            padded_length=computed / sum(len(batch.lengths) for batch in batches),
            longest=int(lengths.max()),
        )

    def evaluation_batches(self, size: int) -> tuple[TokenBatch, ...]:
        """Return every held-out sequence once, at most ``size`` to a micro-batch."""
        if self.held_out is None:
            return ()
        return self.held_out.batches(range(len(self.held_out)), size)


def indices_from(
    position: int, *, count: int, sequences: int, seed: int, device_id: DeviceId
) -> tuple[int, ...]:
    """Return which of ``sequences`` are the next ``count`` of endless shuffled epochs.

    Every epoch holds each sequence once. Nothing is remembered from step to step, so a
    restarted device continues where it was.
    """
    positions = range(position, position + count)
    return tuple(
        int(_epoch_order(seed, device_id, position // sequences, sequences)[position % sequences])
        for position in positions
    )


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, device_id: str, epoch: int, sequences: int) -> npt.NDArray[np.int64]:
    # Philox's raw output never changes with numpy's version; `Generator.permutation` may.
    key = hashlib.sha256(f"{seed}/{device_id}/{epoch}".encode()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(sequences)
    return np.argsort(raw, kind="stable")
