"""Law 7: with labels: device nothing on the broker holds a token id, or anything made from one
but lengths, activations, gradients, adapters, importance, counts and losses.

All traffic of a run is recorded and looked at twice: by structure, every field of every message
of a device against a list; and by content, every byte against the text and its tokens in every
usual spelling. A run with labels: server shows that the second look does find them.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import pytest

from shared.protocol.messages import Activations, EvaluationResult, PieceBytes, Ready
from shared.protocol.tensors import TensorFrame
from shared.protocol.topics import parse
from tests.support.outcomes import PATIENT
from tests.support.planned import planned
from tests.support.traffic import messages

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

FLOAT = "float tensor"
CALL = {"session": str, "number": int, "answered_below": int}
ADAPTER = {
    "module": str, "a": FLOAT, "b": FLOAT, "scaling": float, "frozen_a": None, "frozen_b": None,
}  # fmt: skip
LENGTHS = [int]
NOTHING_SENSED = {
    "accelerator": None, "accelerator_memory_bytes": None, "accelerator_shares_memory": bool,
    "driver": None, "power_mode": None, "memory_bytes": None, "cpus": None,
}  # fmt: skip
POINT = {
    "blocks": int, "adapter_parameters": int, "sequences": int, "length": int, "in_flight": int,
    "forward_s": float, "backward_s": float, "spread": float, "peak_bytes": int,
}  # fmt: skip
MEASUREMENTS = {
    "version": int, "hsplit_version": str, "backend": str, "dtype": str, "threads": None,
    "model": str, "on_gpu": bool, "runtime_bytes": int, "memory_bytes": None, "blocks": [POINT],
    "head": [{"tokens": int, "seconds": float, "spread": float, "extra_bytes": int}],
    "optimizer": [{"adapter_parameters": int, "seconds": float}],
    "link": {"uplink_bytes_per_s": float, "downlink_bytes_per_s": float, "round_trip_s": float},
    "computes_with": None,
}  # fmt: skip
"""Sizes and seconds of a part of the public base, on tokens drawn at random."""
FROM_A_DEVICE: Mapping[str, Mapping[str, Any]] = {
    "join_request": {
        "call": CALL,
        "profile": {
            "backend": str, "hsplit_version": str, "machine": str, "accelerator": None,
            "memory_limit_bytes": None, "sequences": int, "evaluation_sequences": int,
            "facts": NOTHING_SENSED, "computes_with": None,
        },
    },
    "graphs_request": {"call": CALL},
    "piece_request": {"call": CALL, "sha256": str, "offset": int, "length": int},
    "ready": {
        "call": CALL, "measurements": MEASUREMENTS, "overloaded": None,
        "data": {"mean_length": float, "padded_length": float, "longest": int},
    },
    "prepared": {"call": CALL, "plan_version": int, "refused": None},
    "activations": {
        "call": CALL, "purpose": str, "round": int, "step": int, "micro_batch": int,
        "micro_batches": int, "target_tokens": int, "lengths": LENGTHS, "hidden": FLOAT,
        "labels": None,
    },
    "hidden_gradients": {
        "call": CALL, "round": int, "step": int, "micro_batch": int, "loss_sum": float,
        "gradient": FLOAT, "purpose": str,
    },
    "evaluation_result": {
        "call": CALL, "round": int, "loss_sum": float, "target_tokens": int, "sequences": int,
        "importance": {str: float}, "probe_tokens": int,
        "counts": [{"actual": int, "predicted": int, "true_positives": int}],
    },
    "round_result": {
        "call": CALL, "round": int, "adapters": [ADAPTER], "loss_sum": float,
        "target_tokens": int, "steps": int, "busy_s": float, "compute_s": float,
        "classifier": [{"name": str, "data": FLOAT}],
    },
    "heartbeat": {"session": str, "awaiting": [int], "telemetry": None},
    "credit": {"transfer": int, "chunks": int},
}  # fmt: skip
"""All that a device ever says, field by field; None: the field is not used at all."""
TO_THE_COORDINATOR = ("requests", "telemetry", "activations", "adapter")
WINDOW = 8
"""So many tokens in a row are taken for text; fewer may come about by chance."""


@pytest.fixture(scope="module", params=["device", "server"])
def run(request, tmp_path_factory):
    """A whole run, with chunks small enough that tensors are cut, and all that was published.

    Device b computes without torch.
    """
    folder = tmp_path_factory.mktemp("recorded")
    sim = planned(
        folder,
        labels=request.param,
        rules=PATIENT,
        max_payload_bytes=5000,
        without_torch="b",
        rounds={"count": 1, "steps": 2},
    )
    sim.run()
    return request.param, sim, list(messages(sim.broker.traffic))


def problems(value: Any, allowed: Any, where: str) -> Iterator[str]:
    """Yield how ``value`` is more than ``allowed``."""
    if isinstance(allowed, Mapping) and dataclasses.is_dataclass(value):
        names = {f.name for f in dataclasses.fields(value)} - {"type"}
        yield from (f"{where}.{name} is not listed" for name in names - allowed.keys())
        for name in names & allowed.keys():
            yield from problems(getattr(value, name), allowed[name], f"{where}.{name}")
    elif isinstance(allowed, Mapping) and isinstance(value, dict):
        ((names_are, values_are),) = allowed.items()
        for name, item in value.items():
            yield from problems(name, names_are, f"the names in {where}")
            yield from problems(item, values_are, where)
    elif isinstance(allowed, list) and isinstance(value, tuple):
        for item in value:
            yield from problems(item, allowed[0], where)
    elif not _is_plain(value, allowed):
        yield f"{where} is {type(value).__name__}"


def _is_plain(value: Any, allowed: Any) -> bool:
    if allowed == FLOAT:
        return isinstance(value, TensorFrame) and (value.dtype, len(value.shape)) == ("float32", 2)
    return value is None if allowed is None else type(value) is allowed


def problems_of(sent) -> list[str]:
    found = []
    for one in sent:
        if one.address.kind in TO_THE_COORDINATOR:
            allowed = FROM_A_DEVICE.get(one.message.type)
            found += problems(one.message, allowed, one.message.type)
    return found


def test_a_device_says_nothing_but_what_is_listed(run):
    labels, _, sent = run
    assert {m.message.type for m in sent} >= FROM_A_DEVICE.keys() - {"hidden_gradients"}
    found = Counter(problems_of(sent))
    if labels == "device":
        assert not found
    else:
        assert found.keys() == {"activations.labels is TensorFrame"}, "the list is not looked at"


def test_no_message_has_a_tensor_of_integers_but_the_public_base(run):
    """Those are the bytes of the model's files, from the coordinator, exactly as they are.

    And those of the graphs, which are made of the model's config alone.
    """
    labels, sim, sent = run
    store, graphs = sim.coordinator._supplies._store, sim.graphs.found
    integers = []
    for one in sent:
        frames = [f for f in tensors_of(one.message) if not f.dtype.startswith("float")]
        if isinstance(one.message, PieceBytes):
            data = one.message.data
            source = graphs if one.message.sha256 in graphs.contents else store
            stored = source.read(one.message.sha256, offset=one.message.offset, length=data.nbytes)
            assert bytes(data.data) == bytes(stored)
        elif frames:
            integers.append(one.message.type)
    assert set(integers) == (set() if labels == "device" else {"activations"})


def tensors_of(value: Any) -> Iterator[TensorFrame]:
    if isinstance(value, TensorFrame):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def spellings(tokens: np.ndarray) -> dict[str, bytes]:
    """Return the usual ways to write a row of token ids."""
    numbers = [int(token) for token in tokens]
    written = {
        f"{name}, {order}": tokens.astype(order + name).tobytes()
        for name in ("i2", "i4", "i8", "f2", "f4", "f8")
        for order in "<>"
    }
    packed = {"msgpack": b"".join(msgpack.packb(n) for n in numbers)}
    texts = {"json": json.dumps(numbers)[1:-1].encode(), "text": str(numbers)[1:-1].encode()}
    return {**written, **packed, **texts, "json, dense": texts["json"].replace(b" ", b"")}


def secrets(sim) -> Iterator[tuple[str, bytes]]:
    """Yield all that must not be found, with a name for it."""
    for name, device in sim.devices.items():
        data = device.agent._participation._data
        for part in (data.training, data.held_out):
            for first, end in zip(part.starts, part.starts[1:], strict=False):
                for start in range(first, end - WINDOW, WINDOW // 2):
                    window = part.input_ids_M[start : start + WINDOW]
                    for how, written in spellings(window).items():
                        yield f"tokens of {name} as {how}", written
        for line in (sim.folder / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            for text in (row[name] for name in row if name != "label"):
                for encoding in ("utf-8", "utf-16-le"):
                    yield f"text of {name} in {encoding}", text.strip(" ->").encode(encoding)


def leaks(sim, sent) -> Counter[str]:
    """Search the payloads as they were, and the messages that were cut over several of them."""
    names = {t: parse(t) for t, _ in sim.broker.traffic}
    raw = [p for t, p in sim.broker.traffic if names[t] is None or names[t].kind != "weights"]
    haystack = b"\0\0".join([*raw, *(m.encoded for m in sent if m.address.kind != "weights")])
    return Counter(what for what, secret in secrets(sim) if secret in haystack)


def test_no_byte_on_the_broker_spells_the_text_or_its_tokens(run):
    labels, sim, sent = run
    found = leaks(sim, sent)
    assert sum(1 for _ in secrets(sim)) > 2000, "there is little to look for"
    if labels == "device":
        assert not found
        return
    # The labels of a causal model are its text: the search finds them, of every device.
    assert found.keys() >= {f"tokens of {name} as i4, <" for name in sim.devices}
    assert sum(found.values()) > 50


@pytest.mark.parametrize("run", ["device"], indirect=True)
def test_the_search_finds_text_and_tokens_however_they_are_written(run):
    """One secret of each kind, hidden in a message of the real traffic: it is found."""
    _, sim, sent = run
    kinds = dict(reversed([*secrets(sim)]))
    sample = next(m for m in sent if isinstance(m.message, Activations))
    smuggled = [
        dataclasses.replace(sample, encoded=sample.encoded[:100] + secret + b"\0")
        for secret in kinds.values()
    ]
    assert leaks(sim, [*sent, *smuggled]).keys() == kinds.keys()


def test_the_run_was_one_that_has_something_to_hide(run):
    labels, sim, sent = run
    activations = [m.message for m in sent if isinstance(m.message, Activations)]
    assert {m.purpose for m in activations} == {"train", "evaluate", "probe"}
    assert any(m.message.importance for m in sent if isinstance(m.message, EvaluationResult))
    assert all(m.message.measurements for m in sent if isinstance(m.message, Ready))
    assert (labels == "server") == any(m.labels is not None for m in activations)
    assert min(sim.devices[d].agent._participation._data.training.target_tokens for d in "abc") > 90
