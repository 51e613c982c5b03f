"""`make check-arm64`: all that a light agent needs has wheels for a Jetson with JetPack 6.

That is aarch64, Ubuntu 22.04 (glibc 2.35) and Python 3.10. pip resolves for another platform, but
evaluates environment markers (``python_version < "3.11"``) for its own; so constraints and
dependencies are evaluated here, and pip is asked again until nothing is missing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.package_index import index_answers, pip

ROOT = Path(__file__).parents[2]
EXTRAS = ("onnx", "nvidia")
JETPACK_6 = {
    "implementation_name": "cpython",
    "implementation_version": "3.10.12",
    "os_name": "posix",
    "platform_machine": "aarch64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.10.12",
    "python_version": "3.10",
    "sys_platform": "linux",
}
GLIBC_MINORS = range(17, 36)
PLATFORMS = (
    *(f"manylinux_2_{minor}_aarch64" for minor in reversed(GLIBC_MINORS)),
    "manylinux2014_aarch64",
)
ABIS = ("cp310", "abi3", "none")


def main() -> int:
    """Print the wheels of a light agent on a Jetson; 1 and pip's words where one is missing."""
    if not index_answers():
        print("NOTE: pip reaches no package index, so the wheels for aarch64 were not looked up")
        return 0
    try:
        wheels = resolve(requirements(EXTRAS))
    except LookupError as error:
        print(error)
        return 1
    for name, wheel in sorted(wheels.items()):
        print(f"{name:<20}{wheel}")
    print(f"{len(wheels)} packages, each with a wheel for Python 3.10 on aarch64 with glibc 2.35")
    return 0


def requirements(extras: Iterable[str]) -> list[Requirement]:
    """Return what ``hsplit[extras]`` requires on the Jetson, its own extras followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[Requirement] = []
    waiting = list(project["dependencies"])
    for extra in extras:
        waiting += project["optional-dependencies"][extra]
    while waiting:
        one = Requirement(waiting.pop())
        if one.name == project["name"]:
            for extra in one.extras:
                waiting += project["optional-dependencies"][extra]
        elif applies(one):
            found.append(one)
    return found


def resolve(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Return the file name of the wheel of every package needed, by name.

    Raises:
        LookupError: pip finds no set of wheels for this platform.
    """
    asked = list(wanted)
    while True:
        reported = _ask_pip(asked)
        needed = closure(asked, reported)
        unmet = [one for one in needed if not is_met(one, reported)]
        if not unmet:
            names = {canonicalize_name(one.name) for one in needed}
            return {name: _file_name(reported[name]) for name in names}
        asked += unmet


def closure(
    wanted: Iterable[Requirement], reported: Mapping[str, Mapping[str, Any]]
) -> list[Requirement]:
    """Return what is wanted, and all that it requires on the Jetson as far as it is reported."""
    needed: list[Requirement] = []
    waiting = list(wanted)
    followed: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        needed.append(one)
        name = canonicalize_name(one.name)
        step = (name, frozenset(one.extras))
        if name not in reported or step in followed:
            continue
        followed.add(step)
        requires = map(Requirement, reported[name]["metadata"].get("requires_dist", ()))
        waiting += [other for other in requires if applies(other, one.extras)]
    return needed


def is_met(requirement: Requirement, reported: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether a reported version is one that is required."""
    found = reported.get(canonicalize_name(requirement.name))
    return found is not None and requirement.specifier.contains(
        found["metadata"]["version"], prereleases=True
    )


def applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    """Tell whether its marker holds on the Jetson, with one of these extras or without any."""
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({**JETPACK_6, "extra": extra}) for extra in ("", *extras)
    )


def constraints() -> str:
    """Return the lines of ``constraints.txt`` that hold on the Jetson, without their markers."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return "".join(f"{pin.name}{pin.specifier}\n" for pin in pins if applies(pin))


def _ask_pip(wanted: Iterable[Requirement]) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        report, pinned = Path(folder, "report.json"), Path(folder, "constraints.txt")
        pinned.write_text(constraints())
        done = pip(
            *("install", "--dry-run", "--ignore-installed", "--target", folder),
            *("--report", str(report), "--constraint", str(pinned), "--only-binary", ":all:"),
            *("--python-version", "3.10", "--implementation", "cp"),
            *(word for abi in ABIS for word in ("--abi", abi)),
            *(word for platform in PLATFORMS for word in ("--platform", platform)),
            *(_without_marker(one) for one in wanted),
        )
        if done.returncode != 0:
            raise LookupError(f"no wheels for Python 3.10 on aarch64:\n{done.stdout}{done.stderr}")
        items = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item for item in items}


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _file_name(reported: Mapping[str, Any]) -> str:
    return str(reported["download_info"]["url"]).rsplit("/", maxsplit=1)[-1]


if __name__ == "__main__":
    sys.exit(main())
