"""The short version of `make chaos`: one run for each kind of trouble, real programs throughout."""

from __future__ import annotations

import re
import signal
from dataclasses import replace

import pytest

from coordinator.state.database import STATE_FILE
from tests.support.outcomes import TOLERANCE
from tests.testbed import small_run
from tests.testbed.chaos import clocks, faults, trial, verdict
from tests.testbed.chaos.bed import COORDINATOR, Material
from tests.testbed.chaos.disk import why_no_disk
from tests.testbed.chaos.faults import KINDS, LONG_S, Fault
from tests.testbed.chaos.ledger import AcceptedRound, accepted_rounds
from tests.testbed.chaos.programs import Starter
from tests.testbed.chaos.replay import MiscountedError
from tests.testbed.chaos.schedule import MOST_FAULTS, Schedule, Strike, drawn
from tests.testbed.chaos.trial import Trial

A_YEAR_S = 365 * 24 * 3600

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    return Material.written(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def starter() -> Starter:
    return Starter()


def run(strikes, material, starter, folder, **changes) -> Trial:
    schedule = Schedule(0, optimizer="sgd", labels="device", strikes=tuple(strikes))
    return trial.run(replace(schedule, **changes), material, folder, starter)


def judged(strikes, material, starter, folder, **changes) -> tuple[Trial, verdict.Verdict]:
    """Run it; all faults must have come to pass, or it proves nothing."""
    done = run(strikes, material, starter, folder, **changes)
    assert done.struck == [strike.fault.name for strike in strikes]
    found = verdict.judge(done, material.folder)
    assert found.wrong == ()
    assert found.difference is not None
    return done, found


def assert_as_if_calm(done: Trial, found: verdict.Verdict, calm: Trial) -> None:
    """Nothing was lost, so that it came to what an undisturbed run comes to."""
    assert found.dropped == 0
    apart = small_run.distance(done.outcome / "adapter", calm.outcome / "adapter")
    assert apart <= TOLERANCE["sgd"]


def at(step: int, name: str, who: str, act: faults.Act) -> Strike:
    return Strike(step, 0.0, Fault(name, who, act))


# --- the judge ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm(material, starter, tmp_path_factory) -> Trial:
    return run((), material, starter, tmp_path_factory.mktemp("calm"), patient=True)


def test_a_run_that_nobody_disturbs_is_its_own_replay(calm, material):
    found = verdict.judge(calm, material.folder)
    assert (found.wrong, found.dropped, found.repeated) == ((), 0, 0)
    assert calm.codes == dict.fromkeys((COORDINATOR, "a", "b", "c"), 0)


def test_a_contribution_more_or_less_is_noticed(calm, material):
    rounds = accepted_rounds(calm.outcome / STATE_FILE)
    without_b = changed(rounds, outcome="lost")
    assert verdict.difference(calm.outcome, material.folder, without_b) > 1e-3
    a_step_less = changed(rounds, tokens={})
    assert verdict.difference(calm.outcome, material.folder, a_step_less) > 1e-3


def test_so_is_one_from_another_place_in_the_text(calm, material):
    rounds = accepted_rounds(calm.outcome / STATE_FILE)
    elsewhere = changed(rounds, position=rounds[1].shares["b"].position + 1)
    with pytest.raises(MiscountedError, match="b has [0-9]+ target tokens there"):
        verdict.difference(calm.outcome, material.folder, elsewhere)


def changed(rounds, **changes) -> list[AcceptedRound]:
    """Return the rounds with another share of ``b`` in the second one."""
    shares = {**rounds[1].shares, "b": replace(rounds[1].shares["b"], **changes)}
    return [rounds[0], replace(rounds[1], shares=shares), rounds[2]]


# --- the faults -----------------------------------------------------------------------------------


def test_agents_killed_and_stopped(material, starter, tmp_path):
    judged(
        [
            at(1, "killed", "a", faults.killed("a", signal.SIGKILL, back_after_s=0.1)),
            at(2, "terminated", "c", faults.killed("c", signal.SIGTERM, back_after_s=0.1)),
            at(4, "stopped for long", "b", faults.stopped("b", LONG_S[0])),
        ],
        material,
        starter,
        tmp_path,
        labels="server",
        optimizer="adamw",
    )


def test_the_coordinator_killed_twice_while_clocks_jump(calm, material, starter, tmp_path):
    killed = faults.killed(COORDINATOR, signal.SIGKILL, back_after_s=0.0)
    strikes = [
        at(1, "clock jumped", COORDINATOR, faults.clock_jumped(COORDINATOR, -A_YEAR_S)),
        at(1, "killed", COORDINATOR, killed),
        at(2, "clock jumped", "a", faults.clock_jumped("a", A_YEAR_S)),
        at(4, "killed", COORDINATOR, killed),
    ]
    done, found = judged(strikes, material, starter, tmp_path, patient=True)
    assert done.ended == [(COORDINATOR, -signal.SIGKILL)] * 2
    assert found.repeated <= 2
    assert_as_if_calm(done, found, calm)
    logs = [(tmp_path / f"{name}.log").read_text() for name in (COORDINATOR, "a")]
    years = [set(re.findall(r"(?m)^20\d\d(?=-)", log)) for log in logs]
    # Without a C compiler no clock jumps, and the rest of this is as it is.
    assert [len(found) for found in years] == ([2, 2] if clocks.preloaded() else [1, 1])


def test_the_broker_restarted_amid_packets_that_come_twice_and_late(
    calm, material, starter, tmp_path
):
    strikes = [
        at(0, "packets", "c", faults.link_disturbed("c", "disordered", 3.0)),
        at(0, "packets", COORDINATOR, faults.link_disturbed(COORDINATOR, "disordered", 3.0)),
        at(2, "broker", "broker", faults.broker_restarted(0.5)),
    ]
    done, found = judged(strikes, material, starter, tmp_path, patient=True)
    assert found.repeated == 0
    assert_as_if_calm(done, found, calm)


def test_links_cut_and_unplugged(material, starter, tmp_path):
    judged(
        [
            at(1, "link cut", "a", faults.link_disturbed("a", "cut", 1)),
            at(1, "unplugged", "b", faults.link_disturbed("b", "unplugged", LONG_S[0])),
            at(3, "link cut", COORDINATOR, faults.link_disturbed(COORDINATOR, "cut", 1)),
        ],
        material,
        starter,
        tmp_path,
    )


def test_the_coordinators_disk_full(material, starter, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    reason = why_no_disk(disk)
    if reason is not None:
        pytest.skip(reason)
    strikes = [at(2, "disk full", COORDINATOR, faults.disk_full(0.0))]
    done = run(strikes, material, starter, tmp_path / "run")
    assert verdict.judge(done, material.folder).wrong == ()
    assert (COORDINATOR, faults.DISK_FULL) in done.ended


# --- drawing --------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_schedule_again():
    for seed in range(100):
        assert str(drawn(seed)) == str(drawn(seed))
        assert 1 <= len(drawn(seed).strikes) <= MOST_FAULTS
        names = [strike.fault.name for strike in drawn(seed).strikes]
        assert KINDS[seed % len(KINDS)] in names
        assert names.count("gone for good") <= 1, "two devices must be left"


def test_what_cannot_be_done_here_is_not_drawn():
    for seed in range(50):
        assert not drawn(seed, without={"disk full"}).needs_disk
