"""What devices fetch before they can compute: pieces of the base model, and graphs."""

from __future__ import annotations

import logging

from coordinator import answers
from coordinator.graphs.library import GraphLibrary
from coordinator.membership import Membership
from coordinator.model_store import ModelStore
from coordinator.registry import Member
from shared.errors import PlanError
from shared.protocol.messages import Call, Finished, Graphs, GraphsRequest, PieceRequest

logger = logging.getLogger(__name__)


class Supplies:
    """Serves members, at once or as soon as it can. Belongs to the owner's thread.

    Who waits for graphs is in no round, and nobody waits for it.
    """

    def __init__(self, store: ModelStore, graphs: GraphLibrary, members: Membership) -> None:
        """Start with nobody waiting."""
        self._store = store
        self._graphs = graphs
        self._members = members
        self._waiting: list[tuple[Member, Call]] = []
        self._over: str | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether a member waits for graphs that are being made."""
        return any(map(self._is_in, (member for member, _ in self._waiting)))

    def serve(self, member: Member, request: PieceRequest | GraphsRequest) -> None:
        """Answer a request, or remember that it waits.

        Raises:
            ProtocolError: no such piece or range, or too much at once.
            PlanError: there are no graphs, and none can be made.
        """
        if isinstance(request, PieceRequest):
            graphs = self._graphs.found
            is_graph = graphs is not None and request.sha256 in graphs.contents
            source = graphs if graphs is not None and is_graph else self._store
            self._members.answer(member, answers.piece_bytes(source, request))
        elif self._over is not None:
            self._members.answer(member, Finished(call=request.call, reason=self._over))
        elif (found := self._graphs.want()) is not None:
            self._members.answer(member, Graphs(call=request.call, graphs=found.pieces))
        else:
            logger.info("%s waits for graphs", member.device_id)
            self._waiting.append((member, request.call))

    def turn(self) -> bool:
        """Look whether graphs were made, and answer all who wait; return whether they were."""
        made = self._graphs.poll()
        if made is None:
            return False
        for member, call in self._take_waiting():
            if isinstance(made, PlanError):
                self._members.refuse(member, call, made, what="graphs_request")
            else:
                self._members.answer(member, Graphs(call=call, graphs=made.pieces))
        return True

    def finish(self, reason: str) -> None:
        """Tell all who wait, or ask from now on, that the run is over."""
        self._over = reason
        for member, call in self._take_waiting():
            self._members.answer(member, Finished(call=call, reason=reason))

    def _take_waiting(self) -> list[tuple[Member, Call]]:
        waiting, self._waiting = self._waiting, []
        return [one for one in waiting if self._is_in(one[0])]

    def _is_in(self, member: Member) -> bool:
        """Tell whether a member is still in: who left, or joined again, is forgotten."""
        return self._members.registry.find(member.device_id, member.session) is member
