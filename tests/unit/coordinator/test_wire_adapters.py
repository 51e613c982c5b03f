"""Adapters on the wire: what goes out comes back, and what does not belong together is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.wire_adapters import from_wire, to_wire
from shared.adapters import LoraPair, ModuleAdapter
from shared.errors import NumericsError
from shared.protocol.messages import AdapterTensors
from shared.protocol.tensors import pack, unpack

MODULE = "transformer.h.0.attn.c_attn"


def pair(rank=2, *, dtype=np.float32):
    random = np.random.default_rng(rank)
    return LoraPair(
        random.standard_normal((rank, 3)).astype(dtype),
        random.standard_normal((4, rank)).astype(dtype),
        scaling=0.5,
    )


def sent(**changes):
    trained = pair()
    message = AdapterTensors(module=MODULE, a=pack(trained.a_RI), b=pack(trained.b_OR), scaling=0.5)
    return dataclasses.replace(message, **changes)


def test_a_delivered_pair_is_what_was_sent():
    found = from_wire([sent()])[MODULE]
    np.testing.assert_array_equal(found.a_RI, pair().a_RI)
    np.testing.assert_array_equal(found.b_OR, pair().b_OR)
    assert found.scaling == 0.5


def test_a_hand_back_is_float32_and_holds_the_frozen_rest_where_there_is_one():
    held = {
        MODULE: ModuleAdapter(pair(dtype=np.float64), pair(3, dtype=np.float64)),
        "h.1.q": ModuleAdapter(pair(0)),
    }
    whole, bare = to_wire(held)
    assert {f.dtype for f in (whole.a, whole.b, whole.frozen_a, whole.frozen_b)} == {"float32"}
    np.testing.assert_array_equal(unpack(whole.frozen_a), pair(3).a_RI)
    assert (whole.module, whole.scaling) == (MODULE, 0.5)
    assert (bare.frozen_a, bare.frozen_b, bare.a.shape, bare.b.shape) == (
        None,
        None,
        (0, 3),
        (4, 0),
    )


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        ([sent(b=pack(np.zeros((4, 3), np.float32)))], r"A \(2, 3\) and B \(4, 3\) are not"),
        ([sent(a=pack(np.zeros(6, np.float32)))], r"A \(6,\)"),
        ([sent(a=pack(np.zeros((2, 3), np.int32)))], "got int32 and float32"),
        ([sent(b=pack(pair().b_OR, "bfloat16"))], "got float32 and bfloat16"),
        ([sent(), sent()], "again"),
    ],
)
def test_what_is_no_pair_is_refused_by_its_module(adapters, says):
    with pytest.raises(NumericsError, match=rf"{MODULE}: .*{says}"):
        from_wire(adapters)
