"""The light agent's environment: a venv with this tree's wheel and `hsplit[onnx]`, nothing else.

It lies under ``build/light`` and is made once: anew when ``pyproject.toml``, ``constraints.txt``
or Python change, with a new wheel when the packages do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.package_index import pip, require_index

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "light"
VENV = FOLDER / "venv"
MADE = FOLDER / "made.json"
PACKAGES = ("edge_agent", "coordinator", "shared")
EXTRA = "onnx"


def light_environment() -> Path:
    """Return the folder of the environment's programs (``python``, ``hsplit-agent``).

    Where pip reaches no index, the test that asks is skipped (`require_index`).
    """
    if not _is_as_it_should_be():
        require_index()
    return make()


def make() -> Path:
    """Return the same for callers that are no tests.

    Raises:
        RuntimeError: it cannot be made; pip's words are in it.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with _alone():
        started = time.monotonic()
        code, dependencies = _code(), _dependencies()
        was = _made()
        if was.get("code") == code and was.get("dependencies") == dependencies:
            return VENV / "bin"
        MADE.unlink(missing_ok=True)  # whoever is interrupted here leaves nothing that is believed
        if was.get("dependencies") != dependencies:
            shutil.rmtree(VENV, ignore_errors=True)
            _make_venv()
            _install(_wheel(), extra=f"[{EXTRA}]")
        else:
            _install(_wheel(), "--no-deps", "--force-reinstall")
        made = {
            "code": code,
            "dependencies": dependencies,
            "installed_bytes": installed_bytes(),
            "seconds": round(time.monotonic() - started, 1),
        }
        MADE.write_text(json.dumps(made, indent=1) + "\n")
    return VENV / "bin"


def installed_bytes() -> int:
    """Return what all of its files take, compiled modules included."""
    return sum(
        path.stat().st_size for path in VENV.rglob("*") if path.is_file() and not path.is_symlink()
    )


def _is_as_it_should_be() -> bool:
    was = _made()
    return was.get("dependencies") == _dependencies() and was.get("code") == _code()


def _made() -> dict[str, object]:
    try:
        return dict(json.loads(MADE.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _dependencies() -> str:
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    return _digest(sys.version.encode(), *(path.read_bytes() for path in files))


def _code() -> str:
    paths = sorted(
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    return _digest(*(str(path).encode() + b"\0" + path.read_bytes() for path in paths))


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in contents)).hexdigest()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other processes out: tests run in several at once."""
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_venv() -> None:
    # Without pip, which no agent needs: it counts in the size.
    command = [sys.executable, "-m", "venv", "--without-pip", str(VENV)]
    subprocess.run(command, check=True, timeout=120)


def _wheel() -> Path:
    folder = FOLDER / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    _succeed("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("hsplit-*.whl")
    return wheel


def _install(wheel: Path, *options: str, extra: str = "") -> None:
    constraints = str(ROOT / "constraints.txt")
    _succeed(
        "--python", str(VENV / "bin" / "python"), "install", "--constraint", constraints, *options,
        f"hsplit{extra} @ {wheel.as_uri()}",
    )  # fmt: skip


def _succeed(*arguments: str) -> None:
    done = pip(*arguments)
    if done.returncode != 0:
        raise RuntimeError(f"pip {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
