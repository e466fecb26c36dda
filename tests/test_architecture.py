"""The house stays as DESIGN section 4 draws it: who may import whom, what stays light, what is public."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

import hotglm
from support.imports import Import, find_cycle, find_imports, find_modules

ROOT = Path(__file__).resolve().parent.parent
MODULES = find_modules(ROOT / "hotglm")
IMPORTS = tuple(find_imports(MODULES))

# The layers of DESIGN section 4, lowest first. A unit is a module or a package directly under `hotglm`.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "events", "problem", "progress", "quantity", "seam", "source_errors", "version"}),
    frozenset(
        {
            "breakage",
            "call_spec",
            "comparison",
            "compatibility",
            "config_spec",
            "contract",
            "delta_fields",
            "delta_payload",
            "delta_plan",
            "delta_reader",
            "document",
            "envelope",
            "environment",
            "environment_comparison",
            "field_reader",
            "file_entry",
            "header",
            "manifest",
            "manifest_fields",
            "manifest_reader",
            "migration",
            "output_breakage",
            "output_comparison",
            "output_spec",
            "record",
            "roots",
            "spelling",
            "tensor_entry",
            "verdict",
        }
    ),
    frozenset({"deltas", "model", "release", "trust", "weights"}),
    frozenset({"slot"}),
    frozenset({"rollout", "watching"}),
    frozenset({"testing"}),
    frozenset({"__main__", "cli", "commands", "demo", "integrations", "pytest_plugin"}),
)
LAYER_OF = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}

# Units that start without torch: words, promises, releases, and the doors whose `--help` has to answer at once.
TORCH_FREE = LAYERS[0] | LAYERS[1] | {"release", "trust", "__main__", "cli", "commands"}

# Units without IO: layers 0 and 1, but for the seam, which is there to be the IO.
IO_FREE = (LAYERS[0] | LAYERS[1]) - {"seam"}
IO_MODULES = frozenset(
    {"glob", "io", "mmap", "os", "pathlib", "select", "shutil", "signal", "socket", "subprocess", "tempfile", "urllib"}
)

# Imports for type checkers that point up, each with its reason: (importer, target).
TYPING_UP = {
    ("hotglm.problem", "hotglm.slot.receipt"): "a refused stage's error carries its receipt; nothing is imported",
    ("hotglm.errors", "hotglm.verdict"): "IncompatibleError carries a verdict; nothing is imported when it runs",
}

# Imports inside functions, each with its reason: (importer, target).
INSIDE_FUNCTIONS: dict[tuple[str, str], str] = {
    ("hotglm.pytest_plugin", "hotglm.testing.cell_run"): "a suite that runs no cell must not wait for torch",
    ("hotglm.pytest_plugin", "hotglm.testing.golden_shelf"): "likewise for goldens",
}

# Who may use the public face, as its users do.
FACE_USERS = {
    "cli": "`--version` prints the package's version, which stands in the face for the build to find",
    "demo": "it is a user's program, and prints the lines that it ran",
}

# Third parties beyond the core dependencies, and the units that may import them.
EXTRAS_USERS = {
    "cryptography": {"trust"},
    "numpy": {"demo"},
    "pytest": {"pytest_plugin"},
    "rich": {"cli", "commands"},
    "sklearn": {"demo"},
    "transformers": {"integrations"},
}

FORBIDDEN_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|misc|manager)$")
MAX_LINES = 400
MAX_IMPORT_MS = 30

PUBLIC_NAMES = [
    "Accepted",
    "Add",
    "AddField",
    "AmbiguousPathError",
    "Apply",
    "ArgumentError",
    "AsyncSession",
    "Breakage",
    "Bump",
    "CallSpec",
    "CallableCheckError",
    "Cast",
    "CheckError",
    "CompatibilityMode",
    "Concatenate",
    "ConfigSpec",
    "ConflictError",
    "Constant",
    "Contract",
    "Copy",
    "DefinitionError",
    "DeltaChainError",
    "DeltaError",
    "DeltaPolicy",
    "DigestMismatchError",
    "DiscardedError",
    "DrainTimeoutError",
    "Drop",
    "DropField",
    "Event",
    "ExpiredError",
    "Flip",
    "FreeMemory",
    "Generation",
    "Golden",
    "GoldenMismatchError",
    "HeaderError",
    "HistoryEntry",
    "Holder",
    "HotglmError",
    "InPlace",
    "InPlaceRecord",
    "Incompatibility",
    "IncompatibleError",
    "LiveMismatchError",
    "LiveProof",
    "LoadBelow",
    "Manifest",
    "MapField",
    "MemoryPlanError",
    "MemoryPolicy",
    "MigrationError",
    "MigrationGraphError",
    "MigrationPath",
    "MigrationStepError",
    "Migrations",
    "MissingExtraError",
    "ModuleError",
    "ModuleSlot",
    "NoPathError",
    "NoRollbackError",
    "NonFiniteError",
    "Normal",
    "NotMaterializedError",
    "Ones",
    "OutputSpec",
    "Pad",
    "Permute",
    "Problem",
    "Progress",
    "PublicKey",
    "QuantizedFrom",
    "Receipt",
    "ReentrantError",
    "RefreshError",
    "Release",
    "ReleaseDetails",
    "ReleaseError",
    "Released",
    "Rename",
    "RenameField",
    "ReplayedError",
    "Requantize",
    "Reshape",
    "Role",
    "Roots",
    "Scale",
    "Session",
    "ShardIndexError",
    "SignatureError",
    "SigningKey",
    "Slice",
    "SlotClosedError",
    "SlotStateError",
    "SourceChangedError",
    "SourceError",
    "SourceReadError",
    "Split",
    "Stack",
    "StageFailedError",
    "StagePolicy",
    "StageTimeoutError",
    "Staged",
    "StaleStateError",
    "State",
    "StatePlan",
    "StateSpec",
    "Status",
    "Store",
    "StoreBusyError",
    "StoreConflictError",
    "StoreError",
    "StoreWriteError",
    "SupersededError",
    "TensorSpec",
    "TensorValueError",
    "ThreadStartError",
    "Tie",
    "TimeWindow",
    "Transpose",
    "Trust",
    "TrustError",
    "TrustStateError",
    "UncopyableError",
    "UnknownVersionError",
    "Unstack",
    "UnswappableError",
    "Untie",
    "Verdict",
    "Version",
    "VersionRange",
    "VersionSyntaxError",
    "WarmUpError",
    "WatchPolicy",
    "WatchStatus",
    "Watcher",
    "WrongBaseError",
    "Yielding",
    "Zeros",
    "contract_of",
    "create_trust",
    "find_breakages",
    "find_incompatibilities",
    "make_delta",
    "materialize",
    "migrate_weights",
    "migrations_of",
    "note_stream",
    "open_release",
    "open_store",
    "open_trust",
    "pack",
    "publish_delta",
    "read_public_key",
    "refresh",
    "required_bump",
    "save_weights",
    "sign_release",
    "sign_roots",
    "versioned",
    "watch",
    "write_public_key",
    "write_roots",
]


def unit_of(module: str) -> str:
    """Return the module or package directly under `hotglm` that `module` is in; empty for the face and for others."""
    return module.split(".")[1] if module.startswith("hotglm.") else ""


def is_own(module: str) -> bool:
    """Tell whether `module` is hotglm's."""
    return module == "hotglm" or module.startswith("hotglm.")


