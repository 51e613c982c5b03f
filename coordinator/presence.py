"""One coordinator to a broker: two would answer the same devices and mix their models."""

from __future__ import annotations

import json
import secrets

from shared.clock import Clock
from shared.errors import RefusedError
from shared.protocol.messages import RunId
from shared.protocol.topics import COORDINATOR_STATUS
from shared.transport.base import Will

SETTLED_AFTER_S = 30.0
"""From then on a coordinator stays, and whoever comes later has to go."""


class Presence:
    """This coordinator's status on the broker, and what it makes of another one's.

    Both hear every status. The settled one says again that it is online, and that makes the
    newcomer leave; what a broker had retained of a dead one comes before our own and is ignored.
    """

    def __init__(self, run_id: RunId, clock: Clock) -> None:
        """Draw an id for this start."""
        self._run_id = run_id
        self._clock = clock
        self._instance = secrets.token_hex(4)
        self._began_s = clock.monotonic_s()
        self._own_seen = False

    @property
    def will(self) -> Will:
        """Birth and death notice."""
        return Will(COORDINATOR_STATUS, birth=self._notice("online"), death=self._notice("offline"))

    @property
    def farewell(self) -> bytes:
        """What stands in place of the death notice when the run is complete.

        It is retained, so that a device which was away hears of the end when it is back.
        """
        return self._notice("finished")

    def handle(self, payload: bytes) -> bytes | None:
        """Take a status; return what to publish again, if our own was overwritten.

        Raises:
            RefusedError: another coordinator was here before us.
        """
        try:
            status = json.loads(payload)
            state, instance = str(status["state"]), str(status["instance"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if instance == self._instance:
            self._own_seen = True
            return None
        if not self._own_seen:
            return None
        if state == "online" and self._has_to_go(instance, settled=bool(status.get("settled"))):
            raise RefusedError(
                f"another coordinator (run {status.get('run_id')}) is connected to this broker: "
                "let it finish, stop it, or use another broker"
            )
        return self._notice("online")

    def _has_to_go(self, instance: str, *, settled: bool) -> bool:
        """Tell whether the other one stays: it is settled and we are not, or else by lot."""
        if settled != self._settled:
            return settled
        return instance > self._instance

    @property
    def _settled(self) -> bool:
        return self._clock.monotonic_s() - self._began_s >= SETTLED_AFTER_S

    def _notice(self, state: str) -> bytes:
        status = {"state": state, "run_id": self._run_id, "instance": self._instance}
        return json.dumps({**status, "settled": self._settled}).encode()
