"""Everything that a light agent needs has a wheel for a Jetson with JetPack 6."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tests.support.package_index import require_index
from tests.testbed import arm64_wheels

INDEX_AND_A_BUSY_MACHINE_S = 900


@pytest.mark.slow
@pytest.mark.timeout(INDEX_AND_A_BUSY_MACHINE_S)
def test_all_that_a_light_agent_needs_has_a_wheel_for_a_jetson():
    require_index()
    wheels = arm64_wheels.resolve(arm64_wheels.requirements(arm64_wheels.EXTRAS))
    assert {"onnxruntime", "numpy", "tokenizers", "safetensors", "nvidia-ml-py"} <= set(wheels)
    assert {"torch", "transformers", "peft", "onnx", "triton"}.isdisjoint(wheels)
    for wheel in wheels.values():
        assert wheel.endswith(("-none-any.whl", "aarch64.whl")), wheel


@pytest.mark.slow
@pytest.mark.timeout(INDEX_AND_A_BUSY_MACHINE_S)
def test_a_package_without_such_a_wheel_is_named():
    require_index()
    with pytest.raises(LookupError, match="contourpy"):  # it has wheels from Python 3.11 on
        arm64_wheels.resolve([Requirement("contourpy==1.3.3")])


def test_markers_hold_for_the_jetson_and_not_for_this_machine():
    assert arm64_wheels.applies(Requirement('a ; python_version < "3.11"'))
    assert arm64_wheels.applies(Requirement('a ; platform_machine == "aarch64"'))
    assert not arm64_wheels.applies(Requirement('a ; python_version >= "3.11"'))
    assert not arm64_wheels.applies(Requirement('a ; extra == "x"'))
    assert arm64_wheels.applies(Requirement('a ; extra == "x"'), ["x"])
    assert "onnxruntime==1.23.2\n" in arm64_wheels.constraints()


def reported(version: str, *requires: str) -> dict[str, object]:
    return {"metadata": {"version": version, "requires_dist": list(requires)}}


def test_what_only_the_jetson_requires_is_found_missing_or_too_old():
    found = {
        "a": reported("1", 'B_c>=2 ; python_version < "3.11"', 'd ; python_version >= "3.11"'),
        "b-c": reported("1", 'e ; extra == "x"', 'f ; platform_machine == "aarch64"'),
    }
    needed = arm64_wheels.closure([Requirement("a"), Requirement("b-c[x]")], found)
    unmet = {str(one) for one in needed if not arm64_wheels.is_met(one, found)}
    assert {one.split(";")[0].strip() for one in unmet} == {"B_c>=2", "e", "f"}
