"""Bundles of OpenSSF model-signing: what they vouch for, and every way in which they do not."""

from __future__ import annotations

import base64
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hotglm import cli
from hotglm.envelope import ENVELOPE_NAME
from hotglm.errors import DigestMismatchError, HotglmError, MissingExtraError, SignatureError
from hotglm.integrations.model_signing import verify_bundle, verify_release_bundle
from hotglm.release.directory import open_release
from hotglm.trust.keys import SigningKey, write_public_key
from support.scripts import run_script
from support.trusted import pack_tiny

PARTS: dict[str, Any] = {}
REASON = "it is there"
try:  # by name: where type checkers run it need not be installed
    PARTS = {name: importlib.import_module(f"model_signing.{name}") for name in ("hashing", "signing", "verifying")}
except ImportError as missing:
    REASON = f"model-signing cannot be imported: {missing}"

needs_package = pytest.mark.skipif(not PARTS, reason=REASON)


class Signed:
    """A release, its bundle, and the key that it was signed with."""

    def __init__(self, directory: Path) -> None:
        self.path = pack_tiny(directory / "a")
        self.bundle = directory / "a.bundle"
        key = SigningKey.create(directory / "key.pem", algorithm="ecdsa-p256-sha256")
        self.key = directory / "key.pub"
        write_public_key(self.key, key.public)
        self.sign(directory / "key.pem")

    def sign(self, key: Path, path: Path | None = None, **options: Any) -> None:
        config = PARTS["signing"].Config().use_elliptic_key_signer(private_key=key)
        if options:
            config.set_hashing_config(PARTS["hashing"].Config().set_ignored_paths(paths=options["ignored"]))
        config.sign(path or self.path, self.bundle)

    def verify(self) -> dict[str, str]:
        with open_release(self.path) as release:
            verified = verify_release_bundle(release, self.bundle, public_key=self.key)
            release.verify()
            return dict(verified.files)

    def refuse(self) -> HotglmError:
        with pytest.raises(HotglmError) as caught:
            self.verify()
        return caught.value


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return Signed(tmp_path)


@needs_package
def test_a_signed_release_is_accepted(signed: Signed) -> None:
    """A bundle that covers the manifest vouches for the release; the files that it names are told."""
    assert set(signed.verify()) == {"a.txt", "hotglm-manifest.json", "model.safetensors"}


@needs_package
def test_another_key_is_refused(signed: Signed, tmp_path: Path) -> None:
    """A bundle of another key is SignatureError, and so is a broken signature."""
    other = SigningKey.create(tmp_path / "other.pem", algorithm="ecdsa-p256-sha256")
    good = signed.bundle.read_bytes()
    signed.sign(tmp_path / "other.pem")
    assert isinstance(signed.refuse(), SignatureError)
    document = json.loads(good)
    document["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(other.sign_manifest(b"")[:64]).decode()
    signed.bundle.write_text(json.dumps(document))
    assert isinstance(signed.refuse(), SignatureError)
    for text in (b"", good[:-9], b"{}", good.replace(b"payload", b"payl0ad")):
        signed.bundle.write_bytes(text)
        assert isinstance(signed.refuse(), SignatureError)


@needs_package
def test_changed_files_are_refused(signed: Signed) -> None:
    """Files that are others, more or fewer than were signed are refused."""
    (signed.path / "a.txt").write_text("siDe")
    assert isinstance(signed.refuse(), DigestMismatchError)


@needs_package
def test_the_manifest_in_memory_is_what_counts(signed: Signed, tmp_path: Path) -> None:
    """A release that was opened before its files were swapped for signed ones is not vouched for."""
    evil = pack_tiny(tmp_path / "b", version="6.6.6")
    good = {file.name: file.read_bytes() for file in signed.path.iterdir()}
    for file in evil.iterdir():
        shutil.copy(file, signed.path / file.name)
    with open_release(signed.path) as release:
        for name, content in good.items():
            (signed.path / name).write_bytes(content)
        with pytest.raises(DigestMismatchError):
            verify_release_bundle(release, signed.bundle, public_key=signed.key)


@needs_package
def test_files_that_a_bundle_leaves_out_are_refused(signed: Signed, tmp_path: Path) -> None:
    """A bundle whose signer left the manifest, or any file, out vouches for nothing (NOT_COVERED)."""
    signed.sign(tmp_path / "key.pem", ignored=[signed.path / "hotglm-manifest.json"])
    assert signed.refuse().code == "NOT_COVERED"
    plain = tmp_path / "a.source"
    signed.sign(tmp_path / "key.pem", plain)
    assert set(verify_bundle(plain, signed.bundle, public_key=signed.key).files) == {"a.txt", "model.safetensors"}
    signed.sign(tmp_path / "key.pem", plain, ignored=[plain / "a.txt"])
    with pytest.raises(SignatureError) as caught:
        verify_bundle(plain, signed.bundle, public_key=signed.key)
    assert caught.value.code == "NOT_COVERED"


@needs_package
def test_a_configuration_of_the_package_is_taken(signed: Signed) -> None:
    """Whom to believe can be said by the package's own configuration."""
    config = PARTS["verifying"].Config().use_elliptic_key_verifier(public_key=signed.key)
    with open_release(signed.path) as release:
        verify_release_bundle(release, signed.bundle, public_key=config)


@needs_package
def test_the_command_tells_outcomes_apart(signed: Signed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`hotglm verify --model-signing`: 0, 3, 4, for releases and plain directories."""
    words = ["verify", str(signed.path), "--model-signing", str(signed.bundle), "--key", str(signed.key)]
    assert cli.main(words) == 0
    assert "accepted" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    (signed.path / "a.txt").write_text("siDe")
    assert cli.main(words) == 4
    words[1] = str(tmp_path / "a.source")
    assert cli.main(words) == 4
    signed.bundle.write_text("{}")
    assert cli.main(words) == 3


@pytest.mark.parametrize(
    "words",
    [[], ["--key", "k"], ["--model-signing", "b"], ["--roots", "r"], ["--roots", "r", "--state", "s", "--key", "k"]],
)
def test_one_way_of_believing_is_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Roots and memory, or a bundle and a key: neither, half or both is an error."""
    assert cli.main(["verify", "a", *words]) == 2
    assert "Expected either" in capsys.readouterr().err


def test_without_the_package_nothing_is_verified(tmp_path: Path) -> None:
    """Where model-signing is missing the error names the extra."""
    pack_tiny(tmp_path / "a")
    done = run_script(
        """
        import sys
        sys.modules["model_signing"] = None
        from hotglm.integrations.model_signing import verify_bundle
        from hotglm.errors import MissingExtraError
        try:
            verify_bundle(sys.argv[1], sys.argv[1], public_key=sys.argv[1])
        except MissingExtraError as error:
            print("hotglm[model-signing]" in str(error))
        """,
        str(tmp_path / "a"),
    )
    assert done.stdout == "True\n", done.stderr
    assert issubclass(MissingExtraError, ImportError)
    assert not (tmp_path / "a" / ENVELOPE_NAME).exists()
