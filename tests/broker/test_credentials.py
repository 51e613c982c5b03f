"""Who comes in with which credentials, and what our programs say when they do not.

Passwords, certificates and both, against the shipped configuration; each refusal once with a
plain client and once with our own, which names what is wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from coordinator.enrolment import certificates
from coordinator.enrolment.certificates import Identity
from coordinator.enrolment.folder import Wanted, enroll
from shared.clock import SystemClock
from shared.config import BrokerSettings
from shared.errors import BrokerRefusedError
from shared.transport.base import LinkDown, LinkUp
from shared.transport.mqtt import MqttTransport
from tests.broker.events import WILL, Connect, event
from tests.support.brokers import TLS_CONF, Mosquitto
from tests.support.plain_clients import PlainClient, with_certificate, with_password

pytestmark = pytest.mark.broker

NOW = datetime.now(UTC)
BOTH = {"require_certificate": "true"}
CERTIFICATES = {**BOTH, "use_identity_as_username": "true"}
KINDS = {"passwords": {}, "both": BOTH, "certificates": CERTIFICATES}


@pytest.fixture(scope="module", params=list(KINDS))
def broker(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    broker_files: dict[str, str],
) -> Iterator[Mosquitto]:
    yield from running(tmp_path_factory, {**broker_files, **KINDS[request.param]})


@pytest.fixture(scope="module")
def strict(
    tmp_path_factory: pytest.TempPathFactory, broker_files: dict[str, str]
) -> Iterator[Mosquitto]:
    """The one that wants a certificate as well as a password."""
    yield from running(tmp_path_factory, {**broker_files, **BOTH})


def running(factory: pytest.TempPathFactory, settings: dict[str, str]) -> Iterator[Mosquitto]:
    folder = factory.mktemp("mosquitto")
    with Mosquitto(folder, scheme="mqtts", conf=TLS_CONF, **settings) as broker:
        yield broker


@pytest.fixture
def nano(credentials_folder: Path) -> Path:
    return credentials_folder / "devices" / "nano"


@pytest.fixture(scope="module")
def authority(credentials_folder: Path) -> Identity:
    """The deployment's own: what it signs is refused for another reason."""
    files = (credentials_folder / name for name in ("ca.crt", "ca.key"))
    return certificates.read(*(file.read_bytes() for file in files))


def settings_of(own: Path, **changes: Any) -> dict[str, Any]:
    """Return the broker settings of an enrolled user; a change to None takes one away."""
    whole = {
        "username": own.name,
        "password_file": own / "password",
        "ca_file": own / "ca.crt",
        "cert_file": own / "client.crt",
        "key_file": own / "client.key",
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


def written(folder: Path, identity: Identity) -> dict[str, Path]:
    """Write a certificate; return the settings that name it."""
    (folder / "own.crt").write_bytes(identity.certificate_pem)
    (folder / "own.key").write_bytes(identity.key_pem)
    return {"cert_file": folder / "own.crt", "key_file": folder / "own.key"}


def refusal(url: str, settings: dict[str, Any]) -> str:
    """Return what our transport says when it is refused."""
    transport = MqttTransport(
        BrokerSettings.model_validate({"url": url, **settings}), client_name="client"
    )
    with pytest.raises(BrokerRefusedError) as caught:
        transport.start((), timeout_s=30)
    return str(caught.value)


# --- who comes in -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("user", ["devices/nano", "devices/orin", "coordinator"])
def test_who_is_enrolled_comes_in_however_the_broker_asks(
    broker: Mosquitto, connect: Connect, credentials_folder: Path, user: str, protocol: str
):
    connect(broker.url, protocol=protocol, **settings_of(credentials_folder / user))


def test_mosquitto_takes_the_passwords_that_we_hash(
    tmp_path_factory: pytest.TempPathFactory, broker_files: dict[str, str], nano: Path
):
    for broker in running(tmp_path_factory, broker_files):
        assert PlainClient(broker, with_password(nano)).publish("x") == 0


def test_who_is_renewed_comes_in_anew_and_no_longer_as_before(
    tmp_path_factory: pytest.TempPathFactory, connect: Connect
):
    folder = tmp_path_factory.mktemp("renewed") / "credentials"

    def wanted(*, renew: bool) -> Wanted:
        return Wanted(user="nano", folder=folder, host="localhost", days=1, renew=renew)

    own = enroll(wanted(renew=False), SystemClock()).own
    old = (own / "password").read_text().strip()
    certs, passwords = folder / "broker" / "certs", folder / "broker" / "passwords"
    files = {
        "cafile": str(certs / "ca.crt"),
        "certfile": str(certs / "server.crt"),
        "keyfile": str(certs / "server.key"),
        "password_file": str(passwords),
        "acl_file": str(TLS_CONF.with_name("acl")),
    }
    for broker in running(tmp_path_factory, files):
        transport = connect(broker.url, will=WILL, **settings_of(own))
        enroll(wanted(renew=True), SystemClock())
        process = broker._process
        assert process is not None
        os.kill(process.pid, signal.SIGHUP)  # `systemctl reload mosquitto`
        # Whoever is connected by the old password is thrown out, and then refused by it.
        assert isinstance(event(transport, LinkDown), LinkDown)
        changed = settings_of(own, password_file=None, password=old)
        assert "password" in refusal(broker.url, changed)
        connect(broker.url, **settings_of(own))


# --- passwords ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [(), ("-u", "nano"), ("-u", "nano", "-P", "wrong"), ("-u", "nobody", "-P", "x")],
    ids=["nobody", "no password", "wrong password", "unknown user"],
)
def test_a_certificate_without_its_password_is_not_enough(
    strict: Mosquitto, nano: Path, flags: tuple[str, ...]
):
    tried = PlainClient(strict, (*with_certificate(nano), *flags)).try_to_publish("x", "-m", "x")
    assert tried.returncode != 0
    assert "not authori" in (tried.stdout + tried.stderr).lower()


