"""The folder of a deployment's credentials: made on first use, never overwritten unasked.

::

    credentials/
    ├── ca.key  ca.crt                       the authority; whoever has the key can be anybody
    ├── broker/                              as /etc/mosquitto is to be
    │   ├── passwords                        one line for each user
    │   └── certs/{ca.crt,server.crt,server.key}
    ├── coordinator/{ca.crt,client.crt,client.key,password}
    └── devices/nano/{ca.crt,client.crt,client.key,password}

Who stands in ``passwords`` is enrolled: what was carried to a device need not stay here.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from coordinator.enrolment import certificates, passwords
from coordinator.enrolment.certificates import Identity
from shared.atomic import replace_file
from shared.clock import Clock
from shared.errors import ConfigError, StorageError
from shared.protocol.messages import NAME_PATTERN

COORDINATOR = "coordinator"
"""The user who may speak as the coordinator (docker/mosquitto/acl); no device is called so."""
DEVICES = "devices"
BROKER = "broker"
PASSWORDS = Path(BROKER) / "passwords"
_CERTS = Path(BROKER) / "certs"
_SERVER = _CERTS / "server.crt"
USUAL_DAYS = 365
_PRIVATE = 0o600
_PUBLIC = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to make: credentials of ``user``, or of the broker alone where that is None.

    ``host`` is how devices reach the broker; None: as its certificate says already. ``days``
    are the user's; a broker's certificate that is made with the first user's has the usual ones.
    """

    user: str | None
    folder: Path
    host: str | None
    days: int
    renew: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """What was made: ``user`` has its files in ``own``, good until ``until``.

    The broker is reached as ``host``; its own certificate is good until ``broker_until``.
    """

    user: str | None
    folder: Path
    own: Path
    host: str
    until: datetime
    broker_until: datetime


def device_name(text: str) -> str:
    """Return a device's id, which is also a user's name, a common name and a folder's.

    Raises:
        ConfigError: it is no id, or the coordinator's own name.
    """
    if not re.fullmatch(NAME_PATTERN, text):
        raise ConfigError(
            f"{text!r} is no device id: up to 64 letters, digits, dots, hyphens and underscores, "
            "beginning with a letter or digit"
        )
    if text.casefold() == COORDINATOR:
        raise ConfigError(
            f"no device can be called {text!r}: the broker would let it speak as the "
            "coordinator; for the coordinator's own credentials give --coordinator"
        )
    return text


def enroll(wanted: Wanted, clock: Clock) -> Enrolled:
    """Make a user's password and certificate, and before the first one authority and broker.

    Raises:
        ConfigError: the user has credentials already (or none to renew), the broker's name is
            missing or another, or a file is damaged.
        StorageError: the folder cannot be written.
    """
    now = datetime.fromtimestamp(int(clock.wall_s()), UTC)
    with _locked(wanted.folder):
        if wanted.user is not None:
            _check_new(wanted, wanted.user)
        makes_broker = _makes_broker(wanted)
        authority = _authority(wanted.folder, now)
        if makes_broker:
            _make_broker(wanted, authority, now)
        elif wanted.user is None:
            raise ConfigError(
                f"the broker has a certificate in {wanted.folder / _SERVER}: name a device to "
                "enroll it, or give --renew to make the broker's anew"
            )
        host, broker_until = certificates.host_and_end(_bytes(wanted.folder / _SERVER))
        own, until = wanted.folder / BROKER, broker_until
        if wanted.user is not None:
            own = _own_folder(wanted.folder, wanted.user)
            client = certificates.for_client(wanted.user, authority, now=now, days=wanted.days)
            _write_client(wanted.folder, own, authority, client, user=wanted.user)
            until = client.until
    return Enrolled(
        user=wanted.user,
        folder=wanted.folder,
        own=own,
        host=host,
        until=until,
        broker_until=broker_until,
    )


def _check_new(wanted: Wanted, user: str) -> None:
    own = _own_folder(wanted.folder, user)
    known = user in passwords.users(_text(wanted.folder / PASSWORDS)) or own.exists()
    if known and not wanted.renew:
        raise ConfigError(
            f"{user} is enrolled already in {wanted.folder}: give --renew to make its password and "
            "certificate anew; the old password ends when the broker has the new file"
        )
    if wanted.renew and not known:
        raise ConfigError(
            f"{user} is not enrolled in {wanted.folder}, so there is nothing to renew: check the "
            "name and --folder, or leave out --renew"
        )


def _makes_broker(wanted: Wanted) -> bool:
    """Tell whether the broker's certificate is made now; else the present one stays."""
    present = wanted.folder / _SERVER
    if not present.exists():
        if wanted.host is None:
            raise ConfigError(
                "the broker has no certificate yet: give --broker-host, the name or address by "
                "which devices reach it"
            )
        return True
    if wanted.user is None and wanted.renew:
        return True
    host, _ = certificates.host_and_end(_bytes(present))
    if wanted.host not in (None, host):
        raise ConfigError(
            f"the broker's certificate in {present} is for {host}, not for {wanted.host}: leave "
            "out --broker-host, or make the broker's anew with --broker-host and --renew alone"
        )
    return False


def _authority(folder: Path, now: datetime) -> Identity:
    """Return the deployment's authority, made on first use."""
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if certificate.exists() != key.exists():
        missing = key if certificate.exists() else certificate
        raise ConfigError(
            f"{missing} is missing: put it back, or begin a new --folder, whose authority every "
            "device and the broker then need"
        )
    if key.exists():
        return certificates.read(_bytes(certificate), _bytes(key))
    authority = certificates.new_authority(now)
    replace_file(key, authority.key_pem, mode=_PRIVATE)
    replace_file(certificate, authority.certificate_pem, mode=_PUBLIC)
    return authority


def _make_broker(wanted: Wanted, authority: Identity, now: datetime) -> None:
    """Write the broker's certificate, for the name asked for or else the one it had."""
    present = wanted.folder / _SERVER
    host = wanted.host
    if host is None:
        host, _ = certificates.host_and_end(_bytes(present))
    days = wanted.days if wanted.user is None else USUAL_DAYS
    server = certificates.for_broker(host, authority, now=now, days=days)
    certs = wanted.folder / _CERTS
    replace_file(certs / "ca.crt", authority.certificate_pem, mode=_PUBLIC)
    replace_file(certs / "server.key", server.key_pem, mode=_PRIVATE)
    replace_file(certs / "server.crt", server.certificate_pem, mode=_PUBLIC)
    if not (wanted.folder / PASSWORDS).exists():
        replace_file(wanted.folder / PASSWORDS, b"", mode=_PRIVATE)


def _write_client(
    folder: Path, own: Path, authority: Identity, client: Identity, *, user: str
) -> None:
    password = passwords.new_password()
    replace_file(own / "ca.crt", authority.certificate_pem, mode=_PUBLIC)
    replace_file(own / "client.key", client.key_pem, mode=_PRIVATE)
    replace_file(own / "client.crt", client.certificate_pem, mode=_PUBLIC)
    replace_file(own / "password", f"{password}\n".encode(), mode=_PRIVATE)
    # Last: with this line the user is enrolled.
    lines = passwords.with_user(_text(folder / PASSWORDS), user, password)
    replace_file(folder / PASSWORDS, lines.encode(), mode=_PRIVATE)


def _own_folder(folder: Path, user: str) -> Path:
    return folder / COORDINATOR if user == COORDINATOR else folder / DEVICES / user


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", "replace") if path.exists() else ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder, for its owner alone, and wait until nobody else enrolls in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
