"""What the commands about trust take in common: a private key with its passphrase, roots, memory and slot."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from hotglm.errors import ArgumentError, SourceError, shorten_repr
from hotglm.release.reading import read_document
from hotglm.trust.keys import SigningKey
from hotglm.trust.opening import open_trust
from hotglm.trust.policy import DEFAULT_MAX_JUMP, Trust

__all__ = ["add_key_options", "add_trust_options", "open_trust_from", "parse_time", "read_key", "read_passphrase"]

_MAX_PASSPHRASE_NBYTES = 4096


def add_key_options(parser: argparse.ArgumentParser, *, flag: str, is_required: bool) -> None:
    """Let a command take a private key under the option `flag`, and the file of its passphrase."""
    parser.add_argument(flag, dest="key", metavar="KEY", required=is_required, help="the private key, a PEM file")
    parser.add_argument("--passphrase-file", metavar="FILE", help="what holds its passphrase, on the first line")


def read_key(arguments: argparse.Namespace) -> SigningKey:
    """Return the private key that the options name.

    Raises:
        ArgumentError: it is no key, or has another passphrase. SourceError: a file cannot be read.
        MissingExtraError: `cryptography` is not installed.
    """
    return SigningKey.read(arguments.key, passphrase=read_passphrase(arguments.passphrase_file))


def read_passphrase(path: str | None) -> bytes | None:
    """Return the first line of a file; None without one.

    Raises:
        SourceError: it cannot be read.
    """
    if path is None:
        return None
    text = read_document(path, limit=_MAX_PASSPHRASE_NBYTES, error=SourceError, code="TOO_LARGE")
    return text.split(b"\n")[0].rstrip(b"\r")


def add_trust_options(parser: argparse.ArgumentParser, *, has_slot: bool = True, is_required: bool = True) -> None:
    """Let a command take roots and memory, and a slot."""
    parser.add_argument("--roots", metavar="ROOTS", required=is_required, help="the file of this host's roots of trust")
    parser.add_argument("--state", metavar="STATE", required=is_required, help="the file of what this host remembers")
    parser.set_defaults(slot=None)
    if has_slot:
        parser.add_argument("--slot", metavar="NAME", help="the slot that is asked for; by default none")
    parser.add_argument(
        "--max-jump", metavar="N", type=int, default=DEFAULT_MAX_JUMP, help="how far numbers may leap (%(default)s)"
    )


def open_trust_from(arguments: argparse.Namespace) -> Trust:
    """Return the trust that the options name.

    Raises:
        TrustError: it cannot be opened. MissingExtraError: `cryptography` is not installed.
    """
    return open_trust(arguments.roots, state=arguments.state, slot=arguments.slot, max_jump=arguments.max_jump)


def parse_time(text: str) -> datetime:
    """Return a time that was written in ISO 8601, in UTC where it does not say.

    Raises:
        ArgumentError: it is none.
    """
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise ArgumentError(
            f"Expected a time, got {shorten_repr(text)}.", remedy="write it like 2027-01-31T12:00:00Z."
        ) from error
    return instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
