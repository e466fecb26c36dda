"""`hotglm trust new|init|show|rotate|accept|lower`: roots of trust, and what this host remembers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count
from hotglm.commands.target import open_target
from hotglm.commands.trust_options import (
    add_key_options,
    add_trust_options,
    open_trust_from,
    parse_time,
    read_key,
)
from hotglm.commands.trust_text import describe_roots, describe_state, show_roots, show_state
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.roots import PublicKey, Role, Roots
from hotglm.trust.files import read_roots
from hotglm.trust.keys import read_public_key
from hotglm.trust.opening import create_trust
from hotglm.trust.policy import read_clock
from hotglm.trust.rotation import parse_any_roots
from hotglm.trust.signing import write_roots

__all__ = ["TRUST"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_new(actions.add_parser("new", help="write roots of trust, to be signed"))
    init = actions.add_parser("init", help="begin to believe in roots and to remember, once")
    init.add_argument("roots", metavar="ROOTS", help="the file of the signed roots")
    init.add_argument("--state", metavar="STATE", required=True, help="the file to remember in; nothing may be there")
    init.add_argument("--replace", action="store_true", help="put what is there aside: all floors are forgotten")
    init.add_argument("--reason", default="first use", help="for the journal")
    show = actions.add_parser("show", help="what is believed in, what was accepted, and how long ago")
    rotate = actions.add_parser("rotate", help="take newer roots, signed by the old and by themselves")
    rotate.add_argument("files", metavar="NEW", nargs="+", help="the files of the next versions, in order")
    accept = actions.add_parser("accept", help="remember a release as accepted, as a stage would")
    accept.add_argument("release", metavar="RELEASE", help="its directory; with --store a label, version or number")
    accept.add_argument("--store", metavar="STORE", help="the store that RELEASE is in")
    accept.add_argument("--confirm", action="store_true", help="as the one that a restart may always come back to, too")
    lower = actions.add_parser("lower", help="forget accepted releases, so that older ones are accepted again")
    lower.add_argument("model", metavar="MODEL", help="name of the model")
    lower.add_argument("--to", metavar="VERSION", help="the highest version that stays remembered; by default none")
    lower.add_argument("--reason", required=True, help="for the journal")
    for action in (show, rotate, accept, lower):
        add_trust_options(action, has_slot=action in (accept, lower))
    show.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _add_new(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("roots", metavar="ROOTS", help="where to; nothing may be there")
    parser.add_argument(
        "--role", metavar="NAME=PUB[,PUB...]", action="append", required=True,
        help="a role and its public keys; one is `root`, every other one signs releases",
    )  # fmt: skip
    parser.add_argument("--threshold", metavar="NAME=N", action="append", help="how many of its keys must sign (1)")
    parser.add_argument(
        "--models", metavar="NAME=MODEL[,...]", action="append", help="whose releases it may sign (any)"
    )
    parser.add_argument("--slots", metavar="NAME=SLOT[,...]", action="append", help="where they may be staged (any)")
    parser.add_argument("--revoked", metavar="PUB", action="append", default=[], help="a key that may sign nothing")
    parser.add_argument("--after", metavar="OLD", help="the roots whose next version these are")
    parser.add_argument("--expires", metavar="TIME", help="when nothing new is accepted any more: ISO 8601")
    add_key_options(parser, flag="--sign", is_required=False)


def _run(arguments: argparse.Namespace) -> int:
    return _ACTIONS[arguments.action](arguments)


# -- roots -------------------------------------------------------------------------------------------------------------


def _new(arguments: argparse.Namespace) -> int:
    files = {name: text.split(",") for name, text in _pairs(arguments.role, "--role").items()}
    keys = {
        path: read_public_key(path) for path in (*arguments.revoked, *(p for paths in files.values() for p in paths))
    }
    version = 1
    if arguments.after is not None:
        version = parse_any_roots(read_roots(arguments.after), file=arguments.after).version + 1
    roots = Roots(
        version=version,
        keys={key.id: key for key in keys.values()},
        roles=_make_roles(arguments, files, keys),
        expires_at=None if arguments.expires is None else parse_time(arguments.expires),
    )
    write_roots(arguments.roots, roots, keys=() if arguments.key is None else (read_key(arguments),))
    print("\n".join(show_roots(roots)))
    if arguments.key is None:
        print(f"not signed yet: hotglm sign {shorten_repr(arguments.roots)} --key KEY")
    return OK


def _make_roles(
    arguments: argparse.Namespace, files: Mapping[str, list[str]], keys: Mapping[str, PublicKey]
) -> dict[str, Role]:
    options = {part: _pairs(getattr(arguments, part), f"--{part}") for part in ("threshold", "models", "slots")}
    unknown = sorted({name for pairs in options.values() for name in pairs} - files.keys())
    if unknown:
        raise ArgumentError(f"Expected names of roles, got {shorten_repr(unknown[0])}.", remedy="give --role for it.")
    numbers = options["threshold"]
    if not all(number.isascii() and number.isdecimal() and len(number) < 5 for number in numbers.values()):
        raise ArgumentError("Expected --threshold NAME=N with a number.", remedy="write release=2, for example.")
    names = {part: {name: frozenset(text.split(",")) for name, text in options[part].items()} for part in options}
    return {
        name: Role(
            keys=frozenset(keys[path].id for path in paths),
            threshold=int(numbers.get(name, "1")),
            models=names["models"].get(name),
            slots=names["slots"].get(name),
        )
        for name, paths in files.items()
    }


def _pairs(texts: Iterable[str] | None, option: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in pairs:
            raise ArgumentError(
                f"Expected {option} NAME=..., each name once, got {shorten_repr(text)}.",
                remedy="write release=key.pub, for example.",
            )
        pairs[name] = value
    return pairs


# -- memory ------------------------------------------------------------------------------------------------------------


def _init(arguments: argparse.Namespace) -> int:
    trust = create_trust(arguments.roots, state=arguments.state, replaces=arguments.replace, reason=arguments.reason)
    state, roots = trust.read()
    print("\n".join(show_roots(roots)))
    print(state.journal[0].what)
    return OK


def _show(arguments: argparse.Namespace) -> int:
    state, roots = open_trust_from(arguments).read()
    now = read_clock()
    if arguments.json:
        print_json("hotglm.trust/1", {"roots": describe_roots(roots), **describe_state(state, now=now)})
    else:
        print("\n".join([*show_roots(roots), *show_state(state, now=now)]))
    return OK


def _rotate(arguments: argparse.Namespace) -> int:
    trust = open_trust_from(arguments)
    roots = trust.rotate(*arguments.files)
    print("\n".join(show_roots(roots)))
    print(trust.read()[0].journal[0].what)
    return OK


def _accept(arguments: argparse.Namespace) -> int:
    trust = open_trust_from(arguments)
    with open_target(arguments.release, store=arguments.store) as release:
        accepted = trust.verify(release)
        release.verify()
    trust.accept(accepted)
    if arguments.confirm:
        trust.confirm(accepted)
    print(f"{'confirmed' if arguments.confirm else 'accepted'} {shorten_repr(accepted.model)} {accepted.version}")
    return OK


def _lower(arguments: argparse.Namespace) -> int:
    trust = open_trust_from(arguments)
    num = trust.lower(arguments.model, arguments.to, reason=arguments.reason)
    print(f"{show_count(num, 'release')} forgotten; what is older is accepted again")
    return OK


_ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "new": _new,
    "init": _init,
    "show": _show,
    "rotate": _rotate,
    "accept": _accept,
    "lower": _lower,
}

TRUST = Command(
    name="trust",
    summary="roots of trust and what this host remembers: new, init, show, rotate, accept, lower",
    epilog="Exit code: 0 if it is done, 2 on an error; then everything is as it was.",
    add_arguments=_add_arguments,
    run=_run,
)
