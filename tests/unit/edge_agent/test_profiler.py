"""What is measured anew, what is remembered, and what is never taken for a measurement."""

from __future__ import annotations

import dataclasses
import json
import logging
from importlib import metadata
from pathlib import Path

import pytest

from edge_agent import profiler as profiler_module
from edge_agent.backends import chosen_backend
from edge_agent.probe_spec import ProbeSpec
from edge_agent.probing import ProbeResult
from edge_agent.profile_cache import ProfileCache, length_bucket
from edge_agent.profiler import Machine, MeasureRequest, Profiler, tolerant
from shared.errors import BrokerRefusedError, ModelError, PlanError, TransportError
from shared.memory_use import resident_bytes
from shared.protocol.messages import DeviceId
from shared.protocol.profile import DeviceFacts, LinkMeasurement, Telemetry
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.wire_samples import MEASUREMENTS

GIB = 2**30
CONFIG = {
    "model_type": "gpt2",
    "n_layer": 6,
    "n_embd": 32,
    "n_head": 2,
    "vocab_size": 64,
    "n_positions": 256,
}
MACHINE = Machine(device_id=DeviceId("nano"), backend="torch", device="cpu", threads=1)
REQUEST = MeasureRequest(
    config_json=json.dumps(CONFIG),
    training=TrainingTerms(),
    lora=LoraTerms(),
    optimizer=OptimizerTerms(),
    micro_batch=4,
    length=128,
)
FILES = {"embeddings": Path("embeddings.safetensors")}
RESULT = ProbeResult(
    runtime_bytes=300 * GIB,  # more than this process could have: nothing has grown since
    on_gpu=False,
    blocks=tuple(dataclasses.replace(p, peak_bytes=301 * GIB) for p in MEASUREMENTS.blocks),
    head=MEASUREMENTS.head,
    optimizer=MEASUREMENTS.optimizer,
    warnings=(),
)


class FixedSensors:
    """`Sensors` that say what a test wants, and remember what they were asked."""

    def __init__(self) -> None:
        self.known = DeviceFacts()
        self.memory: int | None = 8 * GIB
        self.asked: list[bool] = []

    def facts(self) -> DeviceFacts:
        return self.known

    def read(self, *, on_gpu: bool | None = None) -> Telemetry:
        return Telemetry()

    def memory_bytes(self, *, on_gpu: bool) -> int | None:
        self.asked.append(on_gpu)
        return self.memory

    def close(self) -> None:
        pass


class Bench:
    """A profiler over a cache, and what its probe and its link were asked."""

    def __init__(self, folder: Path, *, result: ProbeResult = RESULT, **machine: object) -> None:
        self.sensors = FixedSensors()
        self.folder = folder / "profiles"
        self.result = result
        self.probed: list[ProbeSpec] = []
        self.links = 0
        self.machine = dataclasses.replace(MACHINE, **machine)
        self.restart()

    def restart(self) -> None:
        """Start the program anew: it knows nothing but what its cache holds."""
        self.profiler = Profiler(
            self.machine,
            self.sensors,
            ProfileCache(self.folder),
            measure_link=self._link,
            run_probe=self._probe,
        )

    def _probe(self, spec: ProbeSpec) -> ProbeResult:
        self.probed.append(spec)
        return self.result

    def _link(self) -> LinkMeasurement:
        self.links += 1
        return LinkMeasurement(
            uplink_bytes_per_s=self.links * 1e6, downlink_bytes_per_s=1e6, round_trip_s=0.01
        )

    def measure(self, request: MeasureRequest = REQUEST, *, fresh: bool = False):
        return self.profiler.measure(request, FILES, fresh=fresh)

    @property
    def file(self) -> Path:
        (path,) = self.folder.iterdir()
        return path


def test_what_was_probed_is_what_is_reported(tmp_path):
    bench = Bench(tmp_path)
    found = bench.measure()
    assert (found.blocks, found.head, found.optimizer) == (
        RESULT.blocks,
        RESULT.head,
        RESULT.optimizer,
    )
    assert (found.runtime_bytes, found.memory_bytes) == (RESULT.runtime_bytes, 8 * GIB)
    assert (found.backend, found.dtype, found.threads) == ("torch", "float32", 1)
    (spec,) = bench.probed
    assert (spec.micro_batch, spec.length, spec.files) == (4, 128, FILES)
    assert (spec.device, spec.memory_bytes) == ("cpu", 8 * GIB)


