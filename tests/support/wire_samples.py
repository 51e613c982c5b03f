"""One message of each type, the same for ever: protocol 1.0 as stored in ``tests/protocol``.

``python -m tests.support.wire_samples`` writes the payloads of the current version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.class_counts import ClassCount
from shared.protocol import chunking, codec
from shared.protocol.messages import (
    Accepted,
    ActivationGradients,
    Activations,
    AdapterTensors,
    Assignment,
    Call,
    Credit,
    DeviceProfile,
    EvaluatedLoss,
    EvaluationResult,
    Finished,
    Graphs,
    GraphsRequest,
    Heartbeat,
    Hidden,
    HiddenGradients,
    JoinRequest,
    Leave,
    ModelDescription,
    Piece,
    PieceBytes,
    PieceRequest,
    Prepared,
    Ready,
    Refusal,
    Rejoin,
    Resend,
    RoundResult,
    RoundStart,
    RunId,
    SessionId,
    WeightTensor,
    Welcome,
)
from shared.protocol.profile import (
    BlockPoint,
    DataShape,
    DeviceFacts,
    HeadPoint,
    LinkMeasurement,
    Measurements,
    OptimizerPoint,
    Telemetry,
)
from shared.protocol.tensors import pack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

PAYLOADS = Path(__file__).parents[1] / "protocol" / "payloads"

_SESSION = SessionId("0123456789abcdef")
_SHA = "9f" * 32
_MODULE = "transformer.h.0.attn.c_attn"
_HIDDEN = pack(np.array([[0.5, -1.0], [2.0, 0.25], [-0.125, 4.0]], np.float32), "bfloat16")
_ADAPTER = AdapterTensors(
    module=_MODULE,
    a=pack(np.array([[1.0, -2.0]], np.float32)),
    b=pack(np.array([[0.5], [0.25], [-4.0]], np.float32)),
    scaling=2.0,
    frozen_a=pack(np.array([[3.0, 0.0]], np.float32)),
    frozen_b=pack(np.array([[1.0], [0.0], [-1.0]], np.float32)),
)
_COUNTS = (
    ClassCount(actual=40, predicted=38, true_positives=30),
    ClassCount(actual=20, predicted=22, true_positives=12),
)
_CLASSIFIER = (
    WeightTensor(name="score.weight", data=pack(np.array([[0.5, -1.0], [2.0, 0.25]], np.float32))),
)


_FACTS = DeviceFacts(
    accelerator="Orin",
    accelerator_memory_bytes=8 * 2**30,
    accelerator_shares_memory=True,
    driver="540.4.0",
    power_mode="15W",
    memory_bytes=8 * 2**30,
    cpus=6.0,
)
_POINT = BlockPoint(
    blocks=1,
    adapter_parameters=6144,
    sequences=4,
    length=64,
    forward_s=0.0625,
    backward_s=0.125,
    spread=0.25,
    peak_bytes=500 * 2**20,
)
MEASUREMENTS = Measurements(
    hsplit_version="0.1.0",
    backend="torch",
    dtype="float32",
    threads=4,
    model=_SHA,
    on_gpu=True,
    runtime_bytes=300 * 2**20,
    memory_bytes=4 * 2**30,
    blocks=(
        _POINT,
        dataclasses.replace(_POINT, blocks=2, peak_bytes=600 * 2**20),
        dataclasses.replace(_POINT, sequences=1, forward_s=0.03125),
    ),
    head=(HeadPoint(tokens=252, seconds=0.5, spread=0.125, extra_bytes=40 * 2**20),),
    optimizer=(OptimizerPoint(adapter_parameters=6144, seconds=0.0009765625),),
    link=LinkMeasurement(uplink_bytes_per_s=2.5e6, downlink_bytes_per_s=1e7, round_trip_s=0.03125),
    computes_with="torch 2.13.0, cuda:0",
)
_TELEMETRY = Telemetry(
    accelerator_load_percent=87.0,
    accelerator_clock_mhz=624.75,
    cpu_load_percent=12.5,
    temperature_c=71.5,
    power_w=14.25,
    free_memory_bytes=2**30,
    used_memory_bytes=3 * 2**30,
    throttled=True,
    throttle_reasons=("too hot",),
)


def _call(number: int) -> Call:
    return Call(session=_SESSION, number=number, answered_below=max(0, number - 1))


_ALL: tuple[Any, ...] = (
    JoinRequest(
        call=_call(0),
        profile=DeviceProfile(
            backend="torch",
            hsplit_version="0.1.0",
            machine="Jetson Orin Nano",
            accelerator="Orin",
            facts=_FACTS,
            memory_limit_bytes=8 * 2**30,
            sequences=1200,
            evaluation_sequences=60,
            computes_with="torch 2.13.0, cuda:0",
        ),
    ),
    PieceRequest(call=_call(1), sha256=_SHA, offset=1 << 20, length=4),
    Ready(
        call=_call(2),
        data=DataShape(mean_length=48.5, padded_length=60.25, longest=64),
        measurements=MEASUREMENTS,
    ),
    Prepared(call=_call(3), plan_version=2, refused="the memory is full"),
    Activations(
        call=_call(4),
        purpose="train",
        round=1,
        step=7,
        micro_batch=0,
        micro_batches=2,
        target_tokens=2,
        lengths=(2, 1),
        hidden=_HIDDEN,
        labels=pack(np.array([5, -100, 9], np.int32)),
    ),
    HiddenGradients(
        call=_call(5),
        round=1,
        step=7,
        micro_batch=0,
        loss_sum=12.5,
        gradient=_HIDDEN,
        purpose="probe",
    ),
    EvaluationResult(
        call=_call(6),
        round=2,
        loss_sum=310.5,
        target_tokens=99,
        sequences=60,
        importance={_MODULE: 0.75},
        probe_tokens=33,
        counts=_COUNTS,
    ),
    RoundResult(
        call=_call(7),
        round=1,
        adapters=(_ADAPTER,),
        loss_sum=1234.5,
        target_tokens=400,
        steps=20,
        busy_s=3.25,
        compute_s=1.5,
        classifier=_CLASSIFIER,
    ),
    Heartbeat(session=_SESSION, awaiting=(3, 5), telemetry=_TELEMETRY),
    Leave(session=_SESSION, reason="stopped by SIGTERM"),
    Welcome(
        call=_call(0),
        run_id=RunId("20260131-gpt2"),
        model=ModelDescription(
            name="gpt2",
            config_json='{"model_type": "gpt2"}',
            pieces=(
                Piece(name="tokenizer", sha256=_SHA, size_bytes=2048),
                Piece(name="block.11", sha256="0a" * 32, size_bytes=28_351_488),
            ),
            chat_template="{{ messages }}",
            eos_token_id=50_256,
            special_tokens={"eos_token": "<|endoftext|>"},
        ),
        training=TrainingTerms(
            task="classification",
            classes=("no", "yes"),
            labels="server",
            max_length=256,
            seed=3,
            total_steps=100,
        ),
        lora=LoraTerms(r=4, rank_pattern={"c_attn": 16}, alpha_pattern={"c_fc": 8.0}),
        optimizer=OptimizerTerms(learning_rate=1e-3, warmup_steps=10, schedule="cosine"),
        measure_at=4,
    ),
    Refusal(call=_call(4), code="stale", reason="step 6 was closed without this micro-batch"),
    PieceBytes(
        call=_call(1), sha256=_SHA, offset=1 << 20, data=pack(np.array([0, 7, 255, 1], np.uint8))
    ),
    Assignment(
        call=_call(2),
        plan_version=2,
        split_layer=3,
        ranks={_MODULE: 4},
        batch=8,
        micro_batch=4,
        in_flight=2,
        keep=True,
    ),
    RoundStart(
        call=_call(3),
        round=2,
        first_step=20,
        steps=20,
        evaluate=True,
        adapters=(_ADAPTER,),
        fold=True,
        first_sequence=160,
        probe_sequences=8,
        classifier=_CLASSIFIER,
    ),
    Hidden(call=_call(4), hidden=_HIDDEN),
    ActivationGradients(call=_call(5), gradient=_HIDDEN, loss_sum=12.5),
    EvaluatedLoss(call=_call(6), loss_sum=310.5, counts=_COUNTS),
    Accepted(call=_call(6)),
    Finished(call=_call(7), reason="the run is complete"),
    Resend(session=_SESSION, numbers=(3, 4)),
    Rejoin(session=_SESSION),
    Credit(transfer=(1 << 32) + 5, chunks=12),
    GraphsRequest(call=_call(8)),
    Graphs(
        call=_call(8),
        graphs=(Piece(name="graph.full_attention.forward", sha256=_SHA, size_bytes=8192),),
    ),
)

SAMPLES: Mapping[str, Any] = {message.type: message for message in _ALL}


def stored(version: str, name: str) -> Path:
    """Return where one payload of one protocol version lies."""
    return PAYLOADS / version / f"{name}.bin"


def write_payloads() -> None:
    """Write every sample as the current version encodes it, and one as a chunk."""
    version = f"{codec.MAJOR}.{codec.MINOR}"
    stored(version, "chunk").parent.mkdir(parents=True, exist_ok=True)
    for name, message in SAMPLES.items():
        stored(version, name).write_bytes(codec.encode(message))
    payload = codec.encode(SAMPLES["ready"])
    (chunk,) = chunking.cut(payload, transfer=77, size=chunking.CHUNK_BYTES)
    stored(version, "chunk").write_bytes(chunk)


if __name__ == "__main__":
    write_payloads()
