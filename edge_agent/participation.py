"""What a device does in one run, between its welcome and its end, as scripts."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent import local_training, wire_adapters
from edge_agent.backends.base import Backend, FrontBase, TokenBatch
from edge_agent.conversation import Conversation, Script
from edge_agent.dataset import Dataset
from edge_agent.downloads import Downloads
from edge_agent.local_training import LossSum, Purpose, Work
from edge_agent.profiler import MeasureRequest, Profiler
from edge_agent.provisions import Provisions
from edge_agent.records import Records
from edge_agent.stopwatch import Stopwatch
from edge_agent.tasks import sequences_of
from edge_agent.vocabulary import Vocabulary
from shared.class_counts import total
from shared.clock import Clock
from shared.errors import (
    MemoryFullError,
    PlanError,
    ProtocolError,
    RefusedError,
    StorageError,
)
from shared.protocol import weights
from shared.protocol.messages import (
    Accepted,
    Answer,
    Assignment,
    EvaluationResult,
    Finished,
    Prepared,
    Ready,
    RoundResult,
    RoundStart,
    Welcome,
)
from shared.protocol.profile import Measurements

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a device brings into every run."""

    backend: Backend
    downloads: Downloads
    records: Records
    held_out_records: Records | None
    clock: Clock
    profiler: Profiler | None = None
    """Measures this device for one model; None: it says nothing of itself."""
    share_labels: bool = False
    """Whether the owner agreed that the tokens to predict may go to the coordinator."""


@dataclass(frozen=True, slots=True)
class _Probed:
    """Σ_j |w_j ∂L/∂w_j| by module of the front, for the loss summed over so many tokens."""

    importance: Mapping[str, float] = field(default_factory=dict)
    target_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Took:
    """How long the steps of a round took, and how much of it this device computed."""

    busy_s: float
    compute_s: float


