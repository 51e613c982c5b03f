"""An emulated device computes what any other does, later, and in the memory it is said to have."""

from __future__ import annotations

import gc
import re
import threading
import time

import numpy as np
import pytest

from edge_agent.backends.base import MicroBatch
from edge_agent.backends.torch_backend import TorchBackend
from edge_agent.emulation import Emulation, emulated
from edge_agent.emulation.backend import EmulatedBackend, check_memory, rest_s
from shared.errors import MemoryFullError
from shared.memory_use import resident_bytes, trim
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import pack, unpack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.closeness import largest_difference
from tests.support.tiny_models import fresh_adapters, tiny_batch, tiny_model

LENGTHS = (9, 4, 12)
LORA = LoraTerms(r=4, target_modules=("c_attn", "c_fc"))
MIB = 2**20
KEY = MicroBatch(0, 0)


class Rests:
    """Where an emulated device sleeps: it is noted, and time goes on without it."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def __call__(self, seconds: float) -> None:
        self.total_s += seconds


def load(backend, folder, *, split_layer=2):
    folder.mkdir(exist_ok=True)
    model = tiny_model("gpt2")
    backend.load(
        model.front_base(folder, split_layer=split_layer, head=True),
        device_id=DeviceId("nano"),
        training=TrainingTerms(wire_dtype="float32", max_length=16),
        lora=LORA,
        optimizer=OptimizerTerms(learning_rate=3e-3, schedule="constant"),
    )
    held = fresh_adapters(model.architecture, LORA, blocks=range(split_layer))
    backend.set_adapters(held, fold=False)
    return backend


def step(backend, number=0):
    """Take a training step; return activations, loss, the head's gradient, gradient norm."""
    key = MicroBatch(number, 0)
    hidden = backend.forward(key, tiny_batch(LENGTHS), train=True)
    loss, gradient = backend.head(key, hidden, train=True)
    random = np.random.default_rng(number).standard_normal((sum(LENGTHS), 32))
    backend.backward(key, pack(random.astype(np.float32)))
    return unpack(hidden), loss, unpack(gradient), backend.step(number, target_tokens=25)


