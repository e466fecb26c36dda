"""`hotglm verify`: would this host accept that release? Every outcome has an exit code of its own.

Rules this module keeps: nothing is remembered by asking, and a refusal is not followed by another attempt (T11).
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from hotglm.commands.command import ERROR, OK, Command
from hotglm.commands.console import print_json, show_count
from hotglm.commands.progress import ProgressBar
from hotglm.commands.target import open_target
from hotglm.commands.trust_options import add_trust_options, open_trust_from
from hotglm.errors import (
    ArgumentError,
    DigestMismatchError,
    ExpiredError,
    HotglmError,
    ReplayedError,
    SignatureError,
    TrustError,
    shorten_repr,
)
from hotglm.integrations.model_signing import verify_bundle, verify_release_bundle
from hotglm.release.directory import is_release
from hotglm.trust.policy import Accepted

__all__ = ["OUTCOMES", "VERIFY", "find_outcome"]

OUTCOMES: tuple[tuple[type[HotglmError], str, int], ...] = (
    (SignatureError, "signature refused", 3),
    (DigestMismatchError, "digest mismatch", 4),
    (ExpiredError, "expired", 5),
    (ReplayedError, "rolled back", 6),
    (TrustError, "trust unusable", 7),  # with TrustStateError; behind the three that it is the base of
)
"""What a refusal is called, and the exit code of it; anything else is an error, and 2."""


def find_outcome(error: HotglmError) -> tuple[str, int]:
    """Return what a refusal is called, and its exit code."""
    for kind, word, code in OUTCOMES:
        if isinstance(error, kind):
            return word, code
    return "error", ERROR


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="RELEASE", help="its directory; with --store a label, version or number")
    parser.add_argument("--store", metavar="STORE", help="the store that RELEASE is in")
    add_trust_options(parser, is_required=False)
    parser.add_argument("--model-signing", dest="bundle", metavar="BUNDLE", help="a bundle of OpenSSF model-signing")
    parser.add_argument("--key", metavar="PUB", help="with --model-signing: the public key to believe, a PEM file")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    _verify_arguments(arguments)
    try:
        if arguments.bundle is not None:
            return _verify_bundle(arguments)
        accepted, is_delta = _verify(arguments)
    except HotglmError as error:
        word, code = find_outcome(error)
        if code == ERROR:
            raise
        if arguments.json:
            document = {"accepted": False, "outcome": word, "code": error.code, "message": str(error)}
            print_json("hotglm.verify/1", document)
        print(f"hotglm: {type(error).__name__}: {error}", file=sys.stderr)
        return code
    if arguments.json:
        print_json("hotglm.verify/1", {"accepted": True, "outcome": "accepted", **_describe(accepted)})
    else:
        _show(accepted, is_delta=is_delta)
    return OK


def _verify_arguments(arguments: argparse.Namespace) -> None:
    by_trust = [arguments.roots is not None, arguments.state is not None]
    by_bundle = [arguments.bundle is not None, arguments.key is not None]
    if not (all(by_trust) and not any(by_bundle)) and not (all(by_bundle) and not any(by_trust)):
        raise ArgumentError(
            "Expected either --roots and --state, or --model-signing and --key.",
            remedy="say whom to believe: `hotglm verify RELEASE --roots ROOTS --state STATE`, for example.",
        )


def _verify_bundle(arguments: argparse.Namespace) -> int:
    """Verify what a bundle vouches for: a release and every byte of it, or the files of another directory."""
    with contextlib.ExitStack() as stack:
        if arguments.store is None and not is_release(arguments.release):
            verified = verify_bundle(arguments.release, arguments.bundle, public_key=arguments.key)
        else:
            release = stack.enter_context(open_target(arguments.release, store=arguments.store))
            verified = verify_release_bundle(release, arguments.bundle, public_key=arguments.key)
            bar = stack.enter_context(ProgressBar(sys.stderr))
            release.verify(progress=bar.tell)
    if arguments.json:
        document = {"accepted": True, "outcome": "accepted", "path": verified.path, "files": dict(verified.files)}
        print_json("hotglm.verify/1", document)
    else:
        print(f"accepted: {shorten_repr(verified.path)}, {show_count(len(verified.files), 'file')}, by its bundle")
        print("Neither history nor expiry were asked: a bundle has none.")
    return OK


def _verify(arguments: argparse.Namespace) -> tuple[Accepted, bool]:
    trust = open_trust_from(arguments)
    with open_target(arguments.release, store=arguments.store) as release, ProgressBar(sys.stderr) as bar:
        accepted = trust.verify(release)
        release.verify(progress=bar.tell)
        return accepted, release.manifest.delta is not None


def _describe(accepted: Accepted) -> dict[str, object]:
    return {
        "name": accepted.model,
        "version": str(accepted.version),
        "sequence": accepted.sequence,
        "digest": accepted.digest,
        "slot": accepted.slot,
        "roles": list(accepted.roles),
        "keys": list(accepted.key_ids),
        "roots_version": accepted.roots_version,
        "is_confirmed": accepted.is_confirmed,
    }


def _show(accepted: Accepted, *, is_delta: bool) -> None:
    where = "" if accepted.slot is None else f" for slot {shorten_repr(accepted.slot)}"
    print(f"accepted: {shorten_repr(accepted.model)} {accepted.version}, number {accepted.sequence}{where}")
    print(f"role {', '.join(accepted.roles)} of roots {accepted.roots_version} says so, by")
    for key_id in accepted.key_ids:
        print(f"  {key_id}")
    print("verified: every byte is the one that was signed")
    if is_delta:
        print("What it builds on was not read; it is held against signed digests when this is staged or materialised.")
    if accepted.is_confirmed:
        print("It was confirmed last: neither floors nor expiry were asked.")


VERIFY = Command(
    name="verify",
    summary="tell whether this host accepts a release: signatures, history, expiry, every byte",
    epilog="Exit code: 0 accepted, 3 signature refused, 4 digest mismatch, 5 expired, 6 rolled back, 7 roots or memory "
    "unusable, 2 on any other error.",
    add_arguments=_add_arguments,
    run=_run,
)
