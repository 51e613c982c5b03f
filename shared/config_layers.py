"""Where settings come from: a YAML file, the environment, flags. Each knows what it set where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from shared.config_errors import KeyPath, dotted, unknown_key
from shared.errors import ConfigError

PREFIX = "HSPLIT_"
NOT_SETTINGS = frozenset({"HSPLIT_REQUIRE_BROKER", "HSPLIT_REQUIRE_INDEX"})
"""Variables with our prefix that speak to the test suite, which starts real programs."""

_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What PyYAML raises: also for a day that does not exist, `!!int ''`, or very deep nesting."""

Values: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Flag:
    """One command-line flag: its spelling, the key it sets (``broker.url``), its value."""

    name: str
    key: str
    value: object | None


@dataclass(frozen=True, slots=True)
class Layer:
    """The values of one source, and for the keys it names where exactly they were set."""

    values: Values
    origins: Mapping[KeyPath, str]

    def origin(self, path: KeyPath) -> str | None:
        """Return where ``path`` was set; None where this source says nothing about it."""
        inside: object = self.values
        for key in path:
            if not isinstance(inside, Mapping) or key not in inside:
                return None
            inside = inside[key]
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return None


def merged(layers: Sequence[Layer]) -> Values:
    """Return all layers in one, a later one winning key by key."""
    result: Values = {}
    for layer in layers:
        result = _laid_over(result, layer.values)
    return result


def _laid_over(low: Values, high: Values) -> Values:
    result = dict(low)
    for key, value in high.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = _laid_over(below or {}, value) if both else value
    return result


def from_flags(flags: Sequence[Flag]) -> Layer:
    """Return the layer of the flags that were given."""
    values: Values = {}
    origins: dict[KeyPath, str] = {}
    for flag in flags:
        if flag.value is None:
            continue
        path = tuple(flag.key.split("."))
        inside = values
        for key in path[:-1]:
            inside = inside.setdefault(key, {})
        inside[path[-1]] = flag.value
        origins[path] = flag.name
    return Layer(values, origins)


def from_environment(settings: type[BaseSettings], environment: Mapping[str, str]) -> Layer:
    """Return the layer of the ``HSPLIT_*`` variables.

    Raises:
        ConfigError: a variable belongs to no setting, or holds damaged JSON.
    """
    source = EnvSettingsSource(settings)
    # The source reads os.environ when it is made; here the caller says what the environment is.
    source.env_vars = {name.lower(): value for name, value in environment.items() if value}
    try:
        values = source()
    except SettingsError as error:
        raise ConfigError(f"environment: {error} ({error.__cause__})") from error
    origins = {_path_of(name): name for name in environment if _is_ours(name)}
    unknown = [unknown_key(settings, path, origins[path]) for path in sorted(origins)]
    problems = [problem for problem in unknown if problem is not None]
    if problems:
        raise ConfigError("\n".join(problems))
    return Layer(values, origins)


def _is_ours(name: str) -> bool:
    return name.upper().startswith(PREFIX) and name.upper() not in NOT_SETTINGS


def _path_of(variable: str) -> KeyPath:
    return tuple(variable[len(PREFIX) :].lower().split("__"))


def from_file(path: Path) -> Layer:
    """Return the layer of one YAML file.

    Raises:
        ConfigError: the file cannot be read, is no YAML mapping, has a key twice, or one
            that YAML does not read as text.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        origins = dict(_origins(node, str(path), ()))
        values = loader.construct_document(node) if node is not None else {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} cannot be read: {error}") from error
    except _NOT_YAML as error:
        raise ConfigError(f"settings file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"settings file {path} should hold 'key: value' lines")
    return Layer(values, origins)


def _origins(node: yaml.Node | None, file: str, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yield each key of a mapping, at any depth, with its file and line."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        place = f"{file}, line {key.start_mark.line + 1}"
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{place}: YAML reads this key as no text; put quotes around it")
        inner = (*path, key.value)
        if key.value in seen:
            raise ConfigError(f"{place}: {dotted(inner)} is set twice in this file; remove one")
        seen.add(key.value)
        yield inner, place
        yield from _origins(value, file, inner)
