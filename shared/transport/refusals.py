"""What a broker's no means, in words that say what to check."""

from __future__ import annotations

import socket
import ssl

from paho.mqtt.reasoncodes import ReasonCode

from shared.config import BrokerSettings
from shared.errors import BrokerRefusedError, BrokerUnreachableError

UNSUPPORTED_PROTOCOL = 132
NOT_AUTHORIZED = 135

# What stays refused however often one asks; other refusals (busy, shutting down) may pass.
_FINAL = frozenset({132, 133, 134, 135, 138, 140, 144, 149, 153, 154, 155, 156, 157})
_WRONG_LOGIN = frozenset({134, 135, 138, 140})


def is_final(reason: ReasonCode) -> bool:
    """Tell whether asking again could never help."""
    return reason.value in _FINAL


def connection_refused(settings: BrokerSettings, reason: ReasonCode) -> BrokerRefusedError:
    """Return the error for a connection that the broker did not accept."""
    advice = "Check the broker's settings and log"
    if reason.value in _WRONG_LOGIN:
        advice = (
            "Check broker.username and its password (HSPLIT_BROKER__PASSWORD or "
            "broker.password_file), the client certificate, and the broker's list of users"
        )
    elif reason.value == UNSUPPORTED_PROTOCOL:
        advice = "Set broker.protocol to auto"
    return BrokerRefusedError(f"{_who(settings)} is refused: {reason.getName()}. {advice}")


def subscription_refused(
    settings: BrokerSettings, reason: ReasonCode, *, pattern: str
) -> BrokerRefusedError:
    """Return the error for a subscription that was not granted."""
    return BrokerRefusedError(
        f"{_who(settings)} may not subscribe to {pattern}: {reason.getName()}. "
        "Allow reading it in the broker's access list"
    )


def publish_refused(settings: BrokerSettings, reason: ReasonCode) -> BrokerRefusedError:
    """Return the error for a message that the broker would not take from us."""
    return BrokerRefusedError(
        f"{_who(settings)} may not publish: {reason.getName()}. "
        "Allow this device its own topics in the broker's access list"
    )


def certificate_refused(
    settings: BrokerSettings, error: ssl.SSLCertVerificationError
) -> BrokerRefusedError:
    """Return the error for a broker whose certificate we do not trust."""
    return BrokerRefusedError(
        f"the certificate of {settings.url} cannot be trusted: {error.verify_message}. "
        "Check broker.ca_file and the host name in broker.url"
    )


def never_answered(settings: BrokerSettings) -> BrokerRefusedError:
    """Return the error for an address that takes connections and closes them again."""
    expected = "TLS and a client certificate" if settings.tls else "TLS (mqtts://)"
    return BrokerRefusedError(
        f"{settings.url} accepts connections but closes them before answering. Check that an "
        f"MQTT broker listens there and whether it expects {expected}"
    )


def unreachable(
    settings: BrokerSettings, error: OSError | None, *, timeout_s: float
) -> BrokerUnreachableError:
    """Return the error for an address where nobody answered in time."""
    return BrokerUnreachableError(
        f"no broker answers at {settings.url} within {timeout_s:g} s: {_describe(error)}. "
        "Check that it runs, the address in broker.url, and the firewall between"
    )


def _who(settings: BrokerSettings) -> str:
    user = "anonymous user" if settings.username is None else f"user {settings.username!r}"
    return f"{user} at broker {settings.url}"


def _describe(error: OSError | None) -> str:
    if error is None:
        return "connected, but got no answer"
    if isinstance(error, socket.gaierror):
        return f"unknown host ({error.strerror})"
    if isinstance(error, TimeoutError):
        return "timed out"
    return error.strerror or str(error)