def test_a_slower_device_computes_the_same(tmp_path):
    plain = load(TorchBackend("cpu"), tmp_path / "a")
    slow = load(
        EmulatedBackend(TorchBackend("cpu"), Emulation(speed=0.1), sleep=Rests()), tmp_path / "b"
    )
    for number in range(3):
        for ours, theirs in zip(step(slow, number), step(plain, number), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert largest_difference(slow.adapters(), plain.adapters()) == 0.0
    assert slow.whole(KEY, tiny_batch(LENGTHS), train=False) == plain.whole(
        KEY, tiny_batch(LENGTHS), train=False
    )


@pytest.mark.parametrize(
    ("computed_s", "passed_s", "speed", "rest"),
    [
        (1.0, 1.0, 0.25, 3.0),
        (1.0, 1.0, 1.0, 0.0),
        (1.0, 2.5, 0.25, 1.5),  # it waited for a core as well: that was no computing
        (1.0, 9.0, 0.25, 0.0),  # and so long that it is late already
    ],
)
def test_a_call_takes_its_computing_time_over_the_speed(computed_s, passed_s, speed, rest):
    assert rest_s(computed_s, passed_s, speed=speed) == pytest.approx(rest)


def test_every_part_of_a_step_is_slowed(tmp_path):
    rests = Rests()
    slow = EmulatedBackend(TorchBackend("cpu"), Emulation(speed=0.01), sleep=rests)
    load(slow, tmp_path)
    assert rests.total_s > 0
    calls = [
        lambda: slow.forward(KEY, tiny_batch(LENGTHS), train=True),
        lambda: slow.head(KEY, pack(np.ones((25, 32), np.float32)), train=True),
        lambda: slow.backward(KEY, pack(np.ones((25, 32), np.float32))),
        lambda: slow.step(0, target_tokens=25),
        lambda: slow.whole(KEY, tiny_batch(LENGTHS), train=True),
    ]
    for call in calls:
        before_s, computed_s = rests.total_s, time.thread_time()
        call()
        computed_s = time.thread_time() - computed_s
        # About a hundred times what it computed; a busy machine lets a part of it pass awake.
        assert 20 * computed_s < rests.total_s - before_s <= 100 * computed_s


class Waits(TorchBackend):
    """Waits in the midst of a forward pass, as for a core that others have."""

    def forward(self, key, batch, *, train):
        threading.Event().wait(0.2)
        return super().forward(key, batch, train=train)


def test_waiting_for_a_core_is_no_computing(tmp_path):
    rests = Rests()
    slow = load(EmulatedBackend(Waits("cpu"), Emulation(speed=0.5), sleep=rests), tmp_path)
    loaded_s = rests.total_s
    slow.forward(KEY, tiny_batch(LENGTHS), train=True)
    assert rests.total_s - loaded_s < 0.1


def test_a_part_that_exceeds_the_memory_is_refused_with_both_numbers(tmp_path):
    gc.collect()
    trim()  # or what the tests before have left to be given back would be room
    limit = resident_bytes() // MIB - 50
    small = EmulatedBackend(TorchBackend("cpu"), Emulation(memory_bytes=limit * MIB))
    with pytest.raises(MemoryFullError, match="this emulated device is out of memory") as caught:
        load(small, tmp_path)
    used, of = map(int, re.findall(r"(\d+) MiB", str(caught.value)))
    assert used > of == limit


class TakesMuch(TorchBackend):
    """Takes memory in a forward pass, and gives it back before that ends."""

    much_bytes = 0

    def forward(self, key, batch, *, train):
        assert len(b"\1" * self.much_bytes) == self.much_bytes
        return super().forward(key, batch, train=train)


def test_memory_that_a_call_takes_and_gives_back_counts(tmp_path):
    inner = TakesMuch("cpu")
    limit_bytes = resident_bytes() + 100 * MIB
    small = load(EmulatedBackend(inner, Emulation(memory_bytes=limit_bytes)), tmp_path / "a")
    small.forward(KEY, tiny_batch(LENGTHS), train=False)
    inner.much_bytes = 300 * MIB
    with pytest.raises(MemoryFullError, match="out of memory"):
        small.forward(KEY, tiny_batch(LENGTHS), train=False)
    assert resident_bytes() < limit_bytes


@pytest.mark.parametrize("give_up", ["discard", "load"])
def test_what_was_too_much_is_forgotten_once_it_is_given_up(tmp_path, give_up):
    inner = TakesMuch("cpu")
    limit_bytes = resident_bytes() + 100 * MIB
    small = load(EmulatedBackend(inner, Emulation(memory_bytes=limit_bytes)), tmp_path / "a")
    inner.much_bytes = 300 * MIB
    with pytest.raises(MemoryFullError, match="out of memory"):
        small.forward(KEY, tiny_batch(LENGTHS), train=False)
    inner.much_bytes = 0
    with pytest.raises(MemoryFullError):
        small.forward(KEY, tiny_batch(LENGTHS), train=False)
    small.discard() if give_up == "discard" else load(small, tmp_path / "b")
    small.forward(KEY, tiny_batch(LENGTHS), train=False)


def test_what_just_fits_fits():
    check_memory(100, 100)
    with pytest.raises(MemoryFullError):
        check_memory(101, 100)


def test_nothing_is_wrapped_for_nothing():
    backend = TorchBackend("cpu")
    assert emulated(backend, None) is backend
    assert emulated(backend, Emulation(latency_s=1.0)) is backend
    assert emulated(backend, Emulation(speed=0.5)).name == "torch"
    assert emulated(backend, Emulation(memory_bytes=2**30)).accelerator is None
