"""The command line: what it prints, what it returns, and that it starts without torch."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

import hotglm
from hotglm.breakage import DtypeChanged
from hotglm.commands.console import show_size
from hotglm.errors import MissingExtraError
from support.command_line import read_json, run

Tensors = Mapping[str, tuple[str, tuple[int, ...], int]]

ITEM = {"F32": 4, "BF16": 2, "I8": 1}


def write(path: Path, *tensors: tuple[str, str, tuple[int, ...]], **metadata: str) -> Path:
    """Write a safetensors file of zeros; `metadata` keys get the `hotglm.` prefix."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = {f"hotglm.{key}": value for key, value in metadata.items()}
    end = 0
    for name, dtype, shape in tensors:
        start, nbytes = end, ITEM[dtype]
        for size in shape:
            nbytes *= size
        end = start + nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write(
        tmp_path / "old.safetensors", ("a.weight", "F32", (3, 4)), ("b", "BF16", ()), name="ranker", version="1.2.0"
    )


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_lists_what_the_header_says(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect` prints the version, the totals, the metadata and a table of the tensors."""
    assert run("inspect", old) == 0
    head, totals, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{str(old)!r}, model 'ranker', version 1.2.0"
    assert totals == "1 file, 2 tensors, 50 bytes"
    assert lines[-3:] == [
        "  name        dtype     shape   bytes",
        "  'a.weight'  float32   [3, 4]     48",
        "  'b'         bfloat16  []          2",
    ]
    assert "  'hotglm.version': '1.2.0'" in lines


def test_inspect_as_json_is_one_document(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect --json` prints one document with a schema and everything as data."""
    assert run("inspect", "--json", old) == 0
    document = read_json(capsys)
    header_nbytes = old.stat().st_size - 50
    assert document == {
        "schema": "hotglm.inspect/1",
        "path": str(old),
        "name": "ranker",
        "version": "1.2.0",
        "metadata": {"hotglm.name": "ranker", "hotglm.version": "1.2.0"},
        "has_config": False,
        "num_tensors": 2,
        "nbytes": 50,
        "files": [{"path": str(old), "size": old.stat().st_size}],
        "tensors": [
            {
                "name": "a.weight",
                "dtype": "float32",
                "shape": [3, 4],
                "nbytes": 48,
                "file": str(old),
                "offset": header_nbytes,
            },
            {
                "name": "b",
                "dtype": "bfloat16",
                "shape": [],
                "nbytes": 2,
                "file": str(old),
                "offset": header_nbytes + 48,
            },
        ],
    }


def test_inspect_reads_a_directory_with_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory in the layout of Hugging Face is inspected as a whole, whatever numbers its config has."""
    write(tmp_path / "model.safetensors", ("w", "F32", (2,)))
    (tmp_path / "config.json").write_text('{"scale": Infinity}')
    assert run("inspect", tmp_path) == 0
    assert "config with 1 field\n" in capsys.readouterr().out
    assert run("inspect", "--json", tmp_path) == 0
    assert read_json(capsys)["has_config"] is True


def test_inspect_shows_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights without tensors have no table."""
    path = write(tmp_path / "empty.safetensors")
    assert run("inspect", path) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{str(path)!r}, no version",
        "1 file, 0 tensors, 0 bytes",
        f"  file {str(path)!r}: 10 bytes",
    ]


def test_a_version_that_does_not_parse_is_no_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect` still shows a file whose version is none, with the text in the metadata."""
    assert run("inspect", write(tmp_path / "w.safetensors", version="new one")) == 0
    out = capsys.readouterr().out
    assert "no version" in out
    assert "'hotglm.version': 'new one'" in out


def test_what_a_file_says_is_never_printed_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and metadata with terminal escapes or other alphabets come out as plain ASCII, also as JSON."""
    path = write(tmp_path / "w\x1b\n.safetensors", ("gewicht-\u00e9\u4e2d", "F32", (1,)), name="\x1b[31mred\u202e")
    for words in (["inspect", path], ["inspect", "--json", path], ["diff", path, path], ["diff", "--json", path, path]):
        assert run(*words) == 0
        out = capsys.readouterr().out
        assert out.isascii()
        assert "\x1b" not in out
    assert run("inspect", tmp_path / "\x1b[31m") == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nbytes", "text"), [(1, "1 byte"), (1023, "1023 bytes"), (3 * 2**29, "1.50 GiB (1610612736 bytes)")]
)
def test_sizes_are_readable_and_exact(nbytes: int, text: str) -> None:
    """A size that is rounded for people has its exact number beside it."""
    assert show_size(nbytes) == text


# -- diff --------------------------------------------------------------------------------------------------------------


def test_the_same_layout_is_compatible(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`diff` returns 0 when only values can differ, whatever the versions claim."""
    new = write(tmp_path / "new.safetensors", ("b", "BF16", ()), ("a.weight", "F32", (3, 4)), version="2.0.0")
    assert run("diff", old, new) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "Same names, shapes and dtypes: the code that holds the old one holds the new one.",
        "Needs a step of patch, such as 1.2.1 after 1.2.0.",
        "Claims a step of major (2.0.0 after 1.2.0): enough.",
    ]


