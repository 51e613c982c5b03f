"""A whole system in one thread: coordinator and agents over the memory broker and a fake clock.

Time stands still while anybody has something to do, and then jumps to the next thing that is
due, so timeouts cost nothing and every run with one seed is the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from coordinator import checkpoints, strategies
from coordinator.coordinator import Coordinator
from coordinator.fleet import Fleet
from coordinator.global_model import GlobalModel
from coordinator.graphs.library import GraphLibrary
from coordinator.graphs.spec import GraphSpec
from coordinator.lateness import Lateness
from coordinator.metrics import MetricsWriter
from coordinator.model_store import ModelStore
from coordinator.outliers import Screening
from coordinator.reporting import Reporter, Tallies
from coordinator.settings import CoordinatorSettings
from edge_agent import records
from edge_agent.agent import Agent
from edge_agent.backends import open_backend
from edge_agent.backends.base import Backend
from edge_agent.conversation import Conversation, new_instance, status_will
from edge_agent.downloads import Downloads
from edge_agent.model_cache import ModelCache
from edge_agent.participation import Parts
from shared.architecture import ModelArchitecture
from shared.errors import HsplitError
from shared.protocol.messages import DeviceId, DeviceProfile, Refusal
from shared.protocol.profile import Measurements
from shared.protocol.topics import agent_filters, coordinator_filters
from shared.terms import TrainingChoices
from shared.transport.link import MessageLink
from shared.transport.memory import DEFAULT_MAX_PAYLOAD_BYTES, Faults, MemoryBroker, MemoryTransport
from tests.support.fake_clock import FakeClock
from tests.support.tiny_models import CLASSES, ENCODERS, tiny_model
from tests.support.vocabularies import byte_level

WORDS = (
    "the", "red", "fox", "saw", "a", "small", "house", "near", "river", "and", "then", "it",
    "slept", "under", "old", "tree",
)  # fmt: skip


CLASSIFICATION = TrainingChoices(task="classification", classes=CLASSES)


def write_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a random tiny model with a tokenizer as a Hugging Face folder."""
    tokenizer = byte_level()
    words = tokenizer.get_vocab_size()
    if family in ENCODERS:
        changes = {"training": CLASSIFICATION, **changes}
    model = tiny_model(family, vocab_size=words, **changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_text(path: Path, *, lines: int, seed: int) -> Path:
    """Write a JSONL file of random short sentences as prompt and completion."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        chosen = torch.randint(0, len(WORDS), (count,), generator=generator)
        return " ".join(WORDS[i] for i in chosen)

    rows = [
        {"prompt": words(2 + i % 3) + " ->", "completion": " " + words(3 + i % 4)}
        for i in range(lines)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_labelled(path: Path, *, lines: int, seed: int) -> Path:
    """Write a JSONL file of pairs of short sentences, whose class shows in their words."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int, own: Sequence[str]) -> str:
        chosen = torch.randint(0, len(own), (count,), generator=generator)
        return " ".join(own[i] for i in chosen)

    size = len(WORDS) // len(CLASSES)
    rows = []
    for line in range(lines):
        label = int(torch.randint(0, len(CLASSES), (1,), generator=generator))
        own = WORDS[label * size : (label + 1) * size]
        texts = {"text": words(3 + line % 3, own), "text_pair": words(3 + line % 4, own)}
        rows.append({**texts, "label": label if line % 2 else CLASSES[label]})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


_CACHES: list[ModelCache] = []


def _cache(folder: Path) -> ModelCache:
    _CACHES.append(ModelCache(folder))
    return _CACHES[-1]


def close_caches() -> None:
    """Let go of the weight files that simulated devices hold, as the end of a process would.

    Thousands of them would push new sockets past 1024, where paho's select() cannot follow.
    """
    while _CACHES:
        _CACHES.pop().close()


@dataclass
class Device:
    """One simulated device; ``parts`` hold its backend, ``gone`` after `Simulation.vanish`."""

    agent: Agent
    transport: MemoryTransport
    parts: Parts
    error: HsplitError | None = None
    gone: bool = False
    refusals: list[Refusal] = field(default_factory=list)


@dataclass
class Simulation:
    """Builds and drives the system. ``settings``: as in a run file, without ``model``.

    ``graphs_folder``: a cache of graphs to share; a child process that exports knows nothing of
    the fake clock, and must be waited for by whoever lets it start.
    """

    folder: Path
    family: str = "gpt2"
    settings: Mapping[str, Any] = field(default_factory=dict)
    faults: Faults | None = None
    model_changes: Mapping[str, Any] = field(default_factory=dict)
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
    keeps_traffic: bool = True
    share_labels: bool = True
    measure_server: Callable[[int, int], Measurements] | None = None
    graphs_folder: Path | None = None

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.broker = MemoryBroker(
            self.clock,
            faults=self.faults,
            max_payload_bytes=self.max_payload_bytes,
            keeps_traffic=self.keeps_traffic,
        )
        model = self.folder / "base"
        if not model.exists():
            write_model(model, self.family, **self.model_changes)
        stated = CoordinatorSettings(
            **{
                "run": {"id": "sim", "folder": self.folder / "runs"},
                "model": {"name": str(model)},
                "devices": {"wait_s": 0},
                "report_to": [],
                **self.settings,
            }
        )
        shape = ModelArchitecture.from_config(json.loads((model / "config.json").read_text()))
        self.config = strategies.applied(stated, block_count=shape.block_count)
        self.devices: dict[str, Device] = {}
        self.folder.joinpath("runs", "sim").mkdir(parents=True, exist_ok=True)
        self.coordinator = self._coordinator()

    def _coordinator(self, resumed: checkpoints.Checkpoint | None = None) -> Coordinator:
        settings = self.config
        self.coordinator_transport = MemoryTransport(self.broker, name="coordinator")
        link = MessageLink(self.coordinator_transport, self.clock)
        link.start(coordinator_filters(settings.run_id), timeout_s=1)
        training = settings.training
        store = ModelStore.open(
            settings.model.name, cache_folder=self.folder / "store", training=training
        )
        architecture = ModelArchitecture.from_config(store.config, training)
        model = GlobalModel(settings, store, architecture)
        writer = MetricsWriter(
            settings.run_folder,
            self.clock,
            tensorboard=False,
            resumed_step=None if resumed is None else resumed.step,
        )
        self.fleet = Fleet(settings, architecture, measure_server=self.measure_server)
        self.screening = Screening(settings.aggregation.outlier_factor)
        self.lateness = Lateness()
        if resumed is not None:
            self.screening.resume(resumed.state)
            self.lateness.resume(resumed.state)
            model.resume(resumed)
            self.fleet.resume(resumed.state)
        self.model = model
        tallies = Tallies() if resumed is None else Tallies.restored(resumed.state)
        self.reporter = Reporter(
            writer, link, self.clock, total_steps=settings.total_steps, tallies=tallies
        )
        self.graphs = GraphLibrary(
            GraphSpec(
                config_json=store.describe().config_json,
                training=training,
                lora=settings.lora,
            ),
            self.graphs_folder or self.folder / "graphs",
            self.clock,
        )
        return Coordinator(
            settings,
            link=link,
            clock=self.clock,
            store=store,
            graphs=self.graphs,
            architecture=architecture,
            model=model,
            fleet=self.fleet,
            reporter=self.reporter,
            screening=self.screening,
            lateness=self.lateness,
            save_checkpoint=lambda checkpoint: checkpoints.save(
                settings.run_folder / "checkpoints", checkpoint, keep=settings.checkpoints.keep
            ),
            next_round=1 if resumed is None else resumed.round + 1,
        )

    def add_device(
        self,
        name: str,
        *,
        lines: int = 24,
        seed: int | None = None,
        text: tuple[Path, Path] | None = None,
        backend: Backend | None = None,
        **profile: Any,
    ) -> Device:
        """Start an agent on ``text`` (training, held out), with torch unless ``backend`` is given.

        Without any text, the name alone decides it, unless ``seed`` does.
        """
        backend = backend or open_backend("torch")
        device = DeviceId(name)
        if text is None:
            chosen = sum(name.encode()) if seed is None else seed
            write = write_text if self.config.training.task == "causal-lm" else write_labelled
            own = write(self.folder / f"{name}.jsonl", lines=lines, seed=chosen)
            loaded = records.load(own, evaluation_data=None, evaluation_fraction=0.25)
        else:
            loaded = records.load(text[0], evaluation_data=text[1], evaluation_fraction=0.0)
        instance = new_instance()
        transport = MemoryTransport(
            self.broker, name=f"{name}-{instance}", will=status_will(device, instance)
        )
        link = MessageLink(transport, self.clock)
        link.admit(device)
        link.start(agent_filters(device), timeout_s=1)
        parts = Parts(
            backend=backend,
            downloads=Downloads(_cache(self.folder / f"cache-{name}")),
            records=loaded.training,
            held_out_records=loaded.held_out,
            clock=self.clock,
            share_labels=self.share_labels,
        )
        agent = Agent(
            Conversation(device, instance, link, self.clock),
            DeviceProfile(
                backend=backend.name,
                hsplit_version="0",
                sequences=len(loaded.training),
                evaluation_sequences=len(loaded.held_out or ()),
                **profile,
            ),
            parts,
        )
        added = Device(agent, transport, parts)
        self.devices[name if name not in self.devices else f"{name}-{instance}"] = added
        return added

    def vanish(self, name: str) -> None:
        """Kill an agent: the broker publishes its will, and it never does anything again."""
        device = self.devices[name]
        device.gone = True
        device.transport.vanish()

    def restart_coordinator(self) -> None:
        """Kill the coordinator and start it again from its last checkpoint."""
        self.coordinator_transport.vanish()
        self.reporter.close()
        self.graphs.close()
        found = checkpoints.latest(self.config.run_folder / "checkpoints")
        assert found is not None
        self.coordinator = self._coordinator(found)

    def run(
        self,
        *,
        until: Callable[[], bool] | None = None,
        limit_s: float = 3600.0,
    ) -> None:
        """Drive everybody until the coordinator and all agents are done (or ``until``)."""
        try:
            self._run(self._done if until is None else until, limit_s)
        finally:
            if until is None:
                self.reporter.close()

    def _run(self, until: Callable[[], bool], limit_s: float) -> None:
        deadline = self.clock.monotonic_s() + limit_s
        while not until():
            if not self._turn():
                self.clock.advance_to(max(self._next_due_s(), self.clock.monotonic_s() + 0.01))
            if self.clock.monotonic_s() > deadline:
                raise AssertionError(
                    f"stuck: coordinator {self.coordinator.phase}, "
                    f"agents {[(n, d.agent.phase) for n, d in self.devices.items()]}"
                )

    def run_for(self, seconds: float) -> None:
        """Drive everybody for some time of the fake clock."""
        end_s = self.clock.monotonic_s() + seconds
        self.run(until=lambda: self.clock.monotonic_s() >= end_s)

    def run_to(self, phase: str) -> None:
        """Drive everybody until the coordinator is in this phase: ``round 1, step 0``."""
        self.run(until=lambda: self.coordinator.phase == phase)

    def _turn(self) -> bool:
        did = self.coordinator.turn(0.0)
        for device in self._alive():
            try:
                did |= device.agent.turn(0.0)
            except HsplitError as error:
                device.error = error
                device.transport.close()
        return did

    def _alive(self) -> Sequence[Device]:
        return [
            d
            for d in self.devices.values()
            if d.error is None and not d.gone and not d.agent.finished
        ]

    def _done(self) -> bool:
        return self.coordinator.finished and not self._alive()

    def _next_due_s(self) -> float:
        due = [
            self.clock.monotonic_s() + self.coordinator.idle_s,
            *(d.agent.next_due_s for d in self._alive()),
        ]
        arriving = self.broker.next_due_s()
        return min(due if arriving is None else [*due, arriving])

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        path = self.config.run_folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]