def find_upward(imports: Sequence[Import]) -> list[str]:
    """Return the imports that point up and are not excused."""
    return [
        str(entry)
        for entry in imports
        if {unit_of(entry.importer), unit_of(entry.target)} <= set(LAYER_OF)
        if LAYER_OF[unit_of(entry.target)] > LAYER_OF[unit_of(entry.importer)]
        if not (entry.where == "typing" and (entry.importer, entry.target) in TYPING_UP)
    ]


def find_through_face(imports: Sequence[Import], packages: frozenset[str]) -> list[str]:
    """Return the imports of a name from a package's face instead of from the module that defines it."""
    return [
        str(entry)
        for entry in imports
        if entry.target in packages and is_own(entry.target)
        if not (entry.target == "hotglm" and unit_of(entry.importer) in FACE_USERS)
    ]


def run_python(code: str, *arguments: str) -> str:
    """Run `code` in a fresh interpreter at the root of the checkout and return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


PACKAGES = frozenset(name for name, path in MODULES.items() if path.name == "__init__.py")


def test_every_module_has_a_layer() -> None:
    """Every module stands in the layer table, which is the one of DESIGN section 4."""
    assert {unit_of(name) for name in MODULES} - {""} - set(LAYER_OF) == set()


def test_imports_point_down() -> None:
    """No module imports one of a higher layer, not even inside a function."""
    assert find_upward(IMPORTS) == []


@pytest.mark.parametrize("grain", ["modules", "units"])
def test_imports_have_no_cycle(grain: str) -> None:
    """Neither modules nor the units of the house import each other in a circle, at run time or inside functions."""
    edges = [(entry.importer, entry.target) for entry in IMPORTS if entry.where != "typing" and is_own(entry.target)]
    if grain == "units":
        edges = [(unit_of(start), unit_of(end)) for start, end in edges]
        edges = [(start, end) for start, end in edges if start != end and end]
    assert find_cycle(edges) == []


def test_imports_are_absolute_and_name_the_defining_module() -> None:
    """Imports are absolute, and a name is imported from the module that defines it, not through a package's face."""
    assert [str(entry) for entry in IMPORTS if entry.level] == []
    assert find_through_face(IMPORTS, PACKAGES) == []


