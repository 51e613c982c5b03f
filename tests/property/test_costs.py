"""Laws of the fitted costs: noiseless points come back exactly, and nothing ever falls."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.costs import BYTES_PER_PARAMETER, HELD_BYTES_PER_PARAMETER, Costs, fit
from shared.nonnegative import nonnegative_least_squares
from shared.protocol.profile import BlockPoint, HeadPoint, Measurements, OptimizerPoint
from tests.support.measured import measurements

RUNTIME = 300_000_000
LENGTH = 64


def magnitudes(low: int, high: int) -> st.SearchStrategy[float]:
    """Return numbers over many orders of magnitude, and zero."""
    return st.one_of(st.just(0.0), st.floats(low, high).map(lambda power: 10.0**power))


@st.composite
def truths(draw: st.DrawFn) -> dict[str, list[float]]:
    """Return coefficients of every cost."""

    def some(*powers: tuple[int, int]) -> list[float]:
        return [draw(magnitudes(*limits)) for limits in powers]

    seconds = ((-4, 0), (-7, -3), (-4, 0), (-6, -3), (-12, -9))
    return {
        "forward": [1e-5 + seconds for seconds in some((-4, 0))] + some(*seconds[1:]),
        "backward": [1e-5 + seconds for seconds in some((-4, 0))] + some(*seconds[1:]),
        "head": [1e-6, *some((-6, -3))],
        "optimizer": [1e-6, *some((-10, -6))],
        "memory": [1e5 + draw(magnitudes(5, 9)), *some((5, 9), (2, 5), (2, 5))],
        "head_bytes": [1.0, *some((2, 5))],
    }


def measured_by(truth: dict[str, list[float]]) -> Measurements:
    """Return what a noiseless probe of a machine of this truth would say."""
    tokens = (LENGTH, 8 * LENGTH)
    blocks = [
        block_point(truth, k, n, 1000 * k, flight)
        for k, n, flight in itertools.product((1, 3), (1, 8), (1, 2))
    ]
    blocks.append(block_point(truth, 3, 8, 12_000, 1))
    return measurements(
        runtime_bytes=RUNTIME,
        blocks=tuple(blocks),
        head=tuple(
            HeadPoint(
                tokens=n,
                seconds=line(truth["head"], n),
                extra_bytes=round(line(truth["head_bytes"], n)),
            )
            for n in tokens
        ),
        optimizer=tuple(
            OptimizerPoint(adapter_parameters=p, seconds=line(truth["optimizer"], p))
            for p in (1000, 12_000)
        ),
    )


def block_point(
    truth: dict[str, list[float]], blocks: int, sequences: int, parameters: int, in_flight: int
) -> BlockPoint:
    tokens = sequences * LENGTH
    once, per_block, per_token, per_both = truth["memory"]
    held = once + per_block * blocks + HELD_BYTES_PER_PARAMETER * parameters
    peak = RUNTIME + held + per_token * tokens + in_flight * per_both * blocks * tokens
    return BlockPoint(
        blocks=blocks,
        adapter_parameters=parameters,
        sequences=sequences,
        length=LENGTH,
        in_flight=in_flight,
        forward_s=seconds(truth["forward"], blocks, tokens, parameters),
        backward_s=seconds(truth["backward"], blocks, tokens, parameters),
        peak_bytes=round(peak),
    )


def seconds(truth: list[float], blocks: float, tokens: float, parameters: float) -> float:
    c0, c1, c2, c3, c4 = truth
    return c0 + c1 * tokens + blocks * (c2 + c3 * tokens) + c4 * parameters * tokens


def line(truth: list[float], units: float) -> float:
    return truth[0] + truth[1] * units


SHAPES = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 40),
        "tokens": st.integers(1, 20_000),
        "adapter_parameters": st.integers(0, 10**7),
    }
)


ALL_BUT_NOTHING_PER_PARAMETER = {
    "forward": [1.00001, 0.0, 0.0, 0.0, 1e-12],
    "backward": [1.00001, 0.0, 0.0, 0.0, 1e-12],
    "head": [1e-6, 0.0],
    "optimizer": [1e-6, 0.0],
    "memory": [1e5, 0.0, 0.0, 0.0],
    "head_bytes": [1.0, 0.0],
}


@settings(max_examples=200)
@given(truths(), SHAPES, st.integers(1, 4))
@example(
    ALL_BUT_NOTHING_PER_PARAMETER,
    {"blocks": 1, "tokens": 3792, "adapter_parameters": 3_272_166},
    1,
)
def test_noiseless_points_come_back_exactly_far_outside_what_was_measured(truth, shape, in_flight):
    costs = fit(measured_by(truth))
    near = {"rtol": 1e-4}
    work = (shape["blocks"], shape["tokens"], shape["adapter_parameters"])
    expected = seconds(truth["forward"], *work)
    np.testing.assert_allclose(costs.forward_s(**shape), expected, **near)
    expected = seconds(truth["backward"], *work)
    np.testing.assert_allclose(costs.backward_s(**shape), expected, **near)
    tokens = shape["tokens"]
    np.testing.assert_allclose(costs.head_s(tokens=tokens), line(truth["head"], tokens), **near)
    once, per_block, per_token, per_both = truth["memory"]
    kept = in_flight * per_both * shape["blocks"] * tokens
    passing = max(per_token * tokens, line(truth["head_bytes"], tokens))
    held = once + per_block * shape["blocks"] + BYTES_PER_PARAMETER * shape["adapter_parameters"]
    found = costs.peak_bytes(**shape, in_flight=in_flight, head_tokens=tokens)
    # Bytes are measured in whole numbers, so the last digit of a small slope is not known.
    np.testing.assert_allclose(found, RUNTIME + held + kept + passing, rtol=1e-4, atol=2e6)


@st.composite
def anything(draw: st.DrawFn) -> Measurements:
    """Return measurements as noisy and lopsided as the types allow, but for their peaks."""
    positive = st.floats(1e-6, 1e3)
    blocks = draw(
        st.lists(
            st.builds(
                BlockPoint,
                blocks=st.integers(1, 8),
                adapter_parameters=st.integers(0, 10**6),
                sequences=st.integers(1, 16),
                length=st.integers(1, 512),
                in_flight=st.integers(1, 3),
                forward_s=positive,
                backward_s=positive,
                peak_bytes=st.integers(RUNTIME // 2, 10**11),
            ),
            min_size=3,
            max_size=6,
        )
    )
    heads = st.builds(
        HeadPoint,
        tokens=st.integers(1, 4096),
        seconds=positive,
        extra_bytes=st.integers(0, 10**9),
    )
    optimizers = st.builds(
        OptimizerPoint, adapter_parameters=st.integers(0, 10**6), seconds=positive
    )
    return measurements(
        runtime_bytes=RUNTIME,
        blocks=tuple(blocks),
        head=tuple(draw(st.lists(heads, max_size=3))),
        optimizer=tuple(draw(st.lists(optimizers, max_size=3))),
    )


def everything(costs: Costs, work: dict[str, Any]) -> list[float]:
    """Return every cost of some work."""
    shape = {key: work[key] for key in ("blocks", "tokens", "adapter_parameters")}
    memory = {key: work[key] for key in ("in_flight", "head_tokens")}
    costs_of_it = [
        costs.forward_s(**shape),
        costs.backward_s(**shape),
        costs.head_s(tokens=work["head_tokens"]),
        costs.optimizer_s(adapter_parameters=work["adapter_parameters"]),
        costs.peak_bytes(**shape, **memory),
        *costs.memory_line(tokens=work["tokens"]),
    ]
    return [float(cost) for cost in costs_of_it]


WORK = {
    "blocks": 40,
    "tokens": 10**5,
    "adapter_parameters": 10**7,
    "in_flight": 8,
    "head_tokens": 10**5,
}


@settings(max_examples=200)
@given(
    anything(),
    st.fixed_dictionaries({key: st.integers(0, most) for key, most in WORK.items()}),
    st.sampled_from(sorted(WORK)),
    st.integers(1, 1000),
)
def test_no_cost_falls_when_there_is_more_to_do(measured, work, grows, by):
    costs = fit(measured)
    less = everything(costs, work)
    more = everything(costs, {**work, grows: work[grows] + by})
    assert all(np.isfinite(less))
    assert min(less) >= 0
    assert all(b >= a * (1 - 1e-12) for a, b in zip(less, more, strict=True))


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 5))
def test_no_other_choice_of_coefficients_has_a_smaller_error(seed, points, count):
    random = np.random.default_rng(seed)
    design_PC = random.uniform(0, 1, (points, count)) * 10.0 ** random.integers(-3, 6, count)
    target_P = 1 + 0.3 * random.standard_normal(points)
    x_C = nonnegative_least_squares(design_PC, target_P, np.ones(count))
    assert (x_C >= 0).all()
    assert error(design_PC, target_P, x_C) <= best_error(design_PC, target_P) + 1e-8


def error(design_PC, target_P, x_C) -> float:
    return float(np.sum((design_PC @ x_C - target_P) ** 2))


def best_error(design_PC, target_P) -> float:
    """Return the least error by trying every set of coefficients that may be more than zero."""
    count = design_PC.shape[1]
    best = error(design_PC, target_P, np.zeros(count))
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            x_C = np.zeros(count)
            scale = np.linalg.norm(design_PC[:, chosen], axis=0)
            x_C[chosen] = np.linalg.lstsq(design_PC[:, chosen] / scale, target_P)[0] / scale
            if (x_C >= 0).all():
                best = min(best, error(design_PC, target_P, x_C))
    return best
