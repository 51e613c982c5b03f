"""Where benchmarks leave their figures: ``build/bench/<name>.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.testbed.system import ROOT


def write_report(name: str, found: Mapping[str, Any]) -> None:
    """Write the figures of one benchmark, and say where they are."""
    target = ROOT / "build" / "bench" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {target.relative_to(ROOT)}")
