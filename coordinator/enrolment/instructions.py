"""What to put where after an enrolment, as lines to copy. No secret stands in them."""

from __future__ import annotations

import shlex

from coordinator.broker_process import bracketed
from coordinator.enrolment.folder import BROKER, COORDINATOR, Enrolled

PORT = 8883
"""Of docker/mosquitto/mosquitto-tls.conf."""
_ON_BROKER = "/etc/mosquitto"
_ON_DEVICE = "hsplit-credentials"


def lines(made: Enrolled) -> str:
    """Return what to do on the broker's machine, and where the user's program runs."""
    if made.user is None:
        return "\n".join(_for_broker(made))
    user = _for_coordinator(made) if made.user == COORDINATOR else _for_device(made, made.user)
    return "\n".join((*_for_broker(made), "", *user))


def _for_broker(made: Enrolled) -> tuple[str, ...]:
    source = shlex.quote(f"{made.folder / BROKER}/.")
    remote = f"root@{bracketed(made.host)}"
    return (
        f"# The broker at {made.host}; its certificate is good until {made.broker_until:%Y-%m-%d}.",
        "# It takes its files, then reads them. acl and mosquitto-tls.conf of docker/mosquitto",
        "# belong beside them.",
        f"scp -r {source} {remote}:{_ON_BROKER}/",
        f"ssh {remote} 'cd {_ON_BROKER} && chown -R mosquitto: certs passwords'",
        f"ssh {remote} systemctl reload mosquitto",
    )


def _for_device(made: Enrolled, device: str) -> tuple[str, ...]:
    own = shlex.quote(str(made.own))
    return (
        f"# The device {device}: its password and certificate, good until {made.until:%Y-%m-%d}.",
        f"scp -r {own} {device}:{_ON_DEVICE} && rm -r {own}",
        "# There:",
        f"hsplit-agent run --broker {_url(made.host)} --device-id {device} --username {device} \\",
        f"  --password-file {_ON_DEVICE}/password --ca-file {_ON_DEVICE}/ca.crt \\",
        f"  --cert-file {_ON_DEVICE}/client.crt --key-file {_ON_DEVICE}/client.key \\",
        "  --data my.jsonl",
    )


def _for_coordinator(made: Enrolled) -> tuple[str, ...]:
    own = made.own.absolute()
    return (
        f"# The coordinator, in its run.yaml; good until {made.until:%Y-%m-%d}:",
        "broker:",
        f"  url: {_url(made.host)}",
        f"  username: {COORDINATOR}",
        f"  password_file: {own / 'password'}",
        f"  ca_file: {own / 'ca.crt'}",
        f"  cert_file: {own / 'client.crt'}",
        f"  key_file: {own / 'client.key'}",
    )


def _url(host: str) -> str:
    return f"mqtts://{bracketed(host)}:{PORT}"