def test_a_backend_is_probed_with_its_graphs_and_known_by_the_version_of_what_it_runs(tmp_path):
    bench = Bench(tmp_path, backend="onnx")
    graphs = {"graph.full_attention.forward": Path("0a")}
    found = bench.measure(dataclasses.replace(REQUEST, graphs=graphs))
    (spec,) = bench.probed
    assert (spec.backend, spec.graphs) == ("onnx", graphs)
    assert found.backend == "onnx"
    key = json.loads(bench.file.read_text())["key"]
    assert (key["backend"], key["backend_version"]) == ("onnx", metadata.version("onnxruntime"))


def test_a_package_is_known_by_its_version_under_whatever_name_it_was_installed():
    assert profiler_module._installed("yaml") == f"PyYAML {metadata.version('PyYAML')}"
    assert profiler_module._installed("no_such_package") == ""


def test_a_backend_that_was_not_named_is_measured_under_its_own_name(tmp_path):
    own = chosen_backend("auto")
    Bench(tmp_path, backend=own).measure()
    unnamed = Bench(tmp_path, backend="auto")
    assert unnamed.measure().backend == own
    assert unnamed.probed == [], "what it measured under that name is its own"


def test_compute_is_measured_once_and_memory_and_link_each_time(tmp_path):
    first, second = Bench(tmp_path), Bench(tmp_path)
    before = first.measure()
    second.sensors.memory = 4 * GIB
    second.links = 6
    after = second.measure()
    assert (len(first.probed), len(second.probed)) == (1, 0)
    assert after.blocks == before.blocks
    assert after.memory_bytes == 4 * GIB
    assert after.link.uplink_bytes_per_s == 7e6


def test_neither_memory_nor_link_is_kept_for_later(tmp_path):
    bench = Bench(tmp_path)
    bench.measure()
    stored = json.loads(bench.file.read_text())["measurements"]
    assert stored["memory_bytes"] is None
    assert stored["link"] is None


def test_fresh_measures_again_and_keeps_that(tmp_path):
    bench = Bench(tmp_path)
    bench.measure()
    bench.result = dataclasses.replace(RESULT, head=())
    assert bench.measure(fresh=True).head == ()
    assert Bench(tmp_path).measure().head == ()
    assert len(bench.probed) == 2


def test_pieces_are_wanted_only_where_the_cache_does_not_do(tmp_path):
    bench = Bench(tmp_path)
    front = ("embeddings", "block.0", "block.1", "block.2", "final_norm")
    assert bench.profiler.pieces(REQUEST) == front
    bench.measure()
    assert bench.profiler.pieces(REQUEST) == ()
    assert bench.profiler.pieces(REQUEST, fresh=True) == front


def test_without_a_head_on_the_device_none_is_fetched(tmp_path):
    training = TrainingTerms(labels="server")
    pieces = Bench(tmp_path).profiler.pieces(dataclasses.replace(REQUEST, training=training))
    assert pieces == ("embeddings", "block.0", "block.1", "block.2")


def request_with(**config: object) -> MeasureRequest:
    return dataclasses.replace(REQUEST, config_json=json.dumps({**CONFIG, **config}))


@pytest.mark.parametrize(
    "other",
    [
        request_with(n_embd=64),
        request_with(vocab_size=65),
        request_with(n_layer=2),
        dataclasses.replace(REQUEST, micro_batch=8),
        dataclasses.replace(REQUEST, length=129),
        dataclasses.replace(REQUEST, training=TrainingTerms(labels="server")),
        dataclasses.replace(REQUEST, training=TrainingTerms(dtype="bfloat16")),
        dataclasses.replace(REQUEST, training=TrainingTerms(int8_blocks=2)),
        dataclasses.replace(REQUEST, training=TrainingTerms(wire_dtype="float32")),
        dataclasses.replace(REQUEST, lora=LoraTerms(target_modules=("c_proj",))),
        dataclasses.replace(REQUEST, lora=LoraTerms(lora_dropout=0.1)),
        dataclasses.replace(REQUEST, optimizer=OptimizerTerms(name="sgd")),
    ],
    ids=lambda request: "",
)
def test_another_model_or_other_terms_are_measured_anew(tmp_path, other):
    bench = Bench(tmp_path)
    bench.measure()
    bench.measure(other)
    assert len(bench.probed) == 2


