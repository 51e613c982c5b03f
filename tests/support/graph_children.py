"""Graphs that no model has, and children that export them.

``python -m tests.support.graph_children FOLDER`` reads its spec and writes its folder as the real
one does, in less than a second; what becomes of it says the environment variable `BEHAVIOUR`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from coordinator.graphs import stored
from coordinator.graphs.exporting import SPEC
from coordinator.graphs.spec import GraphSpec
from shared.errors import ModelError
from shared.graphs import graph_names
from shared.terms import LoraTerms, TrainingChoices

MODULE = "tests.support.graph_children"
BEHAVIOUR = "HSPLIT_TEST_EXPORT"
"""``well``, ``crashes``, ``refuses``, ``is_killed``, ``is_stuck``, or ``waits_for:<file>``."""
WAIT_S = 60.0
"""Far more than a child takes on a machine that is busy."""


def spec(family: str = "gpt2", *, labels: str = "device") -> GraphSpec:
    """Return what the graphs of a tiny model depend on."""
    from tests.support.tiny_models import CONFIGS  # imports torch, which children do without

    training = TrainingChoices(labels=labels)  # type: ignore[arg-type]
    return GraphSpec(
        config_json=json.dumps(CONFIGS[family]), training=training, lora=LoraTerms(r=2)
    )


def contents(made_for: GraphSpec) -> Mapping[str, bytes]:
    """Return bytes by the names of all graphs, other ones for each name and each process."""
    config = json.loads(made_for.config_json)
    names = graph_names(
        config,
        blocks=range(made_for.architecture().block_count),
        head_on_device=made_for.training.labels == "device",
    )
    return {name: f"{name} of process {os.getpid()}\n".encode() * 50 for name in names}


def main() -> None:
    """Do as told."""
    asked = SPEC.validate_json(sys.stdin.buffer.read())
    what, _, file = os.environ[BEHAVIOUR].partition(":")
    sys.stderr.write("a library warns of something\n")
    if what == "crashes":
        raise RuntimeError("the tracer is broken")
    if what == "refuses":
        sys.stderr.write("block 0 of this model cannot be exported\n")
        sys.exit(ModelError.exit_code)
    if what == "is_killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "is_stuck":
        time.sleep(600)
    while what == "waits_for" and not Path(file).exists():
        time.sleep(0.01)
    stored.save(Path(sys.argv[1]), contents(asked))


if __name__ == "__main__":
    main()
