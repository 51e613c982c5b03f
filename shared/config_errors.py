"""What is wrong with a setting, in words: its key, where it was set, what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shared.errors import ConfigError

KeyPath: TypeAlias = tuple[str, ...]
"""``("broker", "url")`` for the key that people call ``broker.url``."""

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_ANY_KEY = "*"


class Origins(Protocol):
    """One source of settings, as far as an error message needs it."""

    def origin(self, path: KeyPath) -> str | None:
        """Return where ``path`` was set; None where this source says nothing about it."""


def dotted(path: Sequence[object]) -> str:
    """Return the key as people write it."""
    return ".".join(str(part) for part in path)


def explained(
    error: ValidationError, settings: type[BaseModel], layers: Sequence[Origins]
) -> ConfigError:
    """Return the error that says all that pydantic found, one line each.

    Values are not repeated, for one of them may be a password.
    """
    details = error.errors(include_url=False, include_input=False)
    return ConfigError("\n".join(_line(detail, settings, layers) for detail in details))


def unknown_key(settings: type[BaseModel], path: KeyPath, origin: str) -> str | None:
    """Return what to say of a key that does not exist; None if it does."""
    inside: Any = settings
    for depth, key in enumerate(path):
        keys = _keys(inside)
        inside = keys.get(key, keys.get(_ANY_KEY))
        if inside is None:
            return f"{dotted(path)} ({origin}): unknown key; {_advice(settings, path, depth)}"
    return None


def _line(detail: ErrorDetails, settings: type[BaseModel], layers: Sequence[Origins]) -> str:
    path = tuple(str(part) for part in detail["loc"] if part != "[key]")
    origin = _origin(path, layers)
    if detail["type"] in _UNKNOWN:
        advice = _advice(settings, path, len(path) - 1)
        return f"{_named(path, origin)}: unknown key; {advice}"
    if detail["type"] == "missing":
        return _missing(path, settings)
    reason = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{_named(path, origin)}: {reason}" if path else reason


def _missing(path: KeyPath, settings: type[BaseModel]) -> str:
    keys = ", ".join(_keys(_inside(settings, path)))
    variable = "HSPLIT_" + "__".join(path).upper()
    how = f"as a section with {keys}" if keys else f"as {variable}, or by its flag"
    return f"{dotted(path)} is not set: give it in the settings file, {how}"


def _named(path: KeyPath, origin: str | None) -> str:
    return f"{dotted(path)} ({origin})" if origin else dotted(path)


def _origin(path: KeyPath, layers: Sequence[Origins]) -> str | None:
    """Return where the value that counts was set: the last source that names it."""
    for layer in reversed(layers):
        origin = layer.origin(path)
        if origin is not None:
            return origin
    return None


def _advice(settings: type[BaseModel], path: KeyPath, depth: int) -> str:
    """Return the nearest key that exists, or else all that exist where this one stands."""
    section, key = path[:depth], path[depth]
    keys = sorted(_keys(_inside(settings, section)))
    close = difflib.get_close_matches(key, keys, n=1)
    if close:
        return f"did you mean {dotted((*section, close[0], *path[depth + 1 :]))}?"
    same = [other for other in _all_paths(settings) if other[-1] == key]
    if same:
        return f"did you mean {dotted(same[0])}?"
    where = f"in {dotted(section)}" if section else "here"
    return f"known {where}: {', '.join(keys) or 'nothing, it is a single value'}"


def _inside(annotation: Any, path: KeyPath) -> Any:
    for key in path:
        keys = _keys(annotation)
        annotation = keys.get(key, keys.get(_ANY_KEY))
    return annotation


def _all_paths(annotation: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    for key, inner in _keys(annotation).items():
        yield (*path, key)
        yield from _all_paths(inner, (*path, key))


def _keys(annotation: Any) -> Mapping[str, Any]:
    """Return key → type of what stands inside a type; nothing inside a single value.

    Sections are pydantic models and dataclasses; in a mapping any key may stand.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        hints = get_type_hints(annotation)
        return {field.name: hints[field.name] for field in dataclasses.fields(annotation)}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {_ANY_KEY: arguments[1]}
    inner: dict[str, Any] = {}
    for argument in arguments:  # of an Optional, a union or an Annotated
        inner.update(_keys(argument))
    return inner
