"""Imports go down a floor or stay inside one box; heavy libraries stay in their home; files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ymplug_jax"
FLOORS = {
    5: ["main", "demo", "compare", "command_line"],
    4: [
        "train",
        "step",
        "bench",
        "evaluate",
        "plan",
        "run",
        "predict",
        "predictor",
        "answers",
        "wording",
        "clips",
        "export",
        "page",
        "sheet",
        "reports",
        "aot",
        "chips",
        "flops",
        "hlo",
        "preflight",
        "stop",
        "best",
    ],
    3: ["tasks", "run_folder"],
    2: ["models", "data"],
    1: [
        "config",
        "sharding",
        "state",
        "optim",
        "checkpoint",
        "writer",
        "hosts",
        "quantize",
        "exits",
        "leaf_sums",
        "verified",
        "stored",
        "config_file",
        "text_files",
        "progress",
        "index_file",
    ],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
HEAVY = {
    "tensorflow": ["data_prep"],
    "apache_beam": ["data_prep"],
    "av": ["data_prep"],
    "torch": ["convert"],
    "transformers": ["convert"],
}
# TFDS lends the reader its Example protobuf, which loads without TensorFlow.
TFDS_HOMES = ("data_prep", "ymplug_jax/data/records.py")
SOURCES = sorted(
    p for folder in ("ymplug_jax", "data_prep", "configs", "benchmarks") for p in (ROOT / folder).rglob("*.py")
)
IDS = [str(p.relative_to(ROOT)) for p in SOURCES]


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def box_of(path: Path) -> str:
    """First part below ymplug_jax: "models", "train", ..."""
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("ymplug_jax.")}


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_heavy_imports_stay_home(path: Path):
    used = {name.split(".")[0] for name in imports_of(path)}
    place = path.relative_to(ROOT).as_posix()
    for library, homes in HEAVY.items():
        if library in used:
            assert any(f"{home}/" in place for home in homes) or place.startswith("benchmarks/"), (
                f"{place} imports {library}"
            )
    if "tensorflow_datasets" in used:
        assert place.startswith(TFDS_HOMES), f"{place} imports tensorflow_datasets"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.is_relative_to(PACKAGE)], ids=[i for i in IDS if i.startswith("ymplug_jax")]
)
def test_imports_go_down(path: Path):
    box = box_of(path)
    used = ours(imports_of(path))
    assert "convert" not in used or box == "convert", f"{path} imports convert"
    if box == "__init__":
        assert not used
        return
    if box == "convert":
        assert used <= {"convert", "models", *FLOORS[1]}
        return
    if box == "models":
        assert used <= {"models", "sharding"}
        return
    for name in used - {box}:
        assert name in FLOOR, f"{path}: {name} has no floor"
        assert FLOOR[name] < FLOOR[box] or (FLOOR[name] == FLOOR[box] != 2), (
            f"{path} ({FLOOR[box]}) imports {name} ({FLOOR[name]})"
        )


def test_no_cycles():
    graph = {p: {PACKAGE / f"{n}.py" for n in ours(imports_of(p))} for p in PACKAGE.glob("*.py")}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]):
        assert path not in trail, " -> ".join(p.stem for p in (*trail, path))
        if path in done:
            return
        for target in graph.get(path, ()):
            visit(target, (*trail, path))
        done.add(path)

    for path in graph:
        visit(path, ())


def test_data_prep_knows_only_the_schema():
    for path in (ROOT / "data_prep").rglob("*.py"):
        used = {name for name in imports_of(path) if name.startswith("ymplug_jax")}
        assert all(name.startswith("ymplug_jax.data.schema") or name == "ymplug_jax.data.schema" for name in used), (
            f"{path}: {used}"
        )


def test_schema_is_standard_library():
    used = {name.split(".")[0] for name in imports_of(PACKAGE / "data" / "schema.py")}
    assert used <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_stay_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.name != "utils.py"


def test_import_is_quick_and_light():
    """`import ymplug_jax` under 2 s is checked by what it loads, not by the clock: no jax, no TensorFlow."""
    code = (
        "import sys, ymplug_jax; print([m for m in ('jax', 'tensorflow', 'torch', 'apache_beam') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_training_loads_no_tensorflow():
    code = "import sys, ymplug_jax.train, ymplug_jax.evaluate; print([m for m in ('tensorflow', 'torch', 'apache_beam', 'av') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_tests_are_found_by_pytest_alone() -> None:
    """`pytest tests/parity` does not put the project on the path as `python -m pytest` does."""
    command = [
        Path(sys.executable).with_name("pytest"),
        "--collect-only",
        "-q",
        "tests/parity",
        "tests/test_scaling.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
