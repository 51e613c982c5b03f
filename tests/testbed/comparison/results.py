"""What a comparison of methods measured: the file between the runner and the page.

A figure that is not finite (a run that diverged) is null in the file, and NaN here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from coordinator.json_lines import jsonable
from shared.atomic import replace_file
from shared.errors import DataError, StorageError

Kind: TypeAlias = Literal["strategy", "ablation", "reference"]
"""A reference is what no fleet could do: training on all data in one place, for instance."""

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Count = Annotated[int, Field(ge=0)]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation on held-out text.

    ``seconds`` emulated ones since the start; ``bytes``: of all devices, both directions, since
    the start; ``loss`` in nats a token.
    """

    __pydantic_config__ = _STRICT

    step: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Count
    perplexity: Number
    loss: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPoint:
    """One round. ``aggregation_error``: of all modules together, relative to the exact sum."""

    __pydantic_config__ = _STRICT

    round: Count
    aggregation_error: Number
    training_loss: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRun:
    """One method with one seed. ``ranks``: each device's largest.

    ``peak_memory_bytes`` of each device, and ``peak_memory`` says where that is from.
    """

    __pydantic_config__ = _STRICT

    method: Annotated[str, Field(min_length=1)]
    seed: int
    kind: Kind
    split_layers: Mapping[str, Count]
    ranks: Mapping[str, Count]
    points: tuple[Point, ...]
    rounds: tuple[RoundPoint, ...]
    peak_memory_bytes: Mapping[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    peak_memory: Literal["predicted", "measured"]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All runs, and what they have in common.

    ``settings`` is shown as it is: a value may be a figure, words, a list, or a mapping of these;
    a mapping of mappings (``devices``: name to speed, links, memory) becomes a table of its own.
    """

    __pydantic_config__ = _STRICT

    settings: Mapping[str, object]
    methods: tuple[MethodRun, ...]

    def save(self, path: Path) -> None:
        """Write the file whole, or leave it as it was.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        text = json.dumps(jsonable(asdict(self)), indent=1, allow_nan=False)
        replace_file(path, text.encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Return what `save` wrote.

        Raises:
            DataError: the file is no such comparison.
            StorageError: it cannot be read.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(
                f"{path} is no comparison's results: {where}: {first['msg']}; "
                "run the comparison again with this version of hsplit"
            ) from error