def test_the_password_of_another_is_none(strict: Mosquitto, nano: Path, credentials_folder: Path):
    other = credentials_folder / "devices" / "orin" / "password"
    said = refusal(strict.url, settings_of(nano, password_file=other))
    assert "user 'nano'" in said
    assert "password" in said


def test_a_missing_password_is_told_as_a_missing_user(strict: Mosquitto, nano: Path):
    said = refusal(strict.url, settings_of(nano, username=None, password_file=None))
    assert "anonymous user" in said
    assert "broker.username" in said


# --- certificates -------------------------------------------------------------------------------


def test_a_password_without_a_certificate_is_not_enough(strict: Mosquitto, nano: Path):
    assert PlainClient(strict, with_password(nano)).publish("x") != 0
    said = refusal(strict.url, settings_of(nano, cert_file=None, key_file=None))
    assert "asks for a client certificate. Set broker.cert_file and broker.key_file" in said


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", "has expired. `hsplit-coordinator enroll` with --renew"),
        ("foreign", "does not know the authority"),
        ("future", "is valid already by the broker's clock"),
        ("server", "Check that it is for a client"),
    ],
)
def test_a_certificate_that_does_not_count_is_refused_and_the_error_says_why(
    strict: Mosquitto, nano: Path, authority: Identity, tmp_path: Path, *, kind: str, words: str
):
    month = timedelta(days=30)
    made = {
        "expired": lambda: certificates.for_client("nano", authority, now=NOW - month, days=9),
        "foreign": lambda: certificates.for_client(
            "nano", certificates.new_authority(NOW), now=NOW, days=9
        ),
        "future": lambda: certificates.for_client("nano", authority, now=NOW + month, days=9),
        "server": lambda: certificates.for_broker("localhost", authority, now=NOW, days=9),
    }
    own = written(tmp_path, made[kind]())
    flags = ("--cert", str(own["cert_file"]), "--key", str(own["key_file"]))
    assert PlainClient(strict, (*with_password(nano), *flags)).publish("x") != 0
    said = refusal(strict.url, settings_of(nano, **own))
    assert words in said
    assert str(own["cert_file"]) in said


# --- the broker's own certificate, and TLS -----------------------------------------------------


