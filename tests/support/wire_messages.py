"""All message types, messages made from their own limits, and a comparison of contents."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from shared.protocol import messages
from shared.protocol.messages import Message
from shared.protocol.tensors import ITEM_BYTES, TensorFrame

MESSAGE_TYPES: tuple[type, ...] = get_args(get_args(Message)[0])
REQUEST_TYPES: tuple[type, ...] = get_args(messages.Request)
ANSWER_TYPES: tuple[type, ...] = get_args(messages.Answer)

_LONGEST_LIST = 3
_LONGEST_TEXT = 12


def plain(value: Any) -> Any:
    """Return a message as nested tuples and dicts that compare by content, tensors included."""
    if isinstance(value, TensorFrame):
        return (value.dtype, value.shape, bytes(value.data))
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return (type(value).__name__, fields)
    if isinstance(value, (tuple, list)):
        return tuple(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


@st.composite
def tensors(draw: st.DrawFn) -> TensorFrame:
    """Draw a small frame of any dtype and any number of dimensions; its bytes mean nothing."""
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = ITEM_BYTES[dtype]
    for length in shape:
        size *= length
    return TensorFrame(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


def any_message() -> st.SearchStrategy[Any]:
    """Draw a message of any type."""
    return st.one_of(*(of_type(kind) for kind in MESSAGE_TYPES))


def of_type(kind: type) -> st.SearchStrategy[Any]:
    """Draw one message of ``kind``: whatever the limits in its types allow."""
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: _strategy(hint, ()) for name, hint in hints.items()})


def _strategy(hint: Any, limits: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if hasattr(hint, "__supertype__"):  # a NewType
        return _strategy(hint.__supertype__, limits)
    if hint is TensorFrame:
        return tensors()
    if dataclasses.is_dataclass(hint):
        return of_type(typing.cast(type, hint))
    if hint is type(None):
        return st.none()
    origin = get_origin(hint)
    if origin is None:
        return _scalar(hint, _bounds(limits))
    return _generic(origin, get_args(hint), limits)


def _generic(
    origin: Any, arguments: tuple[Any, ...], limits: tuple[Any, ...]
) -> st.SearchStrategy[Any]:
    if origin is Annotated:
        return _strategy(arguments[0], (*limits, *arguments[1:]))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*(_strategy(one, ()) for one in arguments))
    if origin is tuple:
        least = int(_bounds(limits).get("min_length", 0))
        items = st.lists(_strategy(arguments[0], ()), min_size=least, max_size=_LONGEST_LIST)
        return items.map(tuple)
    key, value = arguments
    return st.dictionaries(_strategy(key, ()), _strategy(value, ()), max_size=_LONGEST_LIST)


def _bounds(limits: tuple[Any, ...]) -> dict[str, Any]:
    """Return the limits of an annotation by name, those inside a pydantic Field included."""
    found: dict[str, Any] = {}
    for limit in limits:
        for one in (limit, *getattr(limit, "metadata", ())):
            for name in ("ge", "gt", "le", "lt", "min_length", "pattern"):
                if getattr(one, name, None) is not None:
                    found[name] = getattr(one, name)
    return found


def _scalar(kind: type, bounds: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(bounds["ge"], bounds.get("le", bounds.get("lt", 2**63) - 1))
    if kind is float:
        return st.floats(
            bounds.get("ge", bounds.get("gt")),
            bounds.get("le", bounds.get("lt")),
            exclude_min="gt" in bounds,
            exclude_max="lt" in bounds,
        )
    assert kind is str, f"no strategy for {kind}"
    if "pattern" in bounds:
        return st.from_regex(bounds["pattern"], fullmatch=True)
    return st.text(max_size=_LONGEST_TEXT)
