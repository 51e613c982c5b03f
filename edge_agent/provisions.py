"""What a device fetches of one run, as scripts: pieces of the base model, and graphs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from edge_agent.conversation import Conversation, RunOverError, Script
from edge_agent.downloads import Downloads
from shared.architecture import ModelArchitecture
from shared.errors import ModelError, ProtocolError
from shared.graphs import graph_names
from shared.protocol.messages import Finished, Graphs, GraphsRequest, Piece, Welcome


class Provisions:
    """Verified files of what a run's coordinator offers. Fetches only what is missing."""

    def __init__(self, welcome: Welcome, conversation: Conversation, downloads: Downloads) -> None:
        """Take note of what is offered.

        Raises:
            ModelError: the architecture is not supported here.
        """
        self._model = welcome.model
        self._conversation = conversation
        self._downloads = downloads
        self._head_is_here = welcome.training.labels == "device"
        self._int8_blocks = welcome.training.int8_blocks
        self.architecture = ModelArchitecture.from_json(welcome.model.config_json, welcome.training)

    def pieces(self, names: Sequence[str]) -> Script[Mapping[str, Path]]:
        """Return these pieces of the base model, by name.

        Raises:
            ModelError: one is not offered, or what came of it was twice something else.
        """
        return (yield from self._fetch(names, self._model.pieces))

    def front(self, split_layer: int) -> Script[Mapping[str, Path]]:
        """Return the pieces of a front, and of the head where it is on the device, by name.

        What is in the cache beyond its limit, and not in use, is deleted.

        Raises:
            ModelError: as `pieces`.
            PlanError: no such split layer.
        """
        names = self.architecture.front_pieces(split_layer, head_on_device=self._head_is_here)
        files = yield from self.pieces(names)
        self._downloads.prune()
        return files

    def graphs(self) -> Script[Mapping[str, Path]]:
        """Return what a backend without model code computes with, whatever its part will be.

        Raises:
            PlanError: the coordinator cannot make graphs of this model.
            ModelError: as `pieces`.
            RunOverError: there is nothing to compute any more.
        """
        answer = yield from self._conversation.ask_any(lambda call: GraphsRequest(call=call))
        if isinstance(answer, Finished):
            raise RunOverError(answer)
        if not isinstance(answer, Graphs):
            raise ProtocolError(f"asked for graphs, got {type(answer).__name__}")
        names = graph_names(
            json.loads(self._model.config_json),
            blocks=range(self.architecture.block_count),
            head_on_device=self._head_is_here,
            int8_blocks=self._int8_blocks,
        )
        return (yield from self._fetch(names, answer.graphs))

    def _fetch(self, names: Sequence[str], offered: Iterable[Piece]) -> Script[Mapping[str, Path]]:
        known = {piece.name: piece for piece in offered}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ModelError(f"the coordinator does not offer {', '.join(unknown)}")
        pieces = [known[name] for name in names]
        return (yield from self._downloads.fetch(pieces, self._conversation))
