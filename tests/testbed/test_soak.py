"""What `soak` makes of its samples: growth is told from noise."""

from __future__ import annotations

import random

import pytest

from tests.testbed.soak import MIB, WARM_UP, Samples, Sizes, growth, rows

SECONDS = [float(second) for second in range(600)]


def test_a_process_that_grows_is_seen_through_odd_samples():
    chance = random.Random(0)
    sizes = [int(100 * MIB + second * 0.01 * MIB) for second in SECONDS]
    expected = 5.99 / 102.995
    assert growth(SECONDS, sizes) == pytest.approx(expected, rel=1e-3)
    for second in chance.sample(range(600), 60):
        sizes[second] = chance.choice([50, 300]) * MIB
    assert growth(SECONDS, sizes) == pytest.approx(expected, rel=0.1)


def test_memory_that_comes_and_goes_in_lumps_is_no_growth():
    chance = random.Random(0)
    sizes = [(100 + 8 * chance.randrange(3)) * MIB for _ in SECONDS]
    sizes[0], sizes[-1] = 100 * MIB, 116 * MIB
    assert abs(growth(SECONDS, sizes)) < 0.005


def test_what_a_process_takes_at_its_start_does_not_count():
    steps = list(range(600))
    sizes = [int(min(step / (600 * WARM_UP), 1.0) * 100 * MIB) for step in steps]
    samples = Samples(SECONDS, steps, {"agent": Sizes(rss=sizes, pss=sizes)})
    (row,) = rows(samples)
    assert (row.process, row.rss_growth, row.rss_bytes) == ("agent", 0.0, 100 * MIB)