def test_imports_inside_functions_are_listed() -> None:
    """An import stands at the top of its module unless the list says why it cannot; the list has no stale line."""
    found = {(entry.importer, entry.target) for entry in IMPORTS if entry.where == "function"}
    assert found == set(INSIDE_FUNCTIONS)
    upward = {(entry.importer, entry.target) for entry in IMPORTS if entry.where == "typing"}
    assert set(TYPING_UP) <= upward


def test_the_scanner_sees_what_it_must(tmp_path: Path) -> None:
    """The scanner catches a planted cycle, upward import, import through a face and import inside a function."""
    package = tmp_path / "hotglm"
    (package / "slot").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "slot" / "__init__.py").write_text("")
    (package / "slot" / "slot.py").write_text("from hotglm import errors, ModuleSlot\n")
    (package / "errors.py").write_text("def f():\n    from hotglm.slot import slot\n")
    modules = find_modules(package)
    imports = tuple(find_imports(modules))
    assert find_upward(imports) == ["hotglm.errors:2 imports hotglm.slot.slot"]
    assert find_through_face(imports, frozenset({"hotglm", "hotglm.slot"})) == [
        "hotglm.slot.slot:1 imports hotglm (ModuleSlot)"
    ]
    assert find_cycle((entry.importer, entry.target) for entry in imports) == [
        "hotglm.errors",
        "hotglm.slot.slot",
        "hotglm.errors",
    ]
    assert [entry.target for entry in imports if entry.where == "function"] == ["hotglm.slot.slot"]


def test_third_parties_are_the_declared_ones() -> None:
    """The core imports its declared dependencies and the standard library; an extra's package only where listed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {re.split(r"[<>=!~;\[ ]", line)[0].replace("-", "_") for line in project["dependencies"]}
    foreign = [
        str(entry)
        for entry in IMPORTS
        if not is_own(entry.target)
        if (top := entry.target.partition(".")[0]) not in core | sys.stdlib_module_names
        if unit_of(entry.importer) not in EXTRAS_USERS.get(top, ())
    ]
    assert foreign == []
    assert core == {"packaging", "safetensors", "torch", "typing_extensions"}


def test_torch_free_layers_name_no_torch() -> None:
    """Layers 0 and 1 and `release/` do not import torch or safetensors anywhere, types and functions included."""
    bound = TORCH_FREE - {"__main__", "cli"}
    tensors = {"torch", "safetensors"}
    assert [str(e) for e in IMPORTS if unit_of(e.importer) in bound and e.target.partition(".")[0] in tensors] == []


def test_torch_free_modules_start_without_torch() -> None:
    """Every torch-free module, and the face, can be imported where torch is not installed."""
    names = [name for name in MODULES if unit_of(name) in TORCH_FREE | {""}]
    code = """
