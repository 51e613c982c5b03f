"""Every error that hsplit raises on purpose, and the exit code that each one ends a program with.

::

    HsplitError                      1   anything below, not told apart further
    ├── ConfigError                  2   a setting, flag or run file is wrong
    ├── DataError                    3   a data file is missing, malformed or empty
    ├── ModelError                   4   unknown model or architecture, damaged weights
    ├── PlanError                    5   no plan fits: split layer, rank, memory, modules
    │   └── MemoryFullError          5   what was tried takes more memory than there is
    ├── NumericsError                6   NaN, infinity, or a shape that does not belong
    ├── TransportError              10   the broker link failed
    │   ├── BrokerUnreachableError  11   nobody answers at that address
    │   ├── BrokerRefusedError      12   wrong user, password, certificate or ACL
    │   └── PacketLimitError        13   the broker's packet limit is too small to work with
    ├── ProtocolError               14   the other side sent something that makes no sense
    │   ├── CodecError              14   bytes that are no message of ours
    │   └── VersionMismatchError    15   the other side speaks another major version
    ├── RefusedError                16   the coordinator will not have this device, or it the run
    ├── PortTakenError              17   another program listens there
    ├── StorageError                18   disk full, unwritable folder, damaged checkpoint
    ├── QuorumError                 19   too few devices came, or too few are left
    └── UnhealthyError              20   `health` found the program dead or stuck

A program that was stopped by Ctrl-C or SIGTERM exits with 130 or 143.
"""

from __future__ import annotations


class HsplitError(Exception):
    """The root: catch this to catch everything that hsplit raises on purpose."""

    exit_code = 1


class ConfigError(HsplitError):
    """A setting is missing, unknown, malformed or contradicts another."""

    exit_code = 2


class DataError(HsplitError):
    """Training or evaluation text cannot be used; the message names file and line."""

    exit_code = 3


class ModelError(HsplitError):
    """A base model cannot be found, is of an unsupported family, or its bytes are damaged."""

    exit_code = 4


class PlanError(HsplitError):
    """No split layer and ranks satisfy what was asked; the message holds both numbers."""

    exit_code = 5


class MemoryFullError(PlanError):
    """What was tried takes more memory than there is; something smaller may fit."""


class NumericsError(HsplitError):
    """A tensor holds NaN or infinity, or has a shape that does not belong."""

    exit_code = 6


class TransportError(HsplitError):
    """The link to the broker failed in a way that waiting will not mend."""

    exit_code = 10


class BrokerUnreachableError(TransportError):
    """Nothing answers at the broker's address."""

    exit_code = 11


class BrokerRefusedError(TransportError):
    """The broker answered and said no: credentials, certificate or access list."""

    exit_code = 12


class PacketLimitError(TransportError):
    """The broker's maximum packet size is too small for a chunk."""

    exit_code = 13


class ProtocolError(HsplitError):
    """A well-formed message came at a time or with a content that makes no sense."""

    exit_code = 14


class CodecError(ProtocolError):
    """Bytes that are not a message of this protocol."""


class VersionMismatchError(ProtocolError):
    """The other side speaks a major version that this one does not."""

    exit_code = 15


class RefusedError(HsplitError):
    """The coordinator refused this device, or its owner the run; the message says why."""

    exit_code = 16


class PortTakenError(HsplitError):
    """Another program already listens on the port."""

    exit_code = 17


class StorageError(HsplitError):
    """A file could not be written or read back: disk full, no permission, damaged."""

    exit_code = 18


class QuorumError(HsplitError):
    """Fewer devices than the run needs joined in time, or remained."""

    exit_code = 19


class UnhealthyError(HsplitError):
    """A `health` command found the program stopped or stuck."""

    exit_code = 20
