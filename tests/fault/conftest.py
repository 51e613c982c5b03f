"""Undisturbed runs, to compare disturbed ones with: each is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.outcomes import Outcome, outcome_of, trio


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Return a function with the arguments of `trio` that gives the outcome without a fault."""
    known: dict[str, Outcome] = {}

    def outcome(**settings: Any) -> Outcome:
        key = repr(sorted(settings.items()))
        if key not in known:
            folder: Path = tmp_path_factory.mktemp("undisturbed")
            sim = trio(folder, **settings)
            sim.run()
            known[key] = outcome_of(sim)
        return known[key]

    return outcome
