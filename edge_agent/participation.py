"""What a device does in one run, between its welcome and its end, as scripts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent import local_training
from edge_agent.backends.base import Backend, FrontBase, TokenBatch
from edge_agent.conversation import Conversation, Script
from edge_agent.dataset import Dataset
from edge_agent.downloads import Downloads
from edge_agent.local_training import LossSum, Work
from edge_agent.records import Records
from edge_agent.vocabulary import Vocabulary
from shared.adapters import LoraPair, ModuleAdapter
from shared.architecture import ModelArchitecture
from shared.clock import Clock
from shared.errors import ModelError, ProtocolError, RefusedError
from shared.protocol.messages import (
    Accepted,
    AdapterTensors,
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
from shared.protocol.tensors import pack, unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a device brings into every run."""

    backend: Backend
    downloads: Downloads
    records: Records
    held_out_records: Records | None
    clock: Clock
    share_labels: bool = False
    """Whether the owner agreed that the tokens to predict may go to the coordinator."""


class Participation:
    """One device in one run. `tokenise` first, then `run`, again after each `StaleError`."""

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
        self._pieces = {piece.name: piece for piece in welcome.model.pieces}
        self._architecture = ModelArchitecture.from_config(json.loads(welcome.model.config_json))
        self._head_is_here = welcome.training.labels == "device"
        self._data: Dataset
        self.phase = "fetching the tokenizer"

    def tokenise(self) -> Script[None]:
        """Fetch the tokenizer and turn the device's text into tokens."""
        files = yield from self._fetch(("tokenizer",))
        vocabulary = Vocabulary(files["tokenizer"], self._model)
        length = self._training.max_length
        held_out = self._parts.held_out_records
        self._data = Dataset(
            training=vocabulary.tokenise(self._parts.records, max_length=length),
            held_out=None if held_out is None else vocabulary.tokenise(held_out, max_length=length),
            seed=self._training.seed,
            device_id=self._conversation.device_id,
        )
        logger.info(
            "%d sequences to train on, %d target tokens",
            len(self._data.training),
            self._data.training.target_tokens,
        )

    def run(self) -> Script[Finished]:
        """Ask what to do and do it, until the coordinator says that the run is over."""
        assignment: Assignment | None = None
        answer = yield from self._ask_ready()
        while not isinstance(answer, Finished):
            if isinstance(answer, Assignment):
                assignment = answer
                answer = yield from self._prepare(assignment)
            elif isinstance(answer, RoundStart) and assignment is not None:
                answer = yield from self._take_round(answer, assignment)
            else:
                raise ProtocolError(f"unexpected answer {type(answer).__name__}")
        return answer

    def _ask_ready(self) -> Script[Answer]:
        self.phase = "waiting for the next round"
        return (yield from self._conversation.ask_any(lambda call: Ready(call=call)))

    # --- preparing ----------------------------------------------------------------------------

    def _prepare(self, assignment: Assignment) -> Script[Answer]:
        self.phase = "preparing"
        split_layer = assignment.split_layer
        names = self._architecture.front_pieces(split_layer, head_on_device=self._head_is_here)
        files = yield from self._fetch(names)
        self._parts.downloads.prune()
        self._load(FrontBase(self._model.config_json, files, split_layer))
        logger.info(
            "prepared: split layer %d of %d, %d adapted modules, %d sequences a step",
            split_layer,
            self._architecture.block_count,
            sum(1 for rank in assignment.ranks.values() if rank),
            assignment.batch,
        )
        self.phase = "prepared"
        version = assignment.plan_version
        return (
            yield from self._conversation.ask_any(
                lambda call: Prepared(call=call, plan_version=version)
            )
        )

    def _load(self, base: FrontBase) -> None:
        self._parts.backend.load(
            base,
            device_id=self._conversation.device_id,
            training=self._training,
            lora=self._lora,
            optimizer=self._optimizer,
        )

    def _fetch(self, names: Sequence[str]) -> Script[Mapping[str, Path]]:
        """Return these pieces of the base model as verified files, fetching what is missing."""
        unknown = [name for name in names if name not in self._pieces]
        if unknown:
            raise ModelError(f"the coordinator does not offer {', '.join(unknown)}")
        pieces = [self._pieces[name] for name in names]
        return (yield from self._parts.downloads.fetch(pieces, self._conversation))

    # --- a round ------------------------------------------------------------------------------

    def _take_round(self, start: RoundStart, assignment: Assignment) -> Script[Answer]:
        self.phase = f"round {start.round}"
        self._set_adapters(start)
        if start.evaluate:
            yield from self._evaluate(start, assignment)
        if start.steps == 0:
            return (yield from self._ask_ready())
        began_s = self._parts.clock.monotonic_s()
        total = LossSum()
        for step in range(start.first_step, start.first_step + start.steps):
            total += yield from self._take_step(start, step, assignment)
        mean = total.nats / max(1, total.target_tokens)
        logger.info("round %d: %d steps, training loss %.4f", start.round, start.steps, mean)
        busy_s = self._parts.clock.monotonic_s() - began_s
        return (yield from self._hand_in(start, total, busy_s))

    def _set_adapters(self, start: RoundStart) -> None:
        held = {adapter.module: _held(adapter) for adapter in start.adapters}
        self._parts.backend.set_adapters(held, fold=start.fold)

    def _take_step(self, start: RoundStart, step: int, assignment: Assignment) -> Script[LossSum]:
        batches = self._data.micro_batches(
            step, batch=assignment.batch, micro_batch=assignment.micro_batch
        )
        work = self._work(start, assignment, step=step, batches=batches, train=True)
        loss = yield from local_training.run(work, self._parts.backend, self._conversation)
        self._parts.backend.step(step, target_tokens=loss.target_tokens)
        return loss

    def _evaluate(self, start: RoundStart, assignment: Assignment) -> Script[None]:
        batches = self._data.evaluation_batches(self._training.evaluate_batch)
        work = self._work(start, assignment, step=start.first_step, batches=batches, train=False)
        loss = yield from local_training.run(work, self._parts.backend, self._conversation)
        yield from self._conversation.ask(
            lambda call: EvaluationResult(
                call=call,
                round=start.round,
                loss_sum=loss.nats,
                target_tokens=loss.target_tokens,
                sequences=sum(len(batch.lengths) for batch in batches),
            ),
            Accepted,
        )

    def _work(
        self,
        start: RoundStart,
        assignment: Assignment,
        *,
        step: int,
        batches: Sequence[TokenBatch],
        train: bool,
    ) -> Work:
        holds_all = assignment.split_layer == self._architecture.block_count
        return Work(
            round=start.round,
            step=step,
            train=train,
            batches=batches,
            in_flight=assignment.in_flight,
            alone=self._head_is_here and holds_all,
            send_labels=not self._head_is_here,
        )

    def _hand_in(self, start: RoundStart, total: LossSum, busy_s: float) -> Script[Answer]:
        self.phase = f"round {start.round} handed in"
        pairs = self._parts.backend.adapters()
        adapters = tuple(_on_wire(module, pair) for module, pair in pairs.items())
        return (
            yield from self._conversation.ask_any(
                lambda call: RoundResult(
                    call=call,
                    round=start.round,
                    adapters=adapters,
                    loss_sum=total.nats,
                    target_tokens=total.target_tokens,
                    steps=start.steps,
                    busy_s=busy_s,
                ),
                kind="adapter",
            )
        )


def _check_consent(welcome: Welcome, *, agreed: bool) -> None:
    if not agreed:
        raise RefusedError(
            "this run has labels: server: your text's tokens would be sent to the coordinator; "
            "add --share-labels to agree, or ask for labels: device"
        )
    logger.warning(
        "labels: server: the tokens to predict, which are this device's text, go to the "
        "coordinator of run %s (--share-labels)",
        welcome.run_id,
    )


def _on_wire(module: str, pair: LoraPair) -> AdapterTensors:
    return AdapterTensors(
        module=module,
        a=pack(pair.a_RI, "float32"),
        b=pack(pair.b_OR, "float32"),
        scaling=pair.scaling,
    )


def _held(adapter: AdapterTensors) -> ModuleAdapter:
    frozen = None
    if adapter.frozen_a is not None and adapter.frozen_b is not None:
        frozen = LoraPair(unpack(adapter.frozen_a), unpack(adapter.frozen_b), 1.0)
    return ModuleAdapter(LoraPair(unpack(adapter.a), unpack(adapter.b), adapter.scaling), frozen)
