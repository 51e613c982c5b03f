"""Which sequences make up a step: a function of seed, device, step and batch alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.backends.base import NO_TARGET, TokenBatch
from edge_agent.dataset import Dataset, Sequences, indices_from
from shared.protocol.messages import DeviceId

NANO = DeviceId("nano")


def sequences(lengths: list[int]) -> Sequences:
    """Sequence i is of tokens i, and its last position alone is a target."""
    return Sequences.join(
        [
            (
                np.full(length, i, dtype=np.int32),
                np.array([NO_TARGET] * (length - 1) + [i], dtype=np.int32),
            )
            for i, length in enumerate(lengths)
        ]
    )


def dataset(lengths: list[int], *, seed: int = 0, device_id: DeviceId = NANO) -> Dataset:
    return Dataset(sequences(lengths), sequences(lengths), seed, device_id)


def members(batches: tuple[TokenBatch, ...]) -> list[int]:
    """Return which sequences are in the batches, checking that each is whole."""
    found = []
    for batch in batches:
        ends = np.cumsum(batch.lengths)
        for length, end in zip(batch.lengths, ends, strict=True):
            (member,) = set(batch.input_ids[end - length : end].tolist())
            assert batch.labels[end - length : end].tolist() == [NO_TARGET] * (length - 1) + [
                member
            ]
            found.append(member)
    return found


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch=st.integers(1, 30),
    micro_batch=st.integers(1, 30),
    step=st.integers(0, 10_000),
)
def test_cutting_a_step_otherwise_changes_nothing_but_the_cut(lengths, batch, micro_batch, step):
    data = dataset(lengths)
    cut = data.micro_batches(step * batch, batch=batch, micro_batch=micro_batch)
    whole = data.micro_batches(step * batch, batch=batch, micro_batch=batch)
    assert sorted(members(cut)) == sorted(members(whole))
    assert len(members(whole)) == batch
    assert max(len(one.lengths) for one in cut) <= micro_batch
    assert sum(one.target_tokens for one in cut) == batch
    assert [n for one in cut for n in one.lengths] == sorted(
        (n for one in cut for n in one.lengths), reverse=True
    )


@given(count=st.integers(1, 40), batch=st.integers(1, 50))
def test_every_epoch_holds_each_sequence_once(count, batch):
    taken = [
        i
        for step in range(3 * count)
        for i in indices_from(step * batch, count=batch, sequences=count, seed=3, device_id=NANO)
    ]
    for epoch in range(len(taken) // count):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    # Recorded: a change would make a resumed run see other data than before.
    taken = [indices_from(4 * s, count=4, sequences=6, seed=1, device_id=NANO) for s in range(3)]
    assert taken == RECORDED


def test_seed_device_and_epoch_each_change_the_order():
    def order(seed: int, device_id: str, step: int) -> tuple[int, ...]:
        return indices_from(
            50 * step, count=50, sequences=50, seed=seed, device_id=DeviceId(device_id)
        )

    orders = [order(0, "a", 0), order(1, "a", 0), order(0, "b", 0), order(0, "a", 1)]
    assert len(set(orders)) == 4


def test_evaluation_sees_every_held_out_sequence_once():
    batches = dataset([3, 9, 1, 4, 4]).evaluation_batches(2)
    assert sorted(members(batches)) == [0, 1, 2, 3, 4]
    assert [len(batch.lengths) for batch in batches] == [2, 2, 1]


def test_without_a_held_out_part_there_is_nothing_to_evaluate():
    assert Dataset(sequences([1]), None, 0, NANO).evaluation_batches(4) == ()


def test_arrays_are_int32_as_the_wire_wants_them():
    (batch,) = dataset([2, 3]).micro_batches(0, batch=2, micro_batch=2)
    assert batch.input_ids.dtype == np.int32
    assert batch.labels.dtype == np.int32
    assert batch.lengths == (3, 2)


RECORDED = [(0, 3, 4, 1), (5, 2, 4, 5), (1, 0, 3, 2)]
