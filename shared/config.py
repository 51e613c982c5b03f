"""Settings: one frozen class per program, read from a YAML file, then ``HSPLIT_*``, then flags.

A later source wins, key by key. In the environment two underscores go one level down and case
does not matter: ``HSPLIT_BROKER__URL`` is ``broker.url``. A list or mapping is given as JSON
for its whole section (``HSPLIT_LORA='{"target_modules": ["c_attn"]}'``); an empty variable is
one that is not set. A key or a variable that no program knows stops the start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar
from urllib.parse import SplitResult, urlsplit

from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared import config_layers
from shared.config_errors import explained
from shared.config_layers import PREFIX, Flag
from shared.errors import ConfigError
from shared.logs import LogFormat

__all__ = ["BrokerSettings", "Flag", "HsplitSettings", "LogFormat", "LogLevel", "Section"]

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_LEAST_MEMORY = 2**20

UserPath: TypeAlias = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path as people write it: ``~`` is their home; else relative to where the program starts."""


def _check_memory(size: ByteSize) -> ByteSize:
    if size < _LEAST_MEMORY:
        raise ValueError("is below 1 MiB; was the unit forgotten? Write 2GiB or 800MB")
    return size


MemoryLimit: TypeAlias = Annotated[ByteSize, AfterValidator(_check_memory)]
"""Bytes, written ``2GiB`` or ``800MB``."""

ComputeDevice: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
]
"""Where torch computes; ``auto``: on the GPU where there is one, else on the CPU."""

PositiveInt: TypeAlias = Annotated[int, Ge(1), Le(2**31 - 1)]

LogLevel: TypeAlias = Annotated[
    Literal["debug", "info", "warning", "error"],
    BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
]

_Settings = TypeVar("_Settings", bound="HsplitSettings")


class Section(BaseModel):
    """A mapping inside a settings file: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class BrokerSettings(Section):
    """Where the broker is, and who we are to it.

    ``url`` is ``mqtt://host[:port]`` or, with TLS, ``mqtts://host[:port]``. A password comes
    from ``password_file`` or from ``HSPLIT_BROKER__PASSWORD``; no flag takes one, because
    other users of the machine can read flags. ``ca_file`` replaces the system's certificate
    authorities; ``cert_file`` and ``key_file`` are this program's own certificate. At the
    start the broker is tried for ``connect_timeout_s``, for it may come up after us.
    """

    url: str
    username: str | None = None
    password: SecretStr | None = None
    password_file: UserPath | None = None
    ca_file: UserPath | None = None
    cert_file: UserPath | None = None
    key_file: UserPath | None = None
    keepalive_s: Annotated[int, Ge(1), Le(65_535)] = 10
    connect_timeout_s: Annotated[float, Gt(0), Le(86_400)] = 30.0
    protocol: Literal["5", "3.1.1", "auto"] = "auto"

    @property
    def host(self) -> str:
        """The host name or address, without brackets around IPv6."""
        return _parts(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The port of the URL, or the scheme's usual one."""
        parts = _parts(self.url)
        return parts.port or _DEFAULT_PORTS[parts.scheme]

    @property
    def tls(self) -> bool:
        """Whether the link is encrypted."""
        return _parts(self.url).scheme == "mqtts"

    def secret(self) -> str | None:
        """Return the password, read from its file where there is one; None without.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        if self.password_file is None:
            return self.password.get_secret_value() if self.password is not None else None
        try:
            text = self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"broker.password_file {self.password_file} cannot be read: {error}"
            ) from error
        if not text:
            raise ConfigError(f"broker.password_file {self.password_file} is empty")
        return text

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = _parts(url)
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
            raise ValueError("should look like mqtt://host:1883 or mqtts://host:8883")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "must not hold a user or password: set broker.username, and "
                "broker.password_file or HSPLIT_BROKER__PASSWORD"
            )
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError("must end after the port")
        return url

    @field_validator("protocol", mode="before")
    @classmethod
    def _accept_number(cls, value: object) -> object:
        # YAML reads an unquoted `protocol: 5` as a number.
        return "5" if value == 5 and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_together(self) -> BrokerSettings:
        if self.password is not None and self.password_file is not None:
            raise ValueError("give password or password_file, not both")
        if self.username is None and (self.password or self.password_file):
            raise ValueError("a password is given without a username: set broker.username")
        if not self.tls and (self.ca_file or self.cert_file or self.key_file):
            raise ValueError("certificates are given but the URL is not mqtts://")
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file is given without cert_file")
        return self

    @field_serializer("password")
    def _never_write(self, _password: SecretStr | None) -> None:
        """Keep the password out of every file that holds resolved settings."""


def _parts(url: str) -> SplitResult:
    """Split a URL; ValueError, in our words, for a port that is none."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError("the port should be a number from 1 to 65535")
    return parts


class HsplitSettings(BaseSettings):
    """What both programs can be told; the base of each program's own settings.

    Made directly, only the arguments count; `load` adds file, environment and flags.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    log_level: LogLevel = "info"
    log_format: LogFormat = "text"

    @classmethod
    def load(
        cls: type[_Settings],
        *,
        file: Path | None = None,
        flags: Sequence[Flag] = (),
        environment: Mapping[str, str] | None = None,
    ) -> _Settings:
        """Return the settings that file, environment and flags make together.

        ``environment`` is the process's own where it is not given; a flag whose value is
        None was not given.

        Raises:
            ConfigError: names every key that is wrong, where it was set, and what is allowed.
        """
        layers = [
            *([config_layers.from_file(file)] if file is not None else []),
            config_layers.from_environment(cls, os.environ if environment is None else environment),
            config_layers.from_flags(flags),
        ]
        try:
            return cls(**config_layers.merged(layers))
        except ValidationError as error:
            raise explained(error, cls, layers) from error

    def resolved(self) -> dict[str, Any]:
        """Return every setting as plain values that YAML and JSON can hold, without secrets.

        The result, written to a file, can be loaded again.
        """
        return self.model_dump(mode="json")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave out the implicit sources: `load` lays them in order and knows their origins."""
        return (init_settings,)


def base_folder(variable: str, fallback: str) -> Path:
    """Return a folder of the XDG convention: ``$XDG_CACHE_HOME``, say, or its usual place.

    An XDG variable that is no absolute path is ignored, as the convention demands.
    """
    named = Path(os.environ.get(variable, ""))
    return named if named.is_absolute() else Path(fallback).expanduser()
