"""Plans follow what lasts, and not the noise of what was measured."""

from __future__ import annotations

import dataclasses

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.planning.planner import plan_fleet
from coordinator.planning.prediction import predict
from coordinator.planning.replanning import LEAST_GAIN, History, Proposal, Standing, assumed, decide
from tests.support.fleets import Machine, conditions, device, llama

MODEL = llama(4)
RUN = conditions(MODEL, server=Machine(speed=2.0))
SETTLED = 3


def powers(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


machines = st.lists(
    st.builds(Machine, speed=powers(-1.5, 0), uplink=powers(6, 8), downlink=powers(6, 8)),
    min_size=2,
    max_size=4,
)
noise = st.floats(0.95, 1.05)


class Planned:
    """A fleet that is planned again after every round, as a coordinator does."""

    def __init__(self, some):
        self.devices = [device(f"d{index}", one, MODEL) for index, one in enumerate(some)]
        self.plans = dict(plan_fleet(self.devices, RUN).plans)
        self.assumed = {one.device_id: 1.0 for one in self.devices}
        self.rounds = SETTLED

    def after_round(self, slowdowns):
        """Take each device's slowdown as it was seen; return why anything changed."""
        seen = dict(zip(self.assumed, slowdowns, strict=True))
        believed = {name: assumed(self.assumed[name], seen[name]) for name in seen}
        devices = [
            dataclasses.replace(one, slowdown=believed[one.device_id]) for one in self.devices
        ]
        proposed = plan_fleet(devices, RUN)
        proposal = Proposal(
            plans=proposed.plans,
            prediction=proposed.prediction,
            current=predict(self.plans, devices, RUN),
        )
        standing = {
            name: Standing(
                plan=self.plans[name],
                assumed_slowdown=self.assumed[name],
                slowdown=believed[name],
            )
            for name in self.plans
        }
        history = History(rounds_since_change=self.rounds, importance_change=0.0, steps_left=10_000)
        found = decide(standing, proposal, history=history)
        self.rounds += 1
        if found.plans:
            self.plans.update(found.plans)
            self.assumed, self.rounds = believed, 1
        return found, proposal


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(some=machines, data=st.data())
def test_noise_of_five_percent_changes_nothing(some, data):
    fleet = Planned(some)
    for _ in range(6):
        seen = [data.draw(noise) for _ in some]
        assert not fleet.after_round(seen)[0].plans


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(some=machines, data=st.data())
def test_a_device_at_a_third_of_its_speed_is_followed_at_once_and_then_left_alone(some, data):
    fleet = Planned(some)
    fleet.rounds = 0
    tired = data.draw(st.integers(0, len(some) - 1))

    def seen():
        return [data.draw(noise) * (3.0 if index == tired else 1.0) for index in range(len(some))]

    found, proposal = fleet.after_round(seen())
    if proposal.gain_s > LEAST_GAIN * proposal.current.step_s:
        assert found.why == "slower"
        assert fleet.plans == {
            name: dataclasses.replace(plan, ranks=fleet.plans[name].ranks)
            for name, plan in proposal.plans.items()
        }
        for _ in range(4):
            assert not fleet.after_round(seen())[0].plans
    else:
        assert not found.plans, "the others are what its step waits for"
