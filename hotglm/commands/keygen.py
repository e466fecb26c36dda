"""`hotglm keygen`: a new key to sign with; the private half readable for its owner alone."""

from __future__ import annotations

import argparse

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json
from hotglm.commands.trust_options import read_passphrase
from hotglm.errors import shorten_repr
from hotglm.roots import ALGORITHMS
from hotglm.trust.keys import SigningKey, write_public_key

__all__ = ["KEYGEN"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", metavar="KEY", help="where the private key goes; the public one goes to KEY.pub")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ed25519", help="(%(default)s)")
    parser.add_argument("--passphrase-file", metavar="FILE", help="what holds a passphrase, on the first line")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    passphrase = read_passphrase(arguments.passphrase_file)
    key = SigningKey.create(arguments.key, algorithm=arguments.algorithm, passphrase=passphrase)
    public = f"{arguments.key}.pub"
    write_public_key(public, key.public)
    if arguments.json:
        document = {"id": key.public.id, "algorithm": key.public.algorithm, "path": arguments.key, "public": public}
        print_json("hotglm.keygen/1", document)
    else:
        print(f"key {key.public.id}, {key.public.algorithm}")
        print(f"private in {shorten_repr(arguments.key)}: keep it secret, and off the hosts that verify")
        print(f"public in {shorten_repr(public)}")
    return OK


KEYGEN = Command(
    name="keygen",
    summary="make a key to sign releases and roots of trust with",
    epilog="Nothing is overwritten. Exit code: 0 if the key is there, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
