"""`hsplit-coordinator enroll`: what it makes, for whom, and what it will not do."""

from __future__ import annotations

import base64
import hashlib
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.enrolment import certificates, folder, instructions, passwords
from coordinator.enrolment.folder import Enrolled, Wanted
from shared.errors import ConfigError
from tests.support.fake_clock import FakeClock
from tests.testbed.in_process import coordinator_main

NOW_S = 1.8e9
NOW = datetime.fromtimestamp(NOW_S, UTC)


def enroll(where: Path, user: str | None = "nano", **more: object) -> Enrolled:
    wanted = {"user": user, "folder": where, "host": None, "days": 10, "renew": False, **more}
    return folder.enroll(Wanted(**wanted), FakeClock(NOW_S))


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A folder with one device in it."""
    enroll(tmp_path / "credentials", host="broker.example")
    return tmp_path / "credentials"


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def contents(where: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in where.rglob("*") if file.is_file()}


# --- what is made -----------------------------------------------------------------------------


def test_a_device_gets_a_certificate_with_its_id_for_a_client_and_nothing_else(where: Path):
    own = certificate(where / "devices" / "nano" / "client.crt")
    (name,) = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    usage = own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    basic = own.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (name.value, list(usage)) == ("nano", [ExtendedKeyUsageOID.CLIENT_AUTH])
    assert not basic.ca
    assert own.not_valid_after_utc == NOW + timedelta(days=10)
    own.verify_directly_issued_by(certificate(where / "ca.crt"))


def test_the_broker_gets_a_certificate_for_its_name_for_a_server_and_nothing_else(where: Path):
    own = certificate(where / "broker" / "certs" / "server.crt")
    usage = own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    own.verify_directly_issued_by(certificate(where / "ca.crt"))
    # A device for ten days does not make a broker for ten days.
    assert own.not_valid_after_utc == NOW + timedelta(days=folder.USUAL_DAYS)


@pytest.mark.parametrize("host", ["broker.example", "localhost", "192.0.2.7", "2001:db8::7"])
def test_a_broker_may_be_a_name_or_an_address(tmp_path: Path, host: str):
    assert enroll(tmp_path, host=host).host == host
    assert enroll(tmp_path, "orin").host == host


def test_secrets_are_readable_by_their_owner_alone(where: Path):
    private = {file for file in where.rglob("*") if file.name in ("password", "passwords")}
    private |= set(where.rglob("*.key"))
    assert len(private) == 5  # keys of authority, broker and nano; its password, and all hashes
    for file in (*private, where):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file


def test_every_device_has_its_own_key_and_password(where: Path):
    enroll(where, "orin")
    for name in ("client.key", "client.crt", "password"):
        both = {(where / "devices" / user / name).read_bytes() for user in ("nano", "orin")}
        assert len(both) == 2
    assert passwords.users((where / folder.PASSWORDS).read_text()) == {"nano", "orin"}


def test_the_password_itself_is_in_the_devices_file_alone(where: Path):
    secret = (where / "devices" / "nano" / "password").read_bytes().strip()
    holders = [file for file, data in contents(where).items() if secret in data]
    assert holders == [str(where / "devices" / "nano" / "password")]


# --- what is refused --------------------------------------------------------------------------


def test_a_second_enrolment_changes_nothing_and_says_what_to_do(where: Path):
    before = contents(where)
    with pytest.raises(ConfigError, match="--renew"):
        enroll(where)
    assert contents(where) == before


def test_who_was_carried_away_is_enrolled_all_the_same(where: Path):
    for file in (where / "devices" / "nano").iterdir():
        file.unlink()
    (where / "devices" / "nano").rmdir()
    with pytest.raises(ConfigError, match="--renew"):
        enroll(where)


def test_a_renewal_replaces_password_and_certificate_and_leaves_the_others(where: Path):
    enroll(where, "orin")
    before = contents(where)
    enroll(where, renew=True)
    changed = {file for file, data in contents(where).items() if data != before[file]}
    own = where / "devices" / "nano"
    expected = (own / "client.key", own / "client.crt", own / "password", where / folder.PASSWORDS)
    assert changed == {str(file) for file in expected}
    names = [line.partition(":")[0] for line in (where / folder.PASSWORDS).read_text().splitlines()]
    assert sorted(names) == ["nano", "orin"]


def test_nobody_can_be_renewed_who_is_not_enrolled(where: Path):
    with pytest.raises(ConfigError, match="orin is not enrolled"):
        enroll(where, "orin", renew=True)


def test_the_first_enrolment_needs_the_brokers_name(tmp_path: Path):
    with pytest.raises(ConfigError, match="--broker-host"):
        enroll(tmp_path)


def test_a_broker_of_another_name_is_a_matter_of_its_own(where: Path):
    before = contents(where)
    with pytest.raises(ConfigError, match=r"for broker\.example, not for other\.example"):
        enroll(where, "orin", host="other.example")
    with pytest.raises(ConfigError, match="--renew"):
        enroll(where, None)
    assert contents(where) == before
    assert enroll(where, None, host="other.example", renew=True).host == "other.example"
    assert enroll(where, "orin").host == "other.example"
    assert enroll(where, None, renew=True).host == "other.example"


@pytest.mark.parametrize("host", ["", "a b", "mqtts://x", "x:8883", "-x", "a..b", "ü.example", "*"])
def test_a_brokers_name_that_is_none_is_refused(tmp_path: Path, host: str):
    with pytest.raises(ConfigError, match="broker-host"):
        enroll(tmp_path, host=host)


@given(
    st.text() | st.sampled_from(["..", "../nano", "/etc", "nano/..", "nano\n", ".hidden", "a:b"])
)
@example("coordinator")
@example("Coordinator")
@example("")
def test_a_name_that_is_accepted_is_one_plain_folder_and_one_plain_line(name: str):
    try:
        accepted = folder.device_name(name)
    except ConfigError:
        return
    assert accepted.lower() != "coordinator"
    assert Path("devices", accepted).resolve() == Path("devices").resolve() / accepted
    assert passwords.users(passwords.with_user("", accepted, "x")) == {accepted}


@pytest.mark.parametrize("name", ["..", "../nano", "a/b", "nano\n", "a:b", "", "coordinator"])
def test_the_command_refuses_such_a_name_and_makes_nothing(tmp_path: Path, name: str):
    ended = coordinator_main(
        *("enroll", name, "--folder", str(tmp_path / "new"), "--broker-host", "localhost")
    )
    assert ended.code == ConfigError.exit_code
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("days", [certificates.AUTHORITY_DAYS + 1, 10**12])
def test_nothing_outlasts_the_authority(where: Path, days: int):
    with pytest.raises(ConfigError, match="--days"):
        enroll(where, "orin", days=days)


@pytest.mark.parametrize("lost", ["ca.key", "ca.crt"])
def test_half_an_authority_is_not_made_whole_by_another(where: Path, lost: str):
    (where / lost).unlink()
    before = contents(where)
    with pytest.raises(ConfigError, match=lost):
        enroll(where, "orin")
    assert contents(where) == before


def test_a_key_of_another_authority_is_refused(where: Path, tmp_path: Path):
    enroll(tmp_path / "other", host="x")
    (where / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="does not belong"):
        enroll(where, "orin")


@pytest.mark.parametrize("damaged", ["ca.key", "ca.crt", "broker/certs/server.crt"])
def test_a_damaged_file_is_an_error_of_ours(where: Path, damaged: str):
    (where / damaged).write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="cannot be used"):
        enroll(where, "orin")


# --- passwords --------------------------------------------------------------------------------


def test_a_password_is_kept_as_pbkdf2_of_sha512():
    empty, kind, iterations, salt, digest = passwords.hashed("secret", salt=b"twelve bytes").split(
        "$"
    )
    assert (empty, kind, base64.b64decode(salt)) == ("", "7", b"twelve bytes")
    expected = hashlib.pbkdf2_hmac("sha512", b"secret", b"twelve bytes", int(iterations))
    assert base64.b64decode(digest) == expected


def test_a_user_replaces_only_lines_of_the_same_name():
    text = passwords.with_user("nano2:x\nnano:old\n", "nano", "new")
    assert text.startswith("nano2:x\nnano:$7$")
    assert "old" not in text


# --- what is said -----------------------------------------------------------------------------


def test_what_is_printed_holds_no_secret_and_every_file_that_it_names_exists(where: Path):
    made = enroll(where, folder.COORDINATOR)
    text = instructions.lines(made)
    for file in ("password", "ca.crt", "client.crt", "client.key"):
        assert str(made.own / file) in text
        assert (made.own / file).exists()
    for file in (made.own / "password", made.own / "client.key", where / folder.PASSWORDS):
        assert not any(line in text for line in file.read_text().splitlines())


def test_the_command_prints_what_a_device_is_started_with(tmp_path: Path):
    ended = coordinator_main(
        *("enroll", "nano", "--folder", str(tmp_path / "c"), "--broker-host", "2001:db8::7")
    )
    assert ended.code == 0
    for words in (
        "scp -r",
        "--broker mqtts://[2001:db8::7]:8883 --device-id nano --username nano",
        "--password-file hsplit-credentials/password",
        "--cert-file hsplit-credentials/client.crt --key-file hsplit-credentials/client.key",
    ):
        assert words in ended.output