import importlib, sys
sys.modules["torch"] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""
    assert int(run_python(code, *names)) == len(names)


def test_layers_0_and_1_do_no_io() -> None:
    """Words and promises touch no file, socket, process or memory map; only the seam does."""
    imported = [str(e) for e in IMPORTS if unit_of(e.importer) in IO_FREE and e.target.partition(".")[0] in IO_MODULES]
    assert imported == []
    calls = [
        f"{name}:{node.lineno} calls {node.func.id}"
        for name, path in MODULES.items()
        if unit_of(name) in IO_FREE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"input", "open", "print"}
    ]
    assert calls == []


def test_public_names_are_pinned() -> None:
    """The public names are exactly these, sorted, in the list, the map and what type checkers see alike."""
    assert sorted(PUBLIC_NAMES) == PUBLIC_NAMES
    assert hotglm.__all__ == PUBLIC_NAMES
    assert list(hotglm._EXPORTS) == PUBLIC_NAMES
    stub = ast.parse((ROOT / "hotglm" / "__init__.pyi").read_text(encoding="utf-8"))
    froms = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {name.asname: node.module for node in froms for name in node.names} == hotglm._EXPORTS
    assert all(name.name == name.asname for node in froms for name in node.names)
    assert set(PUBLIC_NAMES) <= set(dir(hotglm))


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves(name: str) -> None:
    """A public name is the object its module defines, and that module lists it as public too."""
    module = importlib.import_module(hotglm._EXPORTS[name])
    assert getattr(hotglm, name) is getattr(module, name)
    assert name in module.__all__


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt public name raises AttributeError that names it, as in any module."""
    with pytest.raises(AttributeError, match="Modulslot"):
        getattr(hotglm, "Modulslot")  # noqa: B009  # a type checker refuses the plain form


def test_import_is_cheap() -> None:
    """`import hotglm` adds less than 30 ms to `import torch`, and by itself imports neither torch nor packaging."""
    code = """
import sys
import hotglm
assert not {"torch", "packaging", "safetensors"} & set(sys.modules), "an eager import"
"""
    run_python(code)
    assert measure_import_ms("import hotglm") < MAX_IMPORT_MS


def measure_import_ms(statement: str, *, num_tries: int = 7) -> float:
    """Return the least time that `statement` takes after `import torch`, in ms; each try is a fork that starts cold."""
    code = """
import os, sys, time
import torch
for _ in range(int(sys.argv[2])):
    if (child := os.fork()) == 0:
        start = time.perf_counter()
        exec(sys.argv[1])
        os.write(1, f"{(time.perf_counter() - start) * 1e3}\\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
"""
    return min(float(line) for line in run_python(code, statement, str(num_tries)).split())


def test_no_module_starts_a_thread_when_imported() -> None:
    """Importing every module of hotglm starts no thread."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    code = """
import importlib, sys, threading
import torch
started = []
start = threading.Thread.start
threading.Thread.start = lambda thread: (started.append(thread.name), start(thread))
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not started, started
"""
    run_python(code, *names)


def test_no_module_has_a_name_that_says_nothing() -> None:
    """No module is called utils, helpers, common, misc or manager, alone or at the end of a longer name."""
    assert [name for name in MODULES if FORBIDDEN_NAMES.search(name.rpartition(".")[2])] == []


@pytest.mark.parametrize("name", MODULES)
def test_module_is_short_and_introduces_itself(name: str) -> None:
    """A module has at most 400 lines, and starts with a docstring unless it is an empty package."""
    text = MODULES[name].read_text(encoding="utf-8")
    num_lines = text.count("\n")
    assert num_lines <= MAX_LINES
    assert not text.strip() or ast.get_docstring(ast.parse(text))
