"""A device drops to a third of its speed in the midst of a run: how soon does the plan follow?

Three devices, real programs over a loopback mosquitto. One is given less of the machine by
SIGSTOP and SIGCONT in turns, a real slow-down that no code of hsplit knows of: first for the
share `--share` of the time, from the middle of round `--drop` on for a third of that. The new
optimum is what a run settles at in which the device is that slow from its start. The aim: in
the round after three aggregations the step time is within 15 % of it. One more round follows,
or a plan for the few steps that are left would not be worth its change.

    python -m tests.testbed.bench_replan --sequences 12
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.testbed.bench_report import write_report
from tests.testbed.emulated_fleet import (
    LENGTH,
    Bench,
    Device,
    Outcome,
    base_and_text,
    emulation,
    finish,
    planned_plan,
    run_settings,
    start_fleet,
)
from tests.testbed.system import Process, System, broker

VICTIM = "laptop"
OTHERS = (
    Device(name="orin", speed=0.5, mbit_per_s=50),
    Device(name="nano", speed=0.25, mbit_per_s=50),
)
AGGREGATIONS = 3
AIM = 1.15
PERIOD_S = 0.1
LOOK_FOR_CHILDREN_S = 0.5


class Throttle:
    """Lets a process, and its children, run for a ``share`` of the time. A context manager.

    ``share`` may be set at any time from any thread.
    """

    def __init__(self, process: Process, share: float) -> None:
        self.share = share
        self._root = psutil.Process(process.popen.pid)
        self._family = [self._root]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="throttle")

    def __enter__(self) -> Throttle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._send(signal.SIGCONT)

    def _run(self) -> None:
        looked_s = 0.0
        while not self._stop.is_set():
            if time.monotonic() - looked_s > LOOK_FOR_CHILDREN_S:
                looked_s = time.monotonic()
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._family = [self._root, *self._root.children(recursive=True)]
            self._send(signal.SIGCONT)
            self._stop.wait(PERIOD_S * self.share)
            self._send(signal.SIGSTOP)
            self._stop.wait(PERIOD_S * (1 - self.share))

    def _send(self, signal_: signal.Signals) -> None:
        for one in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal_)


@contextlib.contextmanager
def _running(
    bench: Bench, name: str, *, share: float, rounds: int
) -> Iterator[tuple[System, Process, dict[str, Process], Throttle]]:
    options = bench.options
    emulations: dict[str, str | None] = {
        one.name: emulation(one, scale=options.scale, memory_bytes=None) for one in OTHERS
    }
    emulations[VICTIM] = None
    settings = run_settings(
        bench.base,
        devices=len(emulations),
        plan=planned_plan(options.sequences // len(emulations)),
        rounds=rounds,
        steps=options.steps,
    )
    with System(bench.folder / name, bench.url) as system:
        coordinator, agents = start_fleet(system, bench.text, emulations, settings)
        with Throttle(agents[VICTIM], share) as throttle:
            yield system, coordinator, agents, throttle


def dropping(bench: Bench) -> Outcome:
    """Return a run in which the device slows down in the middle of round ``options.drop``."""
    options = bench.options
    rounds = options.drop + AGGREGATIONS + 1
    with _running(bench, "dropping", share=options.share, rounds=rounds) as running:
        system, coordinator, agents, throttle = running
        middle = (options.drop - 1) * options.steps + options.steps // 2
        system.wait_for_step(coordinator, middle, timeout_s=900)
        throttle.share = options.share / 3
        return finish(system, coordinator, agents)


def slow_from_the_start(bench: Bench) -> Outcome:
    """Return a run in which the device is slow when it measures itself, and stays so."""
    with _running(bench, "slow", share=bench.options.share / 3, rounds=3) as running:
        system, coordinator, agents, _ = running
        return finish(system, coordinator, agents)


def main() -> None:
    """Measure both runs, print a table, write build/bench/replan.json."""
    options = _options()
    with tempfile.TemporaryDirectory() as temporary, broker(Path(temporary)) as url:
        folder = Path(temporary)
        base, text = base_and_text(folder)
        bench = Bench(folder=folder, url=url, base=base, text=text, options=options)
        dropped = dropping(bench)
        slow = slow_from_the_start(bench)
    _report(dropped, slow, options)


def _report(dropped: Outcome, slow: Outcome, options: argparse.Namespace) -> None:
    optimum_s = min(slow.median_s(first_round=number, last_round=number) for number in (2, 3))
    rows = []
    print(
        f"{options.sequences} sequences of {LENGTH} tokens a step, {options.steps} steps a round; "
        f"{VICTIM} runs {options.share:.0%} of the time, from the middle of round {options.drop} "
        f"on {options.share / 3:.0%}; new optimum {optimum_s:.2f} s a step"
    )
    print(f"{'round':>5}{'aggregations':>14}{'step s':>9}{'of optimum':>12}  parts (k x batch)")
    for number in sorted({step.round for step in dropped.steps}):
        step_s = statistics.median(s.seconds for s in dropped.steps if s.round == number)
        parts = _parts(dropped, number)
        since = number - options.drop
        rows.append({"round": number, "step_s": step_s, "parts": parts})
        print(
            f"{number:>5}{'-' if since < 0 else since:>14}{step_s:>9.2f}"
            f"{step_s / optimum_s:>12.2f}  {parts}"
        )
    (settled_s,) = (r["step_s"] for r in rows if r["round"] == options.drop + AGGREGATIONS)
    ratio = settled_s / optimum_s
    print(f"after {AGGREGATIONS} aggregations: {ratio:.2f} of the new optimum, aim at most {AIM}")
    write_report(
        "replan",
        {
            "options": vars(options),
            "optimum_step_s": optimum_s,
            "rounds": rows,
            "ratio": ratio,
            "aim": AIM,
            "plans": dropped.plans,
            "optimum_plans": slow.plans,
        },
    )


def _parts(outcome: Outcome, number: int) -> dict[str, Any]:
    """Return device → ``k x batch`` as they were in one round."""
    latest: dict[str, Any] = {}
    for plan in outcome.plans:
        if plan["round"] <= number:
            latest = plan["devices"]
    return {name: f"{part['split_layer']}x{part['batch']}" for name, part in latest.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.06, help="of the other devices' speeds")
    parser.add_argument("--share", type=float, default=0.12, help=f"of the time that {VICTIM} has")
    parser.add_argument("--sequences", type=int, default=12, help="of all devices in one step")
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--drop", type=int, default=2, help="the round that it happens in")
    return parser.parse_args()


if __name__ == "__main__":
    main()
