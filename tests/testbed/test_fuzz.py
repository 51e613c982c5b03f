"""The short version of `make fuzz`: every decoder, some hundred hostile payloads each."""

from __future__ import annotations

import os

import pytest

from tests.testbed.fuzz import campaign, trial
from tests.testbed.fuzz.decoders import Decoder
from tests.testbed.fuzz.trial import Trial

PAYLOADS = 200


@pytest.mark.timeout(600)  # seconds of work, but on a machine that may be busy
def test_only_our_errors_come_out_of_any_decoder_within_the_bounds():
    names = campaign.names_like(())
    assert len(names) > 35
    trials = campaign.campaign(
        names, payloads=PAYLOADS, seed=1, processes=1, apart=False, show=False
    )
    assert [words for one in trials for words in campaign.over_the_limits(one)] == []
    for one in trials:
        assert one.taken > 0, f"{one.decoder} refuses even what is right"
        assert one.payloads == PAYLOADS


class Spy(Decoder):
    """A decoder that does with every payload what a test says."""

    def __init__(self, take):
        super().__init__(lambda _: b"payload", lambda _: take)


def tried(monkeypatch, take) -> Trial:
    monkeypatch.setattr(trial, "all_decoders", lambda _: {"spy": Spy(take)})
    monkeypatch.setattr(trial, "_limit_memory", lambda: None)  # it would hold for this process
    try:
        return trial.run("spy", payloads=3, seed=0)
    finally:
        trial.logging.disable(trial.logging.NOTSET)


def test_another_error_is_a_finding(monkeypatch):
    def take(payload):
        raise KeyError("x")

    words = campaign.over_the_limits(tried(monkeypatch, take))
    assert len(words) == 3
    assert words[0].startswith("spy: KeyError: 'x' at test_fuzz.py:")


def test_a_payload_that_takes_too_long_is_a_finding(monkeypatch):
    monkeypatch.setattr(trial, "MOST_PAYLOAD_S", 0.01)

    def take(payload):
        while True:
            os.getpid()

    assert "TooSlowError" in campaign.over_the_limits(tried(monkeypatch, take))[0]


def test_memory_is_measured_and_limited():
    """In the process of a trial: what a header announces by the gigabyte cannot be allocated."""
    context = campaign.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_allocate) == "MemoryError"


def _allocate() -> str:
    trial._limit_memory()
    try:
        bytearray(10 * 2**30)
    except MemoryError as error:
        return type(error).__name__
    return "allocated"


@pytest.mark.parametrize("growth", [trial.MOST_GROWTH_BYTES + 1])
def test_growth_beyond_the_bound_is_reported(growth):
    one = Trial(decoder="x", payloads=1, growth_bytes=growth)
    assert campaign.over_the_limits(one) == ["x: grew by 64 MiB"]