class Participation:
    """One device in one run. `get_ready` first, then `run`, again after each `StaleError`."""

    def __init__(self, conversation: Conversation, welcome: Welcome, parts: Parts) -> None:
        """Read the run's terms.

        Raises:
            ModelError: the architecture is not supported here.
            RefusedError: the run wants labels, and the owner of this text did not agree.
        """
        if welcome.training.labels == "server":
            _check_consent(welcome, agreed=parts.share_labels)
        self._conversation = conversation
        self._parts = parts
        self._model = welcome.model
        self._training = welcome.training
        self._lora = welcome.lora
        self._optimizer = welcome.optimizer
        self._provisions = Provisions(welcome, conversation, parts.downloads)
        self._architecture = self._provisions.architecture
        self._head_is_here = welcome.training.labels == "device"
        self._measure_at = welcome.measure_at
        self._measurements: Measurements | None = None
        self._graphs: Mapping[str, Path] = {}
        self._loaded: int | None = None
        self._data: Dataset
        self.phase = "fetching the tokenizer"

    def get_ready(self) -> Script[None]:
        """Turn text into tokens, get graphs for a backend that needs some, measure the device.

        Raises:
            PlanError: the coordinator has no graphs for this model.
            ModelError: something is not offered, or what came of it was twice something else.
        """
        yield from self._tokenise()
        if self._parts.backend.needs_graphs:
            self.phase = "waiting for graphs"
            logger.info(
                "asking for graphs to compute with; the first to ask waits until the coordinator "
                "has made them: half a minute to a few minutes"
            )
            self._graphs = yield from self._provisions.graphs()
        if self._measure_at is not None and self._parts.profiler is not None:
            yield from self._measure(self._measure_at, self._parts.profiler)

    def _tokenise(self) -> Script[None]:
        files = yield from self._provisions.pieces(("tokenizer",))
        read = functools.partial(
            sequences_of,
            vocabulary=Vocabulary(files["tokenizer"], self._model),
            training=self._training,
            architecture=self._architecture,
        )
        held_out = self._parts.held_out_records
        self._data = Dataset(
            training=read(self._parts.records),
            held_out=None if held_out is None else read(held_out, held_out=True),
            seed=self._training.seed,
            device_id=self._conversation.device_id,
        )
        logger.info(
            "%d sequences to train on, %d target tokens",
            len(self._data.training),
            self._data.training.target_tokens,
        )

    def _measure(self, micro_batch: int, profiler: Profiler) -> Script[None]:
        """Fetch a small front, and let this device measure itself with it."""
        request = MeasureRequest(
            config_json=self._model.config_json,
            training=self._training,
            lora=self._lora,
            optimizer=self._optimizer,
            micro_batch=micro_batch,
            length=math.ceil(self._data.shape(micro_batch).padded_length),
            graphs=self._graphs,
        )
        self.phase = "fetching what is measured"
        files = yield from self._provisions.pieces(profiler.pieces(request))
        self.phase = "measuring"
        self._measurements = profiler.measure(request, files)

    def run(self) -> Script[Finished]:
        """Ask what to do and do it, until the coordinator says that the run is over."""
        assignment: Assignment | None = None
        answer = yield from self._ask_ready()
        while not isinstance(answer, Finished):
            if isinstance(answer, Assignment):
                assignment = answer
                answer = yield from self._prepare(assignment)
            elif isinstance(answer, RoundStart) and assignment is not None:
                try:
                    answer = yield from self._take_round(answer, assignment)
                except MemoryFullError as error:
                    answer = yield from self._ask_for_less(error)
            else:
                raise ProtocolError(f"unexpected answer {type(answer).__name__}")
        return answer

    def _ask_ready(self, overloaded: str | None = None) -> Script[Answer]:
        self.phase = "waiting for the next round"
        data = self._data.shape(self._measure_at or 1)
        return (
            yield from self._conversation.ask_any(
                lambda call: Ready(
                    call=call, data=data, measurements=self._measurements, overloaded=overloaded
                )
            )
        )

    def _ask_for_less(self, error: MemoryFullError) -> Script[Answer]:
        """Give up the open round, and ask for a part that this device can carry."""
        logger.warning("this part is too much for this device: %s", error)
        self._parts.backend.discard()
        self._conversation.forget_calls()
        return (yield from self._ask_ready(str(error)[:4000]))

    # --- preparing ----------------------------------------------------------------------------

    def _prepare(self, assignment: Assignment) -> Script[Answer]:
        self.phase = "preparing"
        refused: str | None = None
        if assignment.keep and self._loaded != assignment.split_layer:
            raise ProtocolError(f"split layer {assignment.split_layer} is not held, to be kept")
        if not assignment.keep:
            try:
                yield from self._hold(assignment.split_layer)
            except (PlanError, StorageError) as error:
                logger.warning("split layer %d: %s", assignment.split_layer, error)
                refused = str(error)[:4000]
        if refused is None:
            logger.info(
                "prepared: split layer %d of %d, %d adapted modules, %d sequences a step",
                assignment.split_layer,
                self._architecture.block_count,
                sum(1 for rank in assignment.ranks.values() if rank),
                assignment.batch,
            )
            self.phase = "prepared"
        version = assignment.plan_version
        return (
            yield from self._conversation.ask_any(
                lambda call: Prepared(call=call, plan_version=version, refused=refused)
            )
        )

    def _hold(self, split_layer: int) -> Script[None]:
        """Fetch what this split layer needs, and load it in place of what was held."""
        files = yield from self._provisions.front(split_layer)
        self._loaded = None
        self._load(FrontBase(self._model.config_json, files, split_layer, self._graphs))
        self._loaded = split_layer

    def _load(self, base: FrontBase) -> None:
        self._parts.backend.load(
            base,
            device_id=self._conversation.device_id,
            training=self._training,
            lora=self._lora,
            optimizer=self._optimizer,
        )

    # --- a round ------------------------------------------------------------------------------

    def _take_round(self, start: RoundStart, assignment: Assignment) -> Script[Answer]:
        self.phase = f"round {start.round}"
        self._set_adapters(start)
        if start.evaluate:
            yield from self._evaluate(start, assignment)
        if start.steps == 0:
            return (yield from self._ask_ready())
        clock = self._parts.clock
        began_s = clock.monotonic_s()
        computing = Stopwatch(clock)
        trained = LossSum()
        for step in range(start.first_step, start.first_step + start.steps):
            trained += yield from computing.timed(self._take_step(start, step, assignment))
        mean = trained.nats / max(1, trained.target_tokens)
        logger.info("round %d: %d steps, training loss %.4f", start.round, start.steps, mean)
        busy_s = clock.monotonic_s() - began_s
        took = _Took(busy_s, computing.seconds)
        return (yield from self._hand_in(start, trained, took))

    def _set_adapters(self, start: RoundStart) -> None:
        backend = self._parts.backend
        backend.set_adapters(wire_adapters.from_wire(start.adapters), fold=start.fold)
        if start.classifier:
            backend.set_classifier(weights.from_wire(start.classifier))

    def _take_step(self, start: RoundStart, step: int, assignment: Assignment) -> Script[LossSum]:
        batches = self._data.micro_batches(
            _position(start, assignment, step),
            batch=assignment.batch,
            micro_batch=assignment.micro_batch,
        )
        work = self._work(start, assignment, step=step, batches=batches, purpose="train")
        loss = yield from local_training.run(work, self._parts.backend, self._conversation)
        self._parts.backend.step(step, target_tokens=loss.target_tokens)
        return loss

    def _evaluate(self, start: RoundStart, assignment: Assignment) -> Script[None]:
        # No more at once than in training, or a device with little memory could train only.
        size = min(self._training.evaluate_batch, assignment.micro_batch)
        batches = self._data.evaluation_batches(size)
        step = start.first_step
        work = self._work(start, assignment, step=step, batches=batches, purpose="evaluate")
        loss = yield from local_training.run(work, self._parts.backend, self._conversation)
        counts = total((loss.counts, self._parts.backend.take_counts()))
        probed = yield from self._probe(start, assignment)
        yield from self._conversation.ask(
            lambda call: EvaluationResult(
                call=call,
                round=start.round,
                loss_sum=loss.nats,
                target_tokens=loss.target_tokens,
                sequences=sum(len(batch.lengths) for batch in batches),
                importance=dict(probed.importance),
                probe_tokens=probed.target_tokens,
                counts=counts,
            ),
            Accepted,
        )

    def _probe(self, start: RoundStart, assignment: Assignment) -> Script[_Probed]:
        """Measure how much the front's weights matter, on what is trained on next."""
        count = min(start.probe_sequences, len(self._data.training))
        if not count:
            return _Probed()
        step, backend = start.first_step, self._parts.backend
        position = _position(start, assignment, step)
        micro_batch = assignment.micro_batch
        batches = self._data.micro_batches(position, batch=count, micro_batch=micro_batch)
        blocks = range(assignment.split_layer)
        backend.begin_probe(self._architecture.adaptable_modules(self._lora, blocks=blocks))
        work = self._work(start, assignment, step=step, batches=batches, purpose="probe")
        loss = yield from local_training.run(work, backend, self._conversation)
        return _Probed(backend.end_probe(), loss.target_tokens)

    def _work(
        self,
        start: RoundStart,
        assignment: Assignment,
        *,
        step: int,
        batches: Sequence[TokenBatch],
        purpose: Purpose,
    ) -> Work:
        holds_all = assignment.split_layer == self._architecture.block_count
        return Work(
            round=start.round,
            step=step,
            purpose=purpose,
            batches=batches,
            in_flight=assignment.in_flight,
            alone=self._head_is_here and holds_all,
            send_labels=not self._head_is_here,
        )

    def _hand_in(self, start: RoundStart, trained: LossSum, took: _Took) -> Script[Answer]:
        self.phase = f"round {start.round} handed in"
        adapters = wire_adapters.to_wire(self._parts.backend.adapters())
        classifier = weights.to_wire(self._parts.backend.classifier())
        return (
            yield from self._conversation.ask_any(
                lambda call: RoundResult(
                    call=call,
                    round=start.round,
                    adapters=adapters,
                    loss_sum=trained.nats,
                    target_tokens=trained.target_tokens,
                    steps=start.steps,
                    busy_s=took.busy_s,
                    compute_s=took.compute_s,
                    classifier=classifier,
                ),
                kind="adapter",
            )
        )


def _position(start: RoundStart, assignment: Assignment, step: int) -> int:
    """Return where in the endless order of its sequences the device takes a step's batch."""
    if start.first_sequence is None:
        return step * assignment.batch
    return start.first_sequence + (step - start.first_step) * assignment.batch


def _check_consent(welcome: Welcome, *, agreed: bool) -> None:
    classifies = welcome.training.task == "classification"
    if not agreed:
        what = "the class of each of your texts" if classifies else "your text's tokens"
        raise RefusedError(
            f"this run has labels: server: {what} would be sent to the coordinator; "
            "add --share-labels to agree, or ask for labels: device"
        )
    logger.warning(
        "labels: server: %s go to the coordinator of run %s (--share-labels)",
        "the classes of this device's texts"
        if classifies
        else "the tokens to predict, which are this device's text,",
        welcome.run_id,
    )
