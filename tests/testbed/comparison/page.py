"""``python -m tests.testbed.comparison.page RESULTS.json``: a comparison as one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from coordinator.report import drawing, page
from coordinator.report.wording import bytes_, number
from shared.atomic import replace_file
from shared.program import exit_code
from tests.testbed.comparison import caveats, curves, settings, tables
from tests.testbed.comparison.outcomes import (
    BYTES,
    PERPLEXITY,
    SECONDS,
    SUBJECT,
    common_target,
    methods,
)
from tests.testbed.comparison.results import Comparison

REPORT_FILE = "report.html"


def write(comparison: Comparison, to: Path) -> None:
    """Write the page.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    replace_file(to, render(comparison).encode(), durable=False)


def render(comparison: Comparison) -> str:
    """Return the page as HTML."""
    target = target_of(comparison)
    with drawing.style():
        sections = [
            tables.result(comparison, target),
            *curves.sections(comparison),
            tables.ablations(comparison, target, curves.ablations(comparison)),
            curves.devices(comparison),
            settings.section(comparison),
            caveats.section(comparison, target),
        ]
    return page.render(
        "Methods side by side",
        [section for section in sections if section.charts or section.tables or section.points],
        subtitle=settings.in_short(comparison),
        headline=_headline(comparison, target),
        made_from="the results file of the comparison, which has every figure",
    )


def target_of(comparison: Comparison) -> float:
    """Return the perplexity to which times and bytes are told: stated, or what all reached."""
    stated = comparison.settings.get("target_perplexity")
    if isinstance(stated, (int, float)):
        return float(stated)
    return common_target(methods(comparison, "strategy"))


def _headline(comparison: Comparison, target: float) -> list[tuple[str, str]]:
    """Return the figures that stand first, each with its name."""
    found = methods(comparison, "strategy")
    runs = [run for method in found for run in method.runs]
    subject = next((method for method in found if method.name == SUBJECT), None)
    figures = [
        ("seeds of each", str(max((len(method.runs) for method in found), default=0))),
        ("devices", str(len({device for run in runs for device in run.split_layers}))),
        ("steps", number(max((p.step for run in runs for p in run.points), default=None))),
        ("common target", f"perplexity {tables.perplexity(target)}"),
    ]
    if subject is not None:
        time = subject.until(target, SECONDS)
        sent = subject.until(target, BYTES)
        figures += [
            (f"{SUBJECT} at the end", tables.perplexity(subject.final(PERPLEXITY).mean)),
            (f"{SUBJECT} to the target", tables.seconds(time.mean)),
            ("over the network until then", bytes_(sent.mean)),
        ]
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Read results, write the page, say where."""
    parser = argparse.ArgumentParser(description="Draw a comparison of methods as one page.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("--to", type=Path, help=f"default: {REPORT_FILE} beside the results")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _write(arguments.results, arguments.to))


def _write(results: Path, to: Path | None) -> int:
    to = to or results.with_name(REPORT_FILE)
    write(Comparison.load(results), to)
    print(to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
