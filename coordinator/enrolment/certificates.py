"""A deployment's own certificate authority, and the certificates that it signs."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import ConfigError

AUTHORITY_DAYS = 3650
CLOCK_SKEW = timedelta(hours=1)
"""How far behind ours a device's clock may be for a new certificate to be valid there at once."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and the private key that belongs to it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as a file holds it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as a file holds it: without a passphrase, which no service could type."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @property
    def until(self) -> datetime:
        """When the certificate expires."""
        return self.certificate.not_valid_after_utc


def new_authority(now: datetime) -> Identity:
    """Return an authority that may sign certificates, and no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named("hsplit CA")
    until = now + timedelta(days=AUTHORITY_DAYS)
    builder = (
        _builder(key, name, issuer=name, now=now, until=until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return Identity(builder.sign(key, hashes.SHA256()), key)


def for_broker(host: str, authority: Identity, *, now: datetime, days: int) -> Identity:
    """Return the certificate of the broker that is reached as ``host``, a name or an address.

    Raises:
        ConfigError: ``host`` is neither, or the authority does not last ``days``.
    """
    alternative = x509.SubjectAlternativeName([_general_name(host)])
    return _signed(
        "hsplit broker",
        authority,
        now=now,
        days=days,
        # The one purpose: nobody can be a client with it, the coordinator least of all.
        purpose=ExtendedKeyUsageOID.SERVER_AUTH,
        more=[alternative],
    )


def for_client(name: str, authority: Identity, *, now: datetime, days: int) -> Identity:
    """Return a client's certificate, whose common name is the user's name at the broker.

    Raises:
        ConfigError: the authority does not last ``days``.
    """
    # The one purpose: with its own certificate a device cannot play the broker to the others.
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH
    return _signed(name, authority, now=now, days=days, purpose=purpose)


def read(certificate_pem: bytes, key_pem: bytes) -> Identity:
    """Return what two files hold.

    Raises:
        ConfigError: they are damaged, not a pair, or not of our making.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the authority's files cannot be used: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != (
        certificate.public_key()
    ):
        raise ConfigError("the authority's key does not belong to its certificate")
    return Identity(certificate, key)


def host_and_end(certificate_pem: bytes) -> tuple[str, datetime]:
    """Return the name or address that a broker's certificate is for, and when it expires.

    Raises:
        ConfigError: it is damaged, or for no host.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return str(next(iter(names)).value), certificate.not_valid_after_utc
    except (ValueError, x509.ExtensionNotFound, StopIteration) as error:
        raise ConfigError(f"the broker's certificate cannot be used: {error}") from error


def _signed(
    name: str,
    authority: Identity,
    *,
    now: datetime,
    days: int,
    purpose: x509.ObjectIdentifier,
    more: Sequence[x509.ExtensionType] = (),
) -> Identity:
    if days > (authority.until - now).days:
        raise ConfigError(
            f"a certificate for {days} days would outlast the authority, which ends on "
            f"{authority.until:%Y-%m-%d}: give fewer --days, or make a new --folder"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(
        key,
        _named(name),
        issuer=authority.certificate.subject,
        now=now,
        until=now + timedelta(days=days),
    )
    extensions = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([purpose]), False),
        (_signer(authority), False),
        *((extension, False) for extension in more),
    ]
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return Identity(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    key: ec.EllipticCurvePrivateKey,
    name: x509.Name,
    *,
    issuer: x509.Name,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _signer(authority: Identity) -> x509.AuthorityKeyIdentifier:
    own = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if len(host) > 253 or not all(_is_label(label) for label in labels):
        raise ConfigError(
            f"--broker-host {host!r} is neither a host name nor an address: give what stands "
            "behind mqtts:// on the devices, without the port"
        )
    return x509.DNSName(host)


def _is_label(label: str) -> bool:
    inner = label.replace("-", "")
    return 0 < len(label) < 64 and inner.isascii() and inner.isalnum() and label.strip("-") == label
