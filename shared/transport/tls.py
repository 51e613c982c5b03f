"""TLS to a broker: whom we trust, and who we are."""

from __future__ import annotations

import ssl

from shared.config import BrokerSettings
from shared.errors import ConfigError


def tls_context(settings: BrokerSettings) -> ssl.SSLContext:
    """Return a context that checks the broker's certificate and shows ours where there is one.

    Raises:
        ConfigError: a certificate or key file cannot be read or used.
    """
    ca_file = settings.ca_file
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.cert_file is not None:
            # A key that asks for a passphrase on the terminal would hang a service.
            context.load_cert_chain(settings.cert_file, settings.key_file, password=_no_passphrase)
    except OSError as error:  # ssl.SSLError is one
        files = [str(f) for f in (ca_file, settings.cert_file, settings.key_file) if f is not None]
        raise ConfigError(f"cannot use the certificates {', '.join(files)}: {error}") from error
    context.sslsocket_class = _ClosingSocket
    return context


def _no_passphrase() -> str:
    raise ConfigError(
        "broker.key_file is protected by a passphrase, which nobody is there to type: store the "
        "key without one, readable by this program's user alone"
    )


class _ClosingSocket(ssl.SSLSocket):
    """A socket that is closed when its handshake fails; paho leaves it to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        """Perform the handshake, or close."""
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise
