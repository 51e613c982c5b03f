"""Nothing in the three packages unpickles or evaluates what comes from outside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for name in ("shared", "edge_agent", "coordinator") for path in (ROOT / name).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
YAML = {"load", "load_all", "full_load", "unsafe_load", "unsafe_load_all", "full_load_all"}
LOADERS = {"Loader", "UnsafeLoader", "FullLoader", "CLoader", "CUnsafeLoader", "CFullLoader"}


def offences(source: str) -> list[str]:
    """Return what a source does that may run foreign code."""
    return [said for node in ast.walk(ast.parse(source)) for said in _offence(node)]


def _offence(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [one.name for one in node.names if one.name.split(".")[0] in MODULES]
    if isinstance(node, ast.ImportFrom):
        root = (node.module or "").split(".")[0]
        named = {one.name for one in node.names}
        bad = MODULES & {root}
        bad |= named & (YAML | LOADERS) if root == "yaml" else set()
        # Only `torch.load` itself is looked at below, so it may not go by another name.
        bad |= named & {"load"} if root in {"torch", "numpy"} else set()
        return sorted(bad)
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        return [f"yaml.{node.attr}"] if owner == "yaml" and node.attr in YAML | LOADERS else []
    return _call(node) if isinstance(node, ast.Call) else []


def _call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {one.arg: ast.unparse(one.value) for one in node.keywords}
    if name in CALLS or name in {f"builtins.{call}" for call in CALLS}:
        return [name]
    if name == "torch.load" and given.get("weights_only") != "True":
        return [name]
    if given.get("allow_pickle", "False") != "False":
        return [f"{name}(allow_pickle)"]
    if given.get("weights_only", "True") != "True":
        return [f"{name}(weights_only)"]
    if given.get("trust_remote_code", "False") != "False":
        return [f"{name}(trust_remote_code)"]
    return [name] if name.endswith(("read_pickle", "torch.hub.load")) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_evaluates(path):
    assert offences(path.read_text(encoding="utf-8")) == []


def test_all_three_packages_were_looked_at():
    assert len(FILES) > 150


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import marshal",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load",
        "from numpy import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.UnsafeLoader(text)",
        "from yaml import unsafe_load",
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_is_forbidden_is_seen(source):
    assert offences(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "yaml.safe_load(text)",
        "yaml.SafeLoader(text)",
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "re.compile(pattern)",
        "np.load(path, allow_pickle=False)",
    ],
)
def test_what_is_harmless_is_not(source):
    assert offences(source) == []