def test_a_broker_of_another_authority_is_not_trusted(
    strict: Mosquitto, nano: Path, tmp_path: Path
):
    other = tmp_path / "other.crt"
    other.write_bytes(certificates.new_authority(NOW).certificate_pem)
    flags = ["--cafile", str(other), *with_password(nano)[2:], *with_certificate(nano)[2:]]
    assert PlainClient(strict, tuple(flags)).publish("x") != 0
    said = refusal(strict.url, settings_of(nano, ca_file=other))
    assert "cannot be trusted" in said
    assert "broker.ca_file" in said


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", "has expired. Renew it on the broker"),
        ("future", "set this machine's clock"),
        ("other host", "Check the host name in broker.url"),
        # A device cannot play the broker to the others with the certificate that it was given.
        ("a device's", "unsuitable certificate purpose"),
    ],
)
def test_a_broker_whose_certificate_does_not_count_is_not_trusted(
    tmp_path_factory: pytest.TempPathFactory,
    broker_files: dict[str, str],
    nano: Path,
    authority: Identity,
    *,
    kind: str,
    words: str,
):
    month = timedelta(days=30)
    made = {
        "expired": ("localhost", NOW - month),
        "future": ("localhost", NOW + month),
        "other host": ("other.example", NOW),
    }
    if kind in made:
        host, when = made[kind]
        identity = certificates.for_broker(host, authority, now=when, days=9)
    else:
        identity = certificates.for_client("localhost", authority, now=NOW, days=9)
    own = written(tmp_path_factory.mktemp("server"), identity)
    files = {"certfile": str(own["cert_file"]), "keyfile": str(own["key_file"])}
    for broker in running(tmp_path_factory, {**broker_files, **files}):
        assert PlainClient(broker, with_password(nano)).publish("x") != 0
        assert words in refusal(broker.url, settings_of(nano))


def of_version(version: ssl.TLSVersion, context: ssl.SSLContext) -> ssl.SSLContext:
    """Let a context speak this version alone, however old it is."""
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    return context


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"])
def test_a_broker_takes_tls_1_2_and_later_only(strict: Mosquitto, nano: Path, version: str):
    old = version in ("TLSv1", "TLSv1_1")
    context = of_version(
        ssl.TLSVersion[version], ssl.create_default_context(cafile=str(nano / "ca.crt"))
    )
    context.load_cert_chain(nano / "client.crt", nano / "client.key")
    with socket.create_connection(("localhost", strict.port), timeout=10) as link:
        if old:
            with pytest.raises(ssl.SSLError, match="(?i)protocol.version"):
                context.wrap_socket(link, server_hostname="localhost")
        else:
            with context.wrap_socket(link, server_hostname="localhost") as secured:
                assert secured.version() == version.replace("_", ".")


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_a_broker_of_an_older_tls_is_refused_by_us(
    broker_files: dict[str, str], nano: Path, version: str
):
    context = of_version(ssl.TLSVersion[version], ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    context.load_cert_chain(broker_files["certfile"], broker_files["keyfile"])
    with socket.create_server(("localhost", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:
                    return
                with link:
                    try:
                        context.wrap_socket(link, server_side=True).close()
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            said = refusal(f"mqtts://localhost:{server.getsockname()[1]}", settings_of(nano))
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert "offers no TLS 1.2 or later" in said


def test_without_tls_a_guarded_broker_is_no_broker(strict: Mosquitto, nano: Path):
    assert PlainClient(strict, with_password(nano)[2:]).publish("x") != 0
    url = strict.url.replace("mqtts", "mqtt")
    said = refusal(url, {"username": "nano", "password_file": nano / "password"})
    assert "whether it expects TLS (mqtts://)" in said


def test_with_tls_an_open_broker_is_none(mosquitto: Mosquitto, nano: Path):
    said = refusal(mosquitto.url.replace("mqtt", "mqtts"), settings_of(nano))
    assert "whether it expects no TLS (mqtt://)" in said


def test_the_link_comes_up_again_with_a_certificate(
    tmp_path_factory: pytest.TempPathFactory,
    broker_files: dict[str, str],
    nano: Path,
    connect: Connect,
):
    for broker in running(tmp_path_factory, {**broker_files, **CERTIFICATES}):
        transport = connect(broker.url, **settings_of(nano))
        broker.kill()
        broker.start()
        assert isinstance(event(transport, LinkDown), LinkDown)
        assert event(transport, LinkUp) == LinkUp()
