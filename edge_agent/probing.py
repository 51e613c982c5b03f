"""Have a child process measure this device, and survive what may happen to it.

A child, because measuring needs memory that this process should not keep, and because a
device whose memory is too small kills whoever asks for more: then the child dies, and what it
had measured by then has been said already, a JSON line for each point.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from edge_agent.probe_spec import LEAST_POINTS, LINE, SPEC, ProbeLine, ProbeSpec
from shared.errors import ConfigError, HsplitError, ModelError, PlanError
from shared.memory_use import resident_bytes, trim
from shared.protocol.profile import BlockPoint, HeadPoint, OptimizerPoint

logger = logging.getLogger(__name__)

MODULE = "edge_agent.probe"
TIMEOUT_S = 180.0
_ERRORS: dict[int, type[HsplitError]] = {
    ConfigError.exit_code: ConfigError,
    ModelError.exit_code: ModelError,
    PlanError.exit_code: PlanError,
    -signal.SIGKILL: PlanError,
    -signal.SIGBUS: PlanError,
}
"""By how the child ended; SIGKILL and SIGBUS are how a full memory ends a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What was measured; fields as in `shared.protocol.profile.Measurements`.

    ``warnings``: what of it could not be measured, and why.
    """

    runtime_bytes: int
    on_gpu: bool
    blocks: tuple[BlockPoint, ...]
    head: tuple[HeadPoint, ...]
    optimizer: tuple[OptimizerPoint, ...]
    warnings: tuple[str, ...]
    computes_with: str | None = None


@dataclass(frozen=True, slots=True)
class _Ended:
    """A child that is no more: its last words, and how it went (None: it took too long)."""

    lines: tuple[ProbeLine, ...]
    stderr: str
    exit_code: int | None


def probe(spec: ProbeSpec, *, timeout_s: float = TIMEOUT_S) -> ProbeResult:
    """Return what this device measures in a child process, which ends before this returns.

    Blocks for about ``spec.budget_s`` and the start of the backend, and at most ``timeout_s``.
    To be called while this process holds no part of a model: what it has of the machine's
    memory now counts as what the program takes without one.

    Raises:
        PlanError: too few points could be measured: the memory is too small, or it took too
            long.
        ModelError: the pieces are not of this model, or the child failed in another way.
        ConfigError: no such device or backend, or no way to measure memory here.
    """
    trim()
    ended = _run(dataclasses.replace(spec, program_bytes=resident_bytes()), timeout_s)
    said = _gathered(ended.lines)
    if len(said.blocks) < LEAST_POINTS or not said.runtime_bytes:
        raise _refused(said, ended, spec, timeout_s)
    complaint = _complaint(ended, timeout_s)
    warnings = said.warnings + ((f"not all was measured: {complaint}",) if complaint else ())
    for warning in warnings:
        logger.warning("measuring this device: %s", warning)
    return dataclasses.replace(said, warnings=warnings)


def _run(spec: ProbeSpec, timeout_s: float) -> _Ended:
    """Run the child to its end. Whatever interrupts this kills it."""
    command = [sys.executable, "-m", MODULE]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        try:
            output, errors = child.communicate(SPEC.dump_json(spec), timeout_s)
            exit_code: int | None = child.returncode
        except subprocess.TimeoutExpired:
            child.kill()
            (output, errors), exit_code = child.communicate(), None
        except BaseException:  # Ctrl-C and SIGTERM too
            child.kill()
            child.wait()
            raise
    return _Ended(_parsed(output), errors.decode(errors="replace").strip(), exit_code)


def _parsed(output: bytes) -> tuple[ProbeLine, ...]:
    lines = []
    for line in output.splitlines():
        try:
            lines.append(LINE.validate_json(line))
        except ValidationError:  # cut off in the middle, or printed by a library
            logger.debug("not a line of a probe: %r", line[:200])
    return tuple(lines)


def _gathered(lines: Iterable[ProbeLine]) -> ProbeResult:
    said = tuple(lines)
    runtime = next((line for line in said if line.runtime_bytes is not None), ProbeLine())
    return ProbeResult(
        runtime_bytes=runtime.runtime_bytes or 0,
        on_gpu=runtime.on_gpu,
        computes_with=runtime.computes_with,
        blocks=tuple(line.block for line in said if line.block is not None),
        head=tuple(line.head for line in said if line.head is not None),
        optimizer=tuple(line.optimizer for line in said if line.optimizer is not None),
        warnings=tuple(line.warning for line in said if line.warning is not None),
    )


def _complaint(ended: _Ended, timeout_s: float) -> str | None:
    """Say how the child ended; None: as it should."""
    if ended.exit_code == 0:
        return None
    failure = next((line.failure for line in ended.lines if line.failure is not None), None)
    if failure is not None:
        return failure
    attempts = [line.attempt for line in ended.lines if line.attempt is not None]
    doing = f" while measuring {attempts[-1]}" if attempts else " at its start"
    if ended.exit_code is None:
        return f"it took more than {timeout_s:g} s{doing}"
    if ended.exit_code in (-signal.SIGKILL, -signal.SIGBUS):
        return f"the system killed it{doing}: the memory is full"
    last = ended.stderr.splitlines()[-1:] or ["no message"]
    return f"it ended with {ended.exit_code}{doing}: {last[0][:500]}"


def _refused(said: ProbeResult, ended: _Ended, spec: ProbeSpec, timeout_s: float) -> HsplitError:
    """Return the error that says why there are too few points."""
    reason = _complaint(ended, timeout_s) or "; ".join(said.warnings) or "it said nothing"
    code = PlanError.exit_code if ended.exit_code in (None, 0) else ended.exit_code
    error = _ERRORS.get(code, ModelError)
    if error is not PlanError:
        return error(f"this device could not be measured: {reason}")
    peak = max((point.peak_bytes for point in said.blocks), default=said.runtime_bytes)
    limit = spec.memory_bytes
    allowed = "" if limit is None else f" of {limit / 2**20:.0f} MiB that it may use"
    return error(
        f"this device could not be measured: {len(said.blocks)} of the {LEAST_POINTS} points "
        f"needed, at up to {peak / 2**20:.0f} MiB{allowed} ({reason}). Give it more memory, or "
        f"lower plan.micro_batch ({spec.micro_batch}) or training.max_length "
        f"({spec.training.max_length})"
    )
