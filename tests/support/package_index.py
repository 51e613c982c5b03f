"""Whether pip reaches a package index, for the tests that install or resolve something."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

REQUIRED = "HSPLIT_REQUIRE_INDEX"


def require_index() -> None:
    """Skip the test where pip reaches no index; where the environment demands one, go on.

    What the test then runs into says more than a probe could.
    """
    if os.environ.get(REQUIRED) != "1" and not index_answers():
        pytest.skip("pip reaches no package index")


@functools.cache
def index_answers() -> bool:
    """Tell whether pip, as it is set up here, finds two small packages without asking twice.

    Two, because a folder of wheels on the machine may hold what builds need, and no more.
    """
    done = pip(
        "install", "--dry-run", "--ignore-installed", "--no-deps", "--retries", "0",
        "--timeout", "15", "hatchling", "nvidia-ml-py",
    )  # fmt: skip
    return done.returncode == 0


def pip(*arguments: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run this Python's pip; it says nothing of newer versions of itself, and asks nothing."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