def test_another_layout_is_not_compatible(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`diff` returns 1 when the new weights do not fill the old code, with every breakage and the honest version."""
    new = write(tmp_path / "new.safetensors", ("a.weight", "I8", (3, 5)), ("c", "F32", (1,)), version="1.2.1")
    assert run("diff", old, new) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "  - SHAPE_CHANGED (minor): tensor 'a.weight' went from shape [3, 4] to [3, 5]",
        "  - DTYPE_CHANGED (minor): tensor 'a.weight' went from 'float32' to 'int8'",
        "  - TENSOR_MISSING (minor): tensor 'b' ('bfloat16', shape []) is missing",
        "  - TENSOR_UNEXPECTED (minor): tensor 'c' ('float32', shape [1]) was not there before",
        "4 breakages: the code that holds the old one cannot hold the new one.",
        "Needs a step of minor, such as 1.3.0 after 1.2.0.",
        "Claims a step of patch (1.2.1 after 1.2.0): too little.",
        "Remedies",
        "  SHAPE_CHANGED: keep the shape, or register a migration that pads, slices or reshapes it",
        f"  DTYPE_CHANGED: {DtypeChanged.remedy}",
        "  TENSOR_MISSING: keep the tensor, or register a migration that renames or drops it",
        "  TENSOR_UNEXPECTED: leave the tensor out, or register a migration that adds it with an initialiser",
    ]


def test_diff_as_json_is_one_document(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`diff --json` prints the step needed and claimed, and each breakage as data; the exit code is the same."""
    new = write(tmp_path / "new.safetensors", ("a.weight", "F32", (3, 4)), version="1.3.0")
    assert run("diff", "--json", old, new) == 1
    assert read_json(capsys) == {
        "schema": "hotglm.diff/1",
        "old": {"path": str(old), "name": "ranker", "version": "1.2.0"},
        "new": {"path": str(new), "name": None, "version": "1.3.0"},
        "compatible": False,
        "renamed": False,
        "needed": "minor",
        "claimed": "minor",
        "honest": True,
        "honest_version": "1.3.0",
        "breakages": [
            {
                "code": "TENSOR_MISSING",
                "bump": "minor",
                "message": "tensor 'b' ('bfloat16', shape []) is missing",
                "subject": "b",
                "old": {
                    "name": "b",
                    "shape": [],
                    "dtype": "bfloat16",
                    "kind": None,
                    "persistent": True,
                    "tied": None,
                },
                "remedy": "keep the tensor, or register a migration that renames or drops it",
            }
        ],
        "mode": None,
        "incompatibilities": [],
    }


def test_without_versions_diff_tells_only_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a version is not known, nothing is said about honesty."""
    path = write(tmp_path / "w.safetensors", ("w", "F32", (1,)))
    assert run("diff", path, path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Needs a step of patch."
    assert run("diff", "--json", path, path) == 0
    document = read_json(capsys)
    assert [document[key] for key in ("claimed", "honest", "honest_version")] == [None, None, None]


def test_a_label_is_enough_for_new_values(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that differ in their local label only make an honest step."""
    new = write(
        tmp_path / "n.safetensors", ("a.weight", "F32", (3, 4)), ("b", "BF16", ()), version="1.2.0+d3b07384d113"
    )
    assert run("diff", old, new) == 0
    assert "1.2.0+d3b07384d113 after 1.2.0): enough." in capsys.readouterr().out


def test_another_models_name_is_a_no(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that name another model are not compatible, whatever their layout: a slot refuses them."""
    new = write(tmp_path / "n.safetensors", ("a.weight", "F32", (3, 4)), ("b", "BF16", ()), name="scorer")
    assert run("diff", old, new) == 1
    assert "NAME_MISMATCH" in capsys.readouterr().out
    assert run("diff", "--json", old, new) == 1
    document = read_json(capsys)
    assert (document["compatible"], document["renamed"], document["breakages"]) == (False, True, [])


@pytest.mark.parametrize(
    ("before", "after", "honest"),
    [("2.0.0rc1", "2.0.0", "2.0.0"), ("2.0.0rc1", "2.0.0rc2", "2.0.0"), ("1.2.0.dev1", "1.2.0", "1.2.0")],
)
def test_the_honest_version_after_a_prerelease_is_its_release(
    before: str, after: str, honest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The release that a pre-release leads to is enough for new values, and the text does not ask for more."""
    old, new = (write(tmp_path / f"{v}.safetensors", ("w", "F32", (1,)), version=v) for v in (before, after))
    assert run("diff", old, new) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"Needs a step of patch, such as {honest} after {before}.",
        f"Claims a step of patch ({after} after {before}): enough.",
    ]


# -- errors and dispatch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["inspect", "{bad}"], ["inspect", "--json", "{bad}"], ["diff", "{good}", "{bad}"]])
def test_an_error_is_typed_and_has_no_traceback(
    words: list[str], old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is refused gives exit code 2, the error on standard error and nothing on standard output."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x03")
    assert run(*(word.format(good=old, bad=bad) for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hotglm: HeaderError: ")
    assert "HEADER_TOO_SMALL" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [[], ["dance"], ["inspect"], ["diff", "one"], ["inspect", "x", "--yaml"]])
def test_a_wrong_call_prints_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Words that make no sense give exit code 2 and the usage."""
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    assert "usage: hotglm" in capsys.readouterr().err


def plant_demo(monkeypatch: pytest.MonkeyPatch, main: object) -> None:
    module = types.ModuleType("hotglm.demo.main")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hotglm.demo.main", module)


def test_demo_gets_its_words_and_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything behind `demo` is the demo's own, --help included."""
    seen: list[list[str]] = []

    def demo(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    plant_demo(monkeypatch, demo)
    assert run("demo", "--seconds", "3", "--html", "x.html", "--help") == 7
    assert seen == [["--seconds", "3", "--html", "x.html", "--help"]]


def test_an_error_in_the_demo_is_an_error_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing extra of the demo is named without a traceback."""

    def missing(argv: list[str]) -> int:
        raise MissingExtraError("The demo needs scikit-learn.", remedy="pip install 'hotglm[demo]'.")

    plant_demo(monkeypatch, missing)
    assert run("demo") == 2
    assert capsys.readouterr().err == (
        "hotglm: MissingExtraError: The demo needs scikit-learn. Remedy: pip install 'hotglm[demo]'.\n"
    )


# -- as a process ------------------------------------------------------------------------------------------------------


def run_process(*words: object, then: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m hotglm` in an interpreter of its own, then the statement `then` at its exit."""
    script = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: exec({then!r}))\n"
        f"sys.argv[1:] = {[str(word) for word in words]!r}\n"
        "runpy.run_module('hotglm', run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "words",
    [["--help"], ["inspect", "{old}"], ["inspect", "--json", "{old}"], ["diff", "{old}", "{old}"], ["doctor", "{old}"]],
)
def test_no_command_imports_torch(words: list[str], old: Path) -> None:
    """--help, inspect, diff and doctor start without torch, safetensors or numpy."""
    heavy = "print(sorted({'torch', 'safetensors', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    done = run_process(*(word.format(old=old) for word in words), then=heavy)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def test_the_exit_code_reaches_the_shell(old: Path, tmp_path: Path) -> None:
    """`python -m hotglm diff` ends with the exit code of its answer, under a plain C locale and -O alike."""
    new = write(tmp_path / "new.safetensors", ("\u00e9", "F32", (1,)))
    done = run_process("diff", old, new, LC_ALL="C", PYTHONUTF8="0", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr) == (1, "")


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path: Path) -> None:
    """`hotglm inspect FILE | head -1` ends quietly."""
    path = write(tmp_path / "many.safetensors", *((f"layer.{n}.weight", "F32", (1,)) for n in range(5000)))
    with subprocess.Popen(
        [sys.executable, "-m", "hotglm", "inspect", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 2


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the version of the package."""
    with pytest.raises(SystemExit) as caught:
        run("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"hotglm {hotglm.__version__}\n"
