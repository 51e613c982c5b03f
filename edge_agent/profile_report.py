"""What was measured of a device, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter

from edge_agent.link_probe import FASTEST_BYTES_PER_S
from edge_agent.profile_command import Found, Measured
from edge_agent.profiler import BUSY_SPREAD, typical_spread
from shared import costs, profile_file
from shared.protocol.profile import DeviceFacts, LinkMeasurement, Measurements, Telemetry

MORE = (
    "To measure how fast it trains, name a model: --model FOLDER_OR_HUB_NAME",
    "To measure its link, name a broker: --broker URL",
)
BUSY = "This device was busy: measure again with --fresh when it is not."
_FOUND: TypeAdapter[Found] = TypeAdapter(Found)


def as_json(found: Found) -> str:
    """Return the profile as its file would hold it; without a model what there is instead."""
    if found.measured is not None:
        return profile_file.to_json(found.measured.profile)
    return _FOUND.dump_json(found, indent=2, exclude_none=True).decode()


def as_table(found: Found) -> str:
    """Return lines for people."""
    lines = [
        _line(found.device_id, _machine(found.machine, found.facts)),
        _line("now", _now(found.telemetry)),
        *([] if found.measured is None else _compute(found.measured)),
        "",
        _line("memory", _memory(found)),
        _line("link", "not measured" if found.link is None else _link(found.link)),
    ]
    missing = (found.measured is None, found.link is None)
    if found.measured is not None and typical_spread(found.measured.measurements) > BUSY_SPREAD:
        lines += ["", BUSY]
    hints = [hint for hint, is_missing in zip(MORE, missing, strict=True) if is_missing]
    return "\n".join([*lines, *(["", *hints] if hints else [])])


def _line(name: str, text: str) -> str:
    return f"{name:<11} {text}"


def _machine(machine: str, facts: DeviceFacts) -> str:
    shares = ", in the machine's memory" if facts.accelerator_shares_memory else ""
    own = facts.accelerator_memory_bytes
    parts = [
        machine,
        facts.cpus and f"{facts.cpus:g} CPUs",
        facts.memory_bytes and f"{size(facts.memory_bytes)} of memory",
        facts.power_mode and f"power mode {facts.power_mode}",
        "no GPU found"
        if facts.accelerator is None
        else f"{facts.accelerator}{f' with {size(own)}' if own else ''}{shares}",
        facts.driver and f"driver {facts.driver}",
    ]
    return ", ".join(part for part in parts if part)


def _now(telemetry: Telemetry) -> str:
    throttled = "throttled" if telemetry.throttled else None
    if throttled and telemetry.throttle_reasons:
        throttled += f" ({', '.join(telemetry.throttle_reasons)})"
    free = telemetry.free_memory_bytes
    parts = [
        _said(telemetry.cpu_load_percent, "CPU at {:.0f} %"),
        _said(telemetry.accelerator_load_percent, "GPU at {:.0f} %"),
        _said(telemetry.temperature_c, "{:.0f} °C"),
        _said(telemetry.power_w, "{:.1f} W"),
        None if free is None else f"{size(free)} free",
        throttled,
    ]
    return ", ".join(part for part in parts if part) or "no sensor says"


def _said(value: float | None, text: str) -> str | None:
    return None if value is None else text.format(value)


# --- one model ------------------------------------------------------------------------------------


def _compute(measured: Measured) -> list[str]:
    found = measured.measurements
    tokens = measured.micro_batch * measured.length
    threads = "" if found.threads is None else f", CPU threads: {found.threads}"
    return [
        _line("model", f"{measured.model}, {measured.blocks} blocks"),
        _line("measured", f"{found.backend} on {measured.computes_on}, {found.dtype}{threads}"),
        *([] if found.computes_with is None else [_line("computed by", found.computes_with)]),
        _line("with", f"micro-batches of {measured.micro_batch} x {measured.length} tokens"),
        "",
        _row("", "forward", "backward", "spread"),
        *_rows(found, tokens),
    ]


def _rows(found: Measurements, tokens: int) -> Iterable[str]:
    fitted = costs.fit(found)
    first = found.blocks[0]
    adapters = first.adapter_parameters / first.blocks
    none: dict[str, Any] = {"tokens": tokens, "blocks": 0, "adapter_parameters": 0}
    one = {**none, "blocks": 1, "adapter_parameters": adapters}
    spread = max(point.spread for point in found.blocks)
    forward = [float(fitted.forward_s(**load)) for load in (none, one)]
    backward = [float(fitted.backward_s(**load)) for load in (none, one)]
    yield _row(
        "each block",
        seconds(forward[1] - forward[0]),
        seconds(backward[1] - backward[0]),
        percent(spread),
    )
    yield _row("beside them", seconds(forward[0]), seconds(backward[0]), "")
    if found.head:
        spread = max(point.spread for point in found.head)
        yield _row("head", seconds(float(fitted.head_s(tokens=tokens))), "with it", percent(spread))
    if found.optimizer:
        step = float(fitted.optimizer_s(adapter_parameters=adapters))
        yield _row("step, 1 block", seconds(step), "", "")


def _row(name: str, *cells: str) -> str:
    return f"  {name:<14}" + "".join(f"{cell:>12}" for cell in cells)


def _memory(found: Found) -> str:
    usable = (
        "no sensor says what it may use"
        if found.memory_bytes is None
        else f"{size(found.memory_bytes)} may be used"
    )
    if found.measured is None:
        return usable
    measured = found.measured
    tokens = measured.micro_batch * measured.length
    base, per_block = costs.fit(measured.measurements).memory_line(tokens=tokens)
    line = f"{size(float(base))} + {size(float(per_block))} per block"
    return f"{line} at micro-batch {measured.micro_batch} x {measured.length} tokens; {usable}"


def _link(link: LinkMeasurement) -> str:
    return (
        f"up {rate(link.uplink_bytes_per_s)}, down {rate(link.downlink_bytes_per_s)}, "
        f"round trip {seconds(link.round_trip_s)}"
    )


# --- numbers --------------------------------------------------------------------------------------


def size(value: float) -> str:
    """Return bytes as ``512 MiB`` or ``7.62 GiB``."""
    return f"{_digits(value / 2**30)} GiB" if value >= 2**30 else f"{_digits(value / 2**20)} MiB"


def seconds(value: float) -> str:
    """Return seconds as ``1.25 s`` or ``3.1 ms``."""
    return f"{_digits(value)} s" if value >= 1 else f"{_digits(value * 1e3)} ms"


def rate(bytes_per_s: float) -> str:
    """Return a rate as ``2.5 MB/s (20 Mbit/s)``."""
    if bytes_per_s >= FASTEST_BYTES_PER_S:
        return f"{_digits(FASTEST_BYTES_PER_S / 1e6)} MB/s or more"
    return f"{_digits(bytes_per_s / 1e6)} MB/s ({_digits(bytes_per_s * 8e-6)} Mbit/s)"


def _digits(value: float) -> str:
    """Return a number with three digits, or with all those before its point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share as ``12 %``."""
    return f"{share * 100:.0f} %"
