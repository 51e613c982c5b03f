"""``hsplit-coordinator``: run a fine-tuning, show it, export its result, ask whether it lives."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from coordinator.evaluation import choices
from shared import health, logs, version
from shared.clock import SystemClock
from shared.config_layers import Flag
from shared.errors import ConfigError
from shared.program import exit_code

logger = logging.getLogger("coordinator")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, carry out the command, return the exit code."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _carried_out(arguments))


def _carried_out(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.command(arguments) or 0)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("coordinator", "shared"):
            raise  # ours: not a matter of what is installed
        raise ConfigError(
            f"this command needs {package}, which is not installed here, as where only an agent "
            "is: pip install 'hsplit[coordinator]'"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hsplit-coordinator",
        description="Fine-tune a language model on text that stays on the devices which own it.",
        epilog="Exit codes are listed in the README.",
    )
    parser.add_argument("--version", action="version", version=f"hsplit {version.VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="carry out the run that a YAML file describes"))
    _add_plan(commands.add_parser("plan", help="what a run would do with measured devices"))
    _add_demo(commands.add_parser("demo", help="the whole system on this machine: 3 agents"))
    _add_graphs(
        commands.add_parser("graphs", help="write what a device without torch computes with")
    )
    _add_export(commands.add_parser("export", help="write a run's adapter, or the merged model"))
    _add_evaluate(commands.add_parser("evaluate", help="perplexity and NLG metrics of an adapter"))
    _add_report(commands.add_parser("report", help="write a run's curves and plans as one page"))
    _add_enroll(commands.add_parser("enroll", help="make a device's password and certificate"))
    _add_shard(commands.add_parser("shard", help="split a data set over devices, reproducibly"))
    _add_status(commands.add_parser("status", help="who took part in a run, and what counted"))
    _add_health(commands.add_parser("health", help="exit 0 if the run makes progress, else 20"))
    return parser


def _add_logging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--log-format", choices=["text", "json"])


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="RUN.YAML", help="the run's settings")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--run-id", help="name of the run and of its folder (run.id)")
    parser.add_argument("--model", help="base model: a hub name or a folder (model.name)")
    parser.add_argument("--strategy", help="the method, such as splitlora (strategy)")
    parser.add_argument("--broker", metavar="URL", help="mqtt://… or mqtts://… (broker.url)")
    _add_logging(parser)
    parser.set_defaults(command=_run)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="RUN.YAML", help="the run's settings")
    parser.add_argument(
        "profiles", nargs="+", type=Path, metavar="PROFILE.JSON", help="of hsplit-agent profile"
    )
    server = parser.add_mutually_exclusive_group()
    server.add_argument(
        "--server-profile", type=Path, metavar="FILE", help="what this machine measured before"
    )
    server.add_argument(
        "--measure-server", action="store_true", help="measure this machine now (the default)"
    )
    parser.add_argument("--json", action="store_true", help="print it for programs")
    _add_logging(parser)
    parser.set_defaults(command=_plan)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="where the run's folder goes"
    )
    parser.add_argument("--labels", choices=["device", "server"], default="device")
    parser.add_argument("--rounds", type=_at_least_one, help="how many rounds (default: 4)")
    parser.add_argument("--strategy", default="hsplitlora", help="the method, such as splitlora")
    _add_logging(parser)
    parser.set_defaults(command=_demo)


def _at_least_one(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, help="a run's folder, such as runs/my-run")
    parser.add_argument("--to", type=Path, default=None, help="target folder")
    parser.add_argument("--merged", action="store_true", help="the full model with its update")
    parser.set_defaults(command=_export)


def _add_graphs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="base model: a hub name or a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="target folder")
    parser.add_argument(
        "--labels", choices=["device", "server"], default="device", help="server: without a head"
    )
    parser.add_argument(
        "--target-modules", metavar="NAME,...", help="as in a run's lora.target_modules"
    )
    _add_logging(parser)
    parser.set_defaults(command=_graphs)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    choices.add_flags(parser)
    _add_logging(parser)
    parser.set_defaults(command=_evaluate)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="such as runs/my-run")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: RUN_FOLDER/report.html")
    parser.set_defaults(command=_report)


def _add_shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA.JSONL", help="one JSON object a line")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a fresh folder")
    parser.add_argument(
        "--devices", required=True, metavar="N|NAME,...", help="how many, or their names"
    )
    parser.add_argument(
        "--by",
        choices=["iid", "label", "size"],
        required=True,
        help="equal parts, unequal mixtures of classes, or unequal sizes",
    )
    parser.add_argument("--column", metavar="NAME", help="where the class is (by label: label)")
    parser.add_argument(
        "--alpha", type=float, help="of Dirichlet: small is uneven, large is even (0.5)"
    )
    parser.add_argument(
        "--sizes", type=_proportions, metavar="X,X,...", help="by size: proportions, not drawn"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another split (0)")
    parser.add_argument("--min-records", type=int, default=1, help="the least of a device (1)")
    parser.set_defaults(command=_shard)


def _add_enroll(parser: argparse.ArgumentParser) -> None:
    who = parser.add_mutually_exclusive_group()
    who.add_argument("device", nargs="?", metavar="DEVICE", help="the device's id")
    who.add_argument("--coordinator", action="store_true", help="for the coordinator itself")
    parser.add_argument(
        "--folder", type=Path, default=Path("credentials"), help="keeps all of it (credentials)"
    )
    parser.add_argument(
        "--broker-host", metavar="NAME", help="how devices reach the broker; needed at first"
    )
    parser.add_argument(
        "--days", type=_at_least_one, default=365, help="how long the certificate is good (365)"
    )
    parser.add_argument("--renew", action="store_true", help="make anew what there is already")
    parser.set_defaults(command=_enroll)


def _proportions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 5,3,1") from None


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="such as runs/my-run")
    parser.add_argument("--json", action="store_true", help="print it for programs")
    parser.set_defaults(command=_status)


def _add_health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--max-age-s", type=float, default=120.0)
    parser.set_defaults(command=_health)


def _run(arguments: argparse.Namespace) -> None:
    # Inside: torch takes seconds to import, and `health` runs every few seconds.
    from coordinator import program  # noqa: PLC0415
    from coordinator.settings import CoordinatorSettings  # noqa: PLC0415

    flags = [
        Flag("--run-id", "run.id", arguments.run_id),
        Flag("--model", "model.name", arguments.model),
        Flag("--strategy", "strategy", arguments.strategy),
        Flag("--broker", "broker.url", arguments.broker),
        Flag("--log-level", "log_level", arguments.log_level),
        Flag("--log-format", "log_format", arguments.log_format),
    ]
    settings = CoordinatorSettings.load(file=arguments.file, flags=flags)
    logs.set_up(settings.log_level, settings.log_format)
    program.run(settings, SystemClock(), resume=arguments.resume)


def _plan(arguments: argparse.Namespace) -> None:
    from coordinator import dry_plan  # noqa: PLC0415
    from coordinator.planning import plan_report  # noqa: PLC0415
    from coordinator.settings import CoordinatorSettings  # noqa: PLC0415

    logs.set_up(arguments.log_level or "warning", arguments.log_format or "text")
    settings = CoordinatorSettings.load(file=arguments.file, flags=[])
    found = dry_plan.plan(
        settings,
        arguments.profiles,
        server_profile=arguments.server_profile,
        clock=SystemClock(),
    )
    data = json.dumps(plan_report.as_data(found), indent=2)
    print(data if arguments.json else plan_report.as_table(found))


def _demo(arguments: argparse.Namespace) -> None:
    from coordinator.demo import run  # noqa: PLC0415

    logs.set_up(arguments.log_level or "info", arguments.log_format or "text")
    wanted = run.Wanted(
        labels=arguments.labels, rounds=arguments.rounds, strategy=arguments.strategy
    )
    run.demo(arguments.folder, SystemClock(), wanted)


def _graphs(arguments: argparse.Namespace) -> None:
    from coordinator.graphs import command  # noqa: PLC0415 - as in `_run`

    logs.set_up(arguments.log_level or "info", arguments.log_format or "text")
    targets = (arguments.target_modules or "").split(",")
    wanted = command.Wanted(
        model=arguments.model,
        labels=arguments.labels,
        target_modules=tuple(name.strip() for name in targets if name.strip()),
    )
    print(command.write(wanted, arguments.out, SystemClock()))


def _export(arguments: argparse.Namespace) -> None:
    from coordinator import program  # noqa: PLC0415

    logs.set_up("warning")
    print(program.export(arguments.run_folder, arguments.to, merged=arguments.merged))


def _evaluate(arguments: argparse.Namespace) -> None:
    from coordinator import json_lines  # noqa: PLC0415 - as in `_run`
    from coordinator.evaluation import program, report  # noqa: PLC0415

    logs.set_up(arguments.log_level or "warning", arguments.log_format or "text")
    outcome = program.evaluate(choices.wanted(arguments), SystemClock())
    data = json.dumps(json_lines.jsonable(report.as_data(outcome)), indent=2)
    print(data if arguments.json else report.as_table(outcome))


def _report(arguments: argparse.Namespace) -> None:
    from coordinator import report_page  # noqa: PLC0415 - as in `_run`: it imports numpy

    logs.set_up("warning")
    print(report_page.write(arguments.run_folder, arguments.to))


def _shard(arguments: argparse.Namespace) -> None:
    from coordinator import shard_files, sharding  # noqa: PLC0415 - as in `_report`

    logs.set_up("warning")
    rule = sharding.Rule(
        devices=shard_files.device_names(arguments.devices),
        by=arguments.by,
        alpha=arguments.alpha,
        sizes=arguments.sizes,
        seed=arguments.seed,
        min_records=arguments.min_records,
    )
    shards = shard_files.shard(arguments.data, arguments.to, rule=rule, column=arguments.column)
    print(shard_files.as_table(shards))


def _enroll(arguments: argparse.Namespace) -> None:
    from coordinator.enrolment import folder, instructions  # noqa: PLC0415 - as in `_report`

    logs.set_up("warning")
    user = None if arguments.device is None else folder.device_name(arguments.device)
    wanted = folder.Wanted(
        user=folder.COORDINATOR if arguments.coordinator else user,
        folder=arguments.folder,
        host=arguments.broker_host,
        days=arguments.days,
        renew=arguments.renew,
    )
    print(instructions.lines(folder.enroll(wanted, SystemClock())))


def _status(arguments: argparse.Namespace) -> None:
    from coordinator.state import status  # noqa: PLC0415 - as in `_report`

    logs.set_up("warning")
    found = status.read(arguments.run_folder, SystemClock())
    print(json.dumps(found, indent=2) if arguments.json else status.as_table(found))


def _health(arguments: argparse.Namespace) -> None:
    found = health.check(
        arguments.run_folder / health.FILE_NAME,
        max_age_s=arguments.max_age_s,
        clock=SystemClock(),
    )
    print(f"{found.phase}: well")


if __name__ == "__main__":
    sys.exit(main())
