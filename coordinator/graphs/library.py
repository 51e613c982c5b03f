"""The graphs of one run: from the user's cache, or exported when a device first asks for them."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from coordinator.graphs import stored
from coordinator.graphs.exporting import Export
from coordinator.graphs.spec import GraphSpec
from coordinator.graphs.stored import StoredGraphs
from coordinator.model_store import ModelStore
from coordinator.settings import CoordinatorSettings
from shared.clock import Clock
from shared.config import base_folder
from shared.errors import HsplitError, PlanError

logger = logging.getLogger(__name__)


class GraphLibrary:
    """Finds graphs, or has them made by a child process. Nothing here waits for it.

    Belongs to one thread. ``found``: the graphs, once they are there; ``export``: the child that
    makes them, while it does.
    """

    def __init__(self, spec: GraphSpec, cache_folder: Path, clock: Clock) -> None:
        """Look for nothing yet: most runs have no device that computes with graphs.

        ``cache_folder`` keeps the graphs of all runs, in a folder for each `GraphSpec.key`.
        """
        self._spec = spec
        self._cache_folder = cache_folder
        self._clock = clock
        self.found: StoredGraphs | None = None
        self.export: Export | None = None

    @classmethod
    def of(cls, settings: CoordinatorSettings, store: ModelStore, clock: Clock) -> GraphLibrary:
        """Return the library of a run; the user's cache keeps its graphs."""
        spec = GraphSpec(
            config_json=store.describe().config_json,
            training=settings.training,
            lora=settings.lora,
        )
        return cls(spec, graph_cache(), clock)

    def want(self) -> StoredGraphs | None:
        """Return the graphs; None: they are being made now, and `poll` will say what came of it.

        Raises:
            PlanError: they cannot be made here.
        """
        if self.found is None and self.export is None:
            try:
                self._find_or_export()
            except (HsplitError, OSError) as error:
                raise _no_graphs(str(error)) from error
            except PackageNotFoundError as error:
                raise _no_graphs(
                    f"{error.name} is not installed here: pip install 'hsplit[coordinator]'"
                ) from error
        return self.found

    def poll(self) -> StoredGraphs | PlanError | None:
        """Return what came of the making, once: graphs, or why there are none; None: nothing new.

        After a failure `want` tries again.
        """
        ended = None if self.export is None else self.export.ended()
        if ended is None:
            return None
        self.export = None
        if ended.failure is not None:
            return _no_graphs(ended.failure)
        self.found = stored.load(self._folder)
        if self.found is None:
            return _no_graphs(f"what was written to {self._folder} cannot be read back")
        size_bytes = sum(piece.size_bytes for piece in self.found.pieces)
        count = len(self.found.pieces)
        logger.info(
            "%d graphs of %.0f kB exported in %.0f s", count, size_bytes / 1e3, ended.took_s
        )
        return self.found

    def close(self) -> None:
        """End an export that is under way. May be called twice."""
        if self.export is not None:
            self.export.close()
            self.export = None

    @property
    def _folder(self) -> Path:
        return self._cache_folder / self._spec.key

    def _find_or_export(self) -> None:
        self.found = stored.load(self._folder)
        if self.found is None:
            logger.info(
                "exporting this model's graphs for devices without torch, once for its "
                "architecture: half a minute to a few minutes"
            )
            self.export = Export(self._spec, self._folder, self._clock)


def graph_cache() -> Path:
    """Return the folder of the user's cache that keeps the graphs of all runs."""
    return base_folder("XDG_CACHE_HOME", "~/.cache") / "hsplit" / "graphs"


def _no_graphs(reason: str) -> PlanError:
    return PlanError(f"there are no graphs for a device without torch: {reason}")
