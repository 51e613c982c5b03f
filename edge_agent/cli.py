"""``hsplit-agent``: lend this device to a run, and ask whether it is well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from edge_agent import emulation, profile_command, profile_report, program
from edge_agent.settings import AgentSettings, ProfileSettings, default_state_folder
from shared import health, logs, version
from shared.clock import SystemClock
from shared.config_layers import Flag
from shared.program import exit_code

_Flags: TypeAlias = Mapping[str, tuple[str, str, str]]
"""Flag → the key that it sets, what its value is called, and what it means."""

_SETTINGS: _Flags = {
    "--broker": ("broker.url", "URL", "where the broker is: mqtt://host:1883 or mqtts://host:8883"),
    "--username": ("broker.username", "NAME", "user at the broker"),
    "--password-file": ("broker.password_file", "FILE", "holds the password (or set the variable)"),
    "--ca-file": ("broker.ca_file", "FILE", "certificate authority of the broker"),
    "--cert-file": ("broker.cert_file", "FILE", "this device's certificate, for the broker"),
    "--key-file": ("broker.key_file", "FILE", "the key that belongs to --cert-file"),
    "--device-id": ("device_id", "ID", "this device's name, its own at the coordinator"),
    "--data": ("data", "FILE", "JSON lines: text (and label), prompt and completion, or messages"),
    "--evaluation-data": ("evaluation_data", "FILE", "held-out text (default: a share of --data)"),
    "--evaluation-fraction": ("evaluation_fraction", "SHARE", "share of --data that is held out"),
    "--cache-folder": ("cache_folder", "FOLDER", "keeps the base model's weights"),
    "--cache-limit": ("cache_limit", "SIZE", "weights used longest ago go beyond it: 20GB"),
    "--state-folder": ("state_folder", "FOLDER", "keeps this agent's own state"),
    "--memory-limit": ("memory_limit", "SIZE", "what training may use, such as 2GiB"),
    "--backend": ("backend", "NAME", "torch, onnx, or auto: torch where it is installed"),
    "--device": ("device", "DEVICE", "cpu, cuda, cuda:1, tensorrt (onnx) or auto: the GPU, if any"),
    "--threads": ("threads", "N", "CPU threads that training may use"),
    "--emulate": ("emulate", "SPEC", f"play a smaller device: {emulation.EXAMPLE}"),
    "--log-level": ("log_level", "LEVEL", "debug, info, warning or error"),
    "--log-format": ("log_format", "FORMAT", "text or json"),
}
_OF_RUN_ALONE = ("--data", "--evaluation-data", "--evaluation-fraction", "--cache-limit")
_PROFILE_SETTINGS: _Flags = {
    **{flag: one for flag, one in _SETTINGS.items() if flag not in _OF_RUN_ALONE},
    "--model": ("model", "MODEL", "a Hugging Face model: its folder, or its name on the hub"),
    "--graphs": ("graphs", "FOLDER", "of hsplit-coordinator graphs MODEL, for backend onnx"),
    "--labels": ("labels", "SIDE", "device (the head is here, the default) or server"),
    "--dtype": ("dtype", "DTYPE", "of the frozen base: float32 (the default), bfloat16, float16"),
    "--micro-batch": ("micro_batch", "N", "sequences in a micro-batch"),
    "--length": ("length", "N", "tokens in a sequence"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, carry out the command, return the exit code."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: int(arguments.command(arguments) or 0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hsplit-agent",
        description="Train on this device's own text, which never leaves it.",
        epilog="Every setting may also stand in --config or in a HSPLIT_… variable, such as "
        "HSPLIT_BROKER__PASSWORD. Exit codes are listed in the README.",
    )
    parser.add_argument("--version", action="version", version=f"hsplit {version.VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="take part in the runs of a coordinator")
    _add_settings(run, _SETTINGS)
    run.add_argument(
        "--share-labels",
        action="store_const",
        const="true",
        help="agree that a run with labels: server gets this text's tokens",
    )
    run.set_defaults(command=_run)
    profile = commands.add_parser("profile", help="measure this device: compute, memory, link")
    _add_settings(profile, _PROFILE_SETTINGS)
    profile.add_argument("--fresh", action="store_true", help="measure what was measured before")
    profile.add_argument("--json", action="store_true", help="print JSON instead of a table")
    profile.add_argument(
        "--output", type=Path, metavar="FILE", help="write a profile for hsplit-coordinator plan"
    )
    profile.set_defaults(command=_profile)
    well = commands.add_parser("health", help="exit 0 if the agent makes progress, else 20")
    which = well.add_mutually_exclusive_group(required=True)
    which.add_argument("--state", type=Path, metavar="FOLDER", help="the agent's state folder")
    which.add_argument("--device-id", metavar="ID", help="for an agent without --state-folder")
    well.add_argument("--max-age-s", type=float, default=300.0)
    well.set_defaults(command=_health)
    return parser


def _add_settings(command: argparse.ArgumentParser, settings: _Flags) -> None:
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with these settings"
    )
    for flag, (_, value, explanation) in settings.items():
        command.add_argument(flag, metavar=value, help=explanation)


def _given(arguments: argparse.Namespace, settings: _Flags) -> list[Flag]:
    return [
        Flag(flag, key, getattr(arguments, flag[2:].replace("-", "_")))
        for flag, (key, _, _) in settings.items()
    ]


def _run(arguments: argparse.Namespace) -> int:
    flags = _given(arguments, _SETTINGS)
    flags.append(Flag("--share-labels", "share_labels", arguments.share_labels))
    settings = AgentSettings.load(file=arguments.config, flags=flags)
    logs.set_up(settings.log_level, settings.log_format)
    return program.run(settings, SystemClock())


def _profile(arguments: argparse.Namespace) -> None:
    settings = ProfileSettings.load(
        file=arguments.config, flags=_given(arguments, _PROFILE_SETTINGS)
    )
    logs.set_up(settings.log_level, settings.log_format)
    found = profile_command.run(
        settings, SystemClock(), fresh=arguments.fresh, output=arguments.output
    )
    print(profile_report.as_json(found) if arguments.json else profile_report.as_table(found))


def _health(arguments: argparse.Namespace) -> None:
    state = arguments.state or default_state_folder(arguments.device_id)
    found = health.check(
        state / health.FILE_NAME, max_age_s=arguments.max_age_s, clock=SystemClock()
    )
    print(f"{found.phase}: well")


if __name__ == "__main__":
    sys.exit(main())
