"""`state.sqlite` against what the model was given: whatever goes wrong, they say the same.

What the server's trainer and the aggregation are called with is written down on the way; what is
undone (a round repeated, a coordinator that died) is struck off again. What is left went into the
adapters, and the record must hold exactly that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from coordinator import checkpoints
from coordinator.global_model import GlobalModel
from coordinator.server_training import ServerTrainer
from coordinator.state import database
from coordinator.state.run_state import RunState
from shared.protocol.messages import Activations
from tests.support.faults import Rule, ScriptedFaults
from tests.support.outcomes import LINES, USUAL, trio
from tests.support.simulation import Simulation
from tests.support.traffic import message_in

LOST = {**USUAL, "min": 2, "expected": 3}


@dataclass
class Ledger:
    """What went into the model: ``steps``: (step, devices, target tokens in all)."""

    steps: list[tuple[int, tuple[str, ...], int]] = field(default_factory=list)
    rounds: list[dict[str, tuple[int, bool]]] = field(default_factory=list)
    """Of each aggregation: device → target tokens, and whether its adapters are in."""
    _open: list[tuple[int, tuple[str, ...], int]] = field(default_factory=list)

    def step(self, step: int, devices: Sequence[str], target_tokens: int) -> None:
        self._open.append((step, tuple(devices), target_tokens))

    def aggregated(self, contributions) -> None:
        self.steps += self._open
        self.rounds.append({c.device: (c.target_tokens, c.adapters is not None)
                            for c in contributions})  # fmt: skip
        self.undo()

    def undo(self) -> None:
        """Strike off what was not aggregated."""
        self._open = []


@pytest.fixture
def ledger(monkeypatch) -> Ledger:
    ledger = Ledger()
    close_step, finish, void = (
        ServerTrainer.close_step,
        GlobalModel.finish_round,
        GlobalModel.void_round,
    )

    def spied_step(self, step, *, devices, target_tokens):
        ledger.step(step, devices, target_tokens)
        return close_step(self, step, devices=devices, target_tokens=target_tokens)

    def spied_finish(self, contributions):
        ledger.aggregated(contributions)
        return finish(self, contributions)

    def spied_void(self):
        ledger.undo()
        void(self)

    monkeypatch.setattr(ServerTrainer, "close_step", spied_step)
    monkeypatch.setattr(GlobalModel, "finish_round", spied_finish)
    monkeypatch.setattr(GlobalModel, "void_round", spied_void)
    return ledger


@dataclass
class Recorded:
    """A simulation with its record; ``restart`` kills the coordinator in mid-air."""

    sim: Simulation
    ledger: Ledger

    def __post_init__(self) -> None:
        self._record(None)

    def _record(self, resumed_round: int | None) -> None:
        folder = self.sim.config.run_folder
        self.state = RunState(folder, self.sim.clock, resumed_round=resumed_round)
        self.sim.coordinator.members.listener = self.state

    def restart(self) -> None:
        self.state._db.close()
        self.ledger.undo()
        self.sim.restart_coordinator()
        found = checkpoints.latest(self.sim.config.run_folder / "checkpoints")
        assert found is not None
        self._record(found.round)

    def finish(self) -> None:
        self.sim.run()
        self.state.close("complete")

    def rows(self, query: str) -> list[tuple]:
        with database.reading(self.sim.config.run_folder / database.STATE_FILE) as db:
            return [tuple(row) for row in db.execute(query)]

    def check(self) -> None:
        """Compare all that counts with the ledger."""
        steps: dict[int, tuple[tuple[str, ...], int]] = {}
        for step, device, tokens in self.rows(
            "SELECT step, device, target_tokens FROM counted ORDER BY step, device"
        ):
            devices, total = steps.get(step, ((), 0))
            steps[step] = ((*devices, device), total + tokens)
        assert [(step, *value) for step, value in steps.items()] == sorted(self.ledger.steps)
        found = self.rows(
            "SELECT round, device, target_tokens, outcome FROM participants "
            "JOIN rounds USING (round, attempt) WHERE state = 'closed' AND end_step > first_step"
        )
        for number, expected in enumerate(self.ledger.rounds, 1):
            own = {
                device: (tokens, outcome == "delivered")
                for round_, device, tokens, outcome in found
                if round_ == number and tokens is not None
            }
            assert own == expected
            delivered = {d for r, d, _, how in found if r == number and how == "delivered"}
            assert delivered == {device for device, (_, is_in) in expected.items() if is_in}
        count = self.sim.config.rounds.count
        self._check_that_no_text_is_in_it()
        states = self.rows("SELECT round, state FROM rounds WHERE state <> 'void' ORDER BY round")
        assert states == [(number, "closed") for number in range(1, count + 2)]

    def _check_that_no_text_is_in_it(self) -> None:
        """Law 7."""
        written = (self.sim.config.run_folder / database.STATE_FILE).read_bytes()
        lines = [
            line
            for file in self.sim.folder.glob("?.jsonl")
            for line in file.read_text().splitlines()
        ]
        texts = [text.encode() for line in lines for text in json.loads(line).values()]
        assert len(texts) >= 2 * LINES
        assert [text for text in texts if text in written] == []

    def outcomes(self, round_: int, attempt: int = 1) -> dict[str, str]:
        where = f"WHERE (round, attempt) = ({round_}, {attempt})"
        return dict(self.rows(f"SELECT device, outcome FROM participants {where}"))


@pytest.fixture
def recorded(tmp_path, ledger):
    return lambda **settings: Recorded(trio(tmp_path, **settings), ledger)


def trains(parcel, *, step):
    if parcel.kind != "activations" or not parcel.sender.startswith("c-"):
        return False
    message = message_in(parcel.payload)
    return isinstance(message, Activations) and message.purpose == "train" and message.step >= step


@pytest.mark.parametrize("labels", ["device", "server"])
def test_of_a_run_in_which_nothing_goes_wrong(labels, recorded):
    run = recorded(labels=labels)
    run.finish()
    run.check()
    all_in = dict.fromkeys("abc", "delivered")
    assert [run.outcomes(number) for number in (1, 2)] == [all_in, all_in]
    assert run.outcomes(3) == dict.fromkeys("abc", "evaluated")
    where = "SELECT first_sequence, batch FROM participants JOIN plans USING (plan)"
    assert run.rows(where + " WHERE device = 'c' ORDER BY round") == [(0, 3), (6, 3), (12, 3)]
    sessions = "SELECT device, sessions, outcome FROM devices ORDER BY device"
    assert run.rows(sessions) == [(device, 1, "done") for device in "abc"]


def test_of_a_device_that_vanishes_in_a_step_and_comes_back(recorded):
    run = recorded(rounds=3)
    run.sim.run_to("round 2, step 3")
    run.sim.vanish("c")
    run.sim.add_device("c", lines=LINES)
    run.finish()
    run.check()
    assert run.outcomes(2) == {"a": "delivered", "b": "delivered", "c": "lost"}
    assert run.outcomes(3)["c"] == "delivered"
    assert (3, "c") not in run.rows("SELECT step, device FROM counted")
    assert (2, "c") in run.rows("SELECT step, device FROM counted")
    fresh = "SELECT round, fresh FROM participants WHERE device = 'c' ORDER BY round"
    assert run.rows(fresh) == [(1, 1), (2, 0), (3, 1), (4, 0)]
    assert run.rows("SELECT sessions FROM devices WHERE device = 'c'") == [(2,)]


def test_of_a_straggler(recorded):
    late = Rule(partial(trains, step=3), (74.0,), nth=None)
    rules = {**USUAL, "step_timeout_s": 60.0}
    run = recorded(rounds=3, rules=rules, faults=ScriptedFaults([late]))
    run.sim.run(until=lambda: late.seen > 0)
    run.sim.run(until=lambda: run.sim.coordinator.phase == "waiting for devices")
    late.nth = 0
    run.finish()
    run.check()
    assert run.outcomes(2)["c"] == "late"
    assert run.outcomes(3)["c"] == "delivered"


@pytest.mark.parametrize("how", ["activations", "adapters", "outlier"])
def test_of_a_device_whose_numbers_are_refused(how, recorded):
    run = recorded(rules=LOST)
    backend = run.sim.devices["c"].parts.backend
    adapters, forward, handed_in = backend.adapters, backend.forward, []

    def bad_forward(key, batch, *, train):
        frame = forward(key, batch, train=train)
        if how != "activations" or not train or key.step < 3:
            return frame
        return type(frame)(frame.dtype, (frame.shape[0] - 1, frame.shape[1]), frame.data[128:])

    def bad_adapters():
        handed_in.append(adapters())
        if how == "activations" or len(handed_in) != 2:
            return handed_in[-1]
        worse = np.nan if how == "adapters" else 1e6
        return {
            name: type(pair)(pair.a_RI, pair.b_OR * np.float32(worse), pair.scaling)
            for name, pair in handed_in[-1].items()
        }

    backend.forward, backend.adapters = bad_forward, bad_adapters
    run.finish()
    run.check()
    assert run.outcomes(2) == {"a": "delivered", "b": "delivered", "c": "refused"}


def test_of_a_round_that_every_device_left(recorded):
    run = recorded()
    run.sim.run_to("round 2, step 3")
    for device in "abc":
        run.sim.vanish(device)
    for device in "abc":
        run.sim.add_device(device, lines=LINES)
    run.finish()
    run.check()
    attempts = run.rows("SELECT attempt, state, ending FROM rounds WHERE round = 2")
    assert attempts == [(1, "void", "every device was lost"), (2, "closed", "3 delivered")]
    kept = run.rows("SELECT DISTINCT step FROM contributions WHERE (round, attempt) = (2, 1)")
    assert kept == [(2,)]
    measured = [line["step"] for line in run.sim.metrics() if "train/loss" in line]
    assert measured == [1, 2, 3, 4], "of the repeated round once"


@pytest.mark.parametrize("phase", ["round 1, step 1", "round 2, step 3", "round 3, step 4"])
def test_of_a_coordinator_that_dies(phase, recorded):
    run = recorded(rounds=3)
    run.sim.run_to(phase)
    run.restart()
    run.finish()
    run.check()
    number = int(phase[6])
    attempts = run.rows(f"SELECT attempt, state FROM rounds WHERE round = {number}")
    assert attempts == [(1, "void"), (2, "closed")]
    assert set(run.outcomes(number).values()) == {"void"}
    starts = run.rows("SELECT resumed_round, ending FROM starts")
    assert starts == [(None, "it was killed"), (number - 1, "complete")]


def test_of_a_second_agent_with_an_id_in_use(recorded):
    run = recorded()
    run.sim.run_to("round 1, step 1")
    run.sim.add_device("b", lines=LINES, seed=99)
    run.finish()
    run.check()
    found = run.rows("SELECT outcome FROM sessions WHERE device = 'b' ORDER BY rowid")
    assert found == [("done",), ("refused",)]
    assert run.rows("SELECT outcome FROM devices WHERE device = 'b'") == [("done",)]


class DiedError(BaseException):
    """The coordinator was killed; nothing catches it."""


@pytest.mark.parametrize("saved", [False, True])
def test_of_a_coordinator_that_dies_while_it_saves_a_round(saved, recorded):
    """Before its checkpoint is there, or before the record heard of that."""
    run = recorded(rounds=3)
    save = run.sim.coordinator._save_checkpoint

    def dying(checkpoint):
        state = f"SELECT state FROM rounds WHERE round = {checkpoint.round}"
        assert run.rows(state) == ([("closing",)] if checkpoint.round else [])
        if checkpoint.round < 2:
            save(checkpoint)
            return
        if saved:
            save(checkpoint)
        raise DiedError

    run.sim.coordinator._save_checkpoint = dying
    with pytest.raises(DiedError):
        run.sim.run(until=lambda: False)
    if not saved:
        run.ledger.steps = [one for one in run.ledger.steps if one[0] < 2]
        del run.ledger.rounds[1]
    run.restart()
    run.finish()
    run.check()
    attempts = run.rows("SELECT attempt, state FROM rounds WHERE round = 2")
    assert attempts == ([(1, "closed")] if saved else [(1, "void"), (2, "closed")])
