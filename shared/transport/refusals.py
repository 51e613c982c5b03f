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

_NO_COMMON_TLS = ("offers no TLS 1.2 or later", "Set the broker's tls_version to tlsv1.2")
_RENEW = "`hsplit-coordinator enroll` with --renew makes a new one"
# What stands in OpenSSL's reason → what that means here, and what to do.
_TLS_FAILURES = {
    "CERTIFICATE_REQUIRED": (
        "asks for a client certificate",
        "Set broker.cert_file and broker.key_file (`hsplit-coordinator enroll` makes them)",
    ),
    "CERTIFICATE_EXPIRED": (
        "says that the client certificate {own} has expired",
        f"{_RENEW}; if it is still good, set the clock of the broker's machine",
    ),
    "UNKNOWN_CA": (
        "does not know the authority of the client certificate {own}",
        "Take one that the broker's own authority has signed, or check its cafile",
    ),
    "CERTIFICATE": (
        "does not accept the client certificate {own}",
        "Check that it is for a client, is valid already by the broker's clock, and is not revoked",
    ),
    "ALERT_PROTOCOL_VERSION": _NO_COMMON_TLS,
    "UNSUPPORTED_PROTOCOL": _NO_COMMON_TLS,
    "WRONG_VERSION_NUMBER": (
        "does not answer in TLS",
        "Check the port, and whether the broker expects mqtt://",
    ),
}
_EXPIRED, _NOT_YET_VALID, _OTHER_HOST = 10, 9, 62  # X509_V_ERR_…
_CLOCK = "set this machine's clock if it is wrong"
_UNTRUSTED = {
    _EXPIRED: f"Renew it on the broker ({_RENEW}), or {_CLOCK}",
    _NOT_YET_VALID: f"If it is new, wait; {_CLOCK}",
    _OTHER_HOST: "Check the host name in broker.url: the certificate is for another",
}


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


def tls_refused(settings: BrokerSettings, error: ssl.SSLError | None) -> BrokerRefusedError | None:
    """Return the error for TLS that failed for good; None where asking again may help.

    Either we do not trust the broker's certificate, or an alert of the broker's says what it
    has against ours, or the two sides have no version of TLS in common.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _untrusted(settings, error)
    reason = "" if error is None else error.reason or ""
    for part, (text, advice) in _TLS_FAILURES.items():
        if part in reason:
            own = settings.cert_file or "which it has not been shown (broker.cert_file)"
            return BrokerRefusedError(f"{settings.url} {text.format(own=own)}. {advice}")
    return None


def _untrusted(settings: BrokerSettings, error: ssl.SSLCertVerificationError) -> BrokerRefusedError:
    advice = _UNTRUSTED.get(
        error.verify_code, "Check broker.ca_file and the host name in broker.url"
    )
    return BrokerRefusedError(
        f"the certificate of {settings.url} cannot be trusted: {error.verify_message}. {advice}"
    )


def never_answered(settings: BrokerSettings) -> BrokerRefusedError:
    """Return the error for an address that takes connections and closes them again."""
    expected = "no TLS (mqtt://), or a client certificate" if settings.tls else "TLS (mqtts://)"
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
