"""``hsplit-agent``: lend this device to a run, and ask whether it is well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_agent import program
from edge_agent.settings import AgentSettings, default_state_folder
from shared import health, logs, version
from shared.clock import SystemClock
from shared.config_layers import Flag
from shared.program import exit_code

_SETTINGS = {
    "--broker": ("broker.url", "URL", "where the broker is: mqtt://host:1883 or mqtts://host:8883"),
    "--username": ("broker.username", "NAME", "user at the broker"),
    "--password-file": ("broker.password_file", "FILE", "holds the password (or set the variable)"),
    "--ca-file": ("broker.ca_file", "FILE", "certificate authority of the broker"),
    "--device-id": ("device_id", "ID", "this device's name, its own at the coordinator"),
    "--data": ("data", "FILE", "JSON lines: text, or prompt and completion, or messages"),
    "--evaluation-data": ("evaluation_data", "FILE", "held-out text (default: a share of --data)"),
    "--evaluation-fraction": ("evaluation_fraction", "SHARE", "share of --data that is held out"),
    "--cache-folder": ("cache_folder", "FOLDER", "keeps the base model's weights"),
    "--cache-limit": ("cache_limit", "SIZE", "weights used longest ago go beyond it: 20GB"),
    "--state-folder": ("state_folder", "FOLDER", "keeps this agent's own state"),
    "--memory-limit": ("memory_limit", "SIZE", "what training may use, such as 2GiB"),
    "--device": ("device", "DEVICE", "cpu, cuda, cuda:1, or auto: the GPU where there is one"),
    "--threads": ("threads", "N", "CPU threads that training may use"),
    "--log-level": ("log_level", "LEVEL", "debug, info, warning or error"),
    "--log-format": ("log_format", "FORMAT", "text or json"),
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
    run.add_argument("--config", type=Path, metavar="FILE", help="YAML file with these settings")
    for flag, (_, value, explanation) in _SETTINGS.items():
        run.add_argument(flag, metavar=value, help=explanation)
    run.add_argument(
        "--share-labels",
        action="store_const",
        const="true",
        help="agree that a run with labels: server gets this text's tokens",
    )
    run.set_defaults(command=_run)
    well = commands.add_parser("health", help="exit 0 if the agent makes progress, else 20")
    which = well.add_mutually_exclusive_group(required=True)
    which.add_argument("--state", type=Path, metavar="FOLDER", help="the agent's state folder")
    which.add_argument("--device-id", metavar="ID", help="for an agent without --state-folder")
    well.add_argument("--max-age-s", type=float, default=300.0)
    well.set_defaults(command=_health)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    flags = [
        Flag(flag, key, getattr(arguments, flag[2:].replace("-", "_")))
        for flag, (key, _, _) in _SETTINGS.items()
    ]
    flags.append(Flag("--share-labels", "share_labels", arguments.share_labels))
    settings = AgentSettings.load(file=arguments.config, flags=flags)
    logs.set_up(settings.log_level, settings.log_format)
    return program.run(settings, SystemClock())


def _health(arguments: argparse.Namespace) -> None:
    state = arguments.state or default_state_folder(arguments.device_id)
    found = health.check(
        state / health.FILE_NAME, max_age_s=arguments.max_age_s, clock=SystemClock()
    )
    print(f"{found.phase}: well")


if __name__ == "__main__":
    sys.exit(main())