@pytest.mark.parametrize(
    "machine",
    [
        {"device_id": DeviceId("orin")},
        {"device": "auto"},
        {"threads": 2},
        {"threads": None},
        {"emulate": "speed=0.5"},
    ],
    ids=str,
)
def test_another_device_or_other_settings_are_measured_anew(tmp_path, machine):
    Bench(tmp_path).measure()
    other = Bench(tmp_path, **machine)
    other.measure()
    assert len(other.probed) == 1


@pytest.mark.parametrize(
    "facts",
    [DeviceFacts(accelerator="Orin"), DeviceFacts(power_mode="7W"), DeviceFacts(cpus=2.0)],
    ids=str,
)
def test_a_machine_that_was_changed_is_measured_anew(tmp_path, facts):
    Bench(tmp_path).measure()
    changed = Bench(tmp_path)
    changed.sensors.known = facts
    changed.measure()
    assert len(changed.probed) == 1


def test_another_version_is_measured_anew(tmp_path, monkeypatch):
    Bench(tmp_path).measure()
    monkeypatch.setattr(profiler_module.version, "VERSION", "99.0")
    hsplit = Bench(tmp_path)
    hsplit.measure()
    monkeypatch.setattr(profiler_module.metadata, "version", lambda package: f"{package} 99.0")
    torch = Bench(tmp_path)
    torch.measure()
    assert (len(hsplit.probed), len(torch.probed)) == (1, 1)


def test_what_decides_neither_time_nor_memory_measures_nothing_anew(tmp_path):
    bench = Bench(tmp_path)
    bench.measure()
    bench.measure(request_with(n_layer=12))
    bench.measure(dataclasses.replace(REQUEST, length=65))
    bench.measure(dataclasses.replace(REQUEST, training=TrainingTerms(seed=5, total_steps=7)))
    bench.measure(dataclasses.replace(REQUEST, lora=LoraTerms(r=4)))
    Bench(tmp_path, memory_limit=GIB).measure()
    assert len(bench.probed) == 1


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (128, 128), (513, 1024)]
)
def test_lengths_share_a_bucket_up_to_a_power_of_two(length, bucket):
    assert length_bucket(length) == bucket


# --- damaged and alien caches ---------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    whole = json.loads(path.read_text())
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "nonsense":
        whole["measurements"]["blocks"][0]["forward_s"] = 0
        path.write_text(json.dumps(whole))
    elif how == "of another device":
        whole["key"]["device_id"] = "orin"
        path.write_text(json.dumps(whole))
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut off", "empty", "nonsense", "of another device", "a folder"])
def test_a_cache_file_that_cannot_be_used_is_measured_again_with_a_word(tmp_path, caplog, how):
    bench = Bench(tmp_path)
    bench.measure()
    damage(bench.file, how)
    bench.restart()
    with caplog.at_level(logging.WARNING):
        assert bench.measure().blocks == RESULT.blocks
    assert len(bench.probed) == 2
    assert f"{bench.file} is not used" in caplog.text
    if how != "a folder":
        bench.restart()
        bench.measure()
        assert len(bench.probed) == 2, "it was mended"


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_train(tmp_path, caplog):
    (tmp_path / "profiles").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert Bench(tmp_path).measure().blocks == RESULT.blocks
    assert "cannot be written" in caplog.text


def test_what_a_busy_device_measured_is_reported_and_not_kept(tmp_path, caplog):
    blocks = tuple(dataclasses.replace(point, spread=2.5) for point in RESULT.blocks)
    bench = Bench(tmp_path, result=dataclasses.replace(RESULT, blocks=blocks))
    with caplog.at_level(logging.WARNING):
        assert bench.measure().blocks == blocks
    assert "differ by 250 %; the next start measures again" in caplog.text
    assert not bench.folder.exists()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sensed", "limit", "expected"),
    [(8, 2, 2), (2, 8, 2), (8, None, 8), (None, 2, 2), (None, None, None)],
)
def test_what_may_be_used_is_the_lesser_of_what_is_there_and_what_the_owner_allows(
    tmp_path, sensed, limit, expected
):
    bench = Bench(tmp_path, memory_limit=limit)
    bench.sensors.memory = sensed
    assert bench.measure().memory_bytes == expected
    assert bench.probed[0].memory_bytes == expected


