"""The users of a broker, as mosquitto's ``password_file`` holds them: ``name:$7$…`` a line.

``mosquitto_passwd`` takes a password from a terminal or from a flag that other users of the
machine can read, and is often not installed where the coordinator is; so we write its lines.
"""

from __future__ import annotations

import base64
import hashlib
import secrets

ITERATIONS = 1000
"""mosquitto computes these for each connection, in its one thread. More would help passwords
that people think of; ours are 256 random bits."""
SALT_BYTES = 12


def new_password() -> str:
    """Return 256 random bits as text."""
    return secrets.token_urlsafe(32)


def hashed(password: str, *, salt: bytes) -> str:
    """Return what mosquitto keeps of a password, as of 2.0: ``$7$iterations$salt$hash``.

    The hash is 64 bytes of PBKDF2 with HMAC-SHA-512; salt and hash are in base64.
    """
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS)
    parts = (base64.b64encode(one).decode() for one in (salt, digest))
    return "$".join(("", "7", str(ITERATIONS), *parts))


def users(text: str) -> frozenset[str]:
    """Return the names in a password file."""
    return frozenset(_name(line) for line in text.splitlines() if ":" in line)


def with_user(text: str, name: str, password: str) -> str:
    """Return the password file with this user, in the place of one of the same name."""
    others = [line for line in text.splitlines() if _name(line) != name]
    own = f"{name}:{hashed(password, salt=secrets.token_bytes(SALT_BYTES))}"
    return "".join(f"{line}\n" for line in (*others, own))


def _name(line: str) -> str:
    return line.partition(":")[0]