@pytest.mark.parametrize(
    ("device", "accelerator", "on_gpu", "asked"),
    [
        ("cpu", "H200", False, [False, False]),
        ("auto", "H200", True, [True, True]),
        ("cuda:1", "H200", True, [True, True]),
        ("auto", None, False, [False, False]),
        ("auto", "Orin", False, [True, False]),
    ],
)
def test_the_memory_is_that_which_training_computes_in(
    tmp_path, device, accelerator, on_gpu, asked
):
    bench = Bench(tmp_path, result=dataclasses.replace(RESULT, on_gpu=on_gpu), device=device)
    bench.sensors.known = DeviceFacts(accelerator=accelerator)
    assert bench.measure().on_gpu is on_gpu
    assert bench.sensors.asked == asked


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_gpu_that_does_not_compute_has_none_of_the_memory_that_is_probed(tmp_path, accelerated):
    """A machine with a GPU and an onnxruntime for the CPU, say."""
    bench = Bench(tmp_path, device="auto", accelerated=accelerated)
    bench.sensors.known = DeviceFacts(accelerator="H200")
    bench.measure()
    assert bench.sensors.asked[0] is accelerated, "for the limit of the probe"


def test_what_another_provider_computed_is_measured_anew(tmp_path):
    """CUDA's libraries may have failed to load, so that the CPU computed; or the other way."""
    cpu, gpu = "onnxruntime 1, CPUExecutionProvider", "onnxruntime 1, CUDAExecutionProvider 0"
    bench = Bench(tmp_path, result=dataclasses.replace(RESULT, computes_with=cpu))
    bench.measure()
    for now, probes in [(None, 1), (cpu, 1), (gpu, 2)]:
        bench.machine = dataclasses.replace(bench.machine, computes_with=now)
        bench.restart()
        assert bool(bench.profiler.pieces(REQUEST)) is (now == gpu)
        bench.measure()
        assert len(bench.probed) == probes


def test_a_program_that_has_grown_since_counts_as_it_is_now(tmp_path):
    small = dataclasses.replace(
        RESULT,
        runtime_bytes=2**20,
        blocks=tuple(dataclasses.replace(p, peak_bytes=3 * 2**20) for p in RESULT.blocks),
    )
    bench = Bench(tmp_path, result=small)
    assert bench.measure().runtime_bytes == 2**20
    assert bench.measure().runtime_bytes == 2**20, "what it holds of a model by now is no runtime"
    bench.restart()
    again = bench.measure()
    assert again.runtime_bytes == pytest.approx(resident_bytes(), rel=0.05)
    assert {p.peak_bytes - again.runtime_bytes for p in again.blocks} == {2 * 2**20}
    on_gpu = Bench(tmp_path / "gpu", result=dataclasses.replace(small, on_gpu=True))
    on_gpu.measure()
    on_gpu.restart()
    assert on_gpu.measure().runtime_bytes == 2**20


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_model_that_cannot_be_measured_is_refused_before_anything_is_measured(tmp_path):
    bench = Bench(tmp_path)
    with pytest.raises(ModelError, match="'opt' are not supported"):
        bench.measure(request_with(model_type="opt"))
    with pytest.raises(PlanError, match="257 tokens, but this model has 256 positions"):
        bench.measure(dataclasses.replace(REQUEST, length=257))
    assert (bench.probed, bench.links) == ([], 0)


def test_a_link_that_cannot_be_measured_is_an_error_unless_that_is_tolerated(tmp_path, caplog):
    def refused() -> LinkMeasurement:
        raise BrokerRefusedError("not on the access list")

    def measure(link):
        profiler = Profiler(
            MACHINE,
            FixedSensors(),
            ProfileCache(tmp_path),
            measure_link=link,
            run_probe=lambda spec: RESULT,
        )
        return profiler.measure(REQUEST, FILES)

    with pytest.raises(TransportError, match="access list"):
        measure(refused)
    with caplog.at_level(logging.WARNING):
        assert measure(tolerant(refused)).link is None
    assert "not on the access list" in caplog.text
    assert measure(None).link is None
