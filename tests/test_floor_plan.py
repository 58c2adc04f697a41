"""The layering of the package: imports go down one list, heavy libraries stay in few places, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ymplug_jax"
# Imports go down this list or stay inside one package. Packages in the same row do not import each other.
FLOORS = (
    ("main", "predict", "api", "demo", "compare", "grade", "command_line"),
    ("inference", "analysis", "grading"),
    ("training",),
    ("reports",),
    ("convert",),
    ("tasks",),
    ("models", "data"),
    ("core",),
)
FLOOR = {name: -floor for floor, names in enumerate(FLOORS) for name in names}
HEAVY = {
    "tensorflow": ["data_prep"],
    "apache_beam": ["data_prep"],
    "av": ["data_prep", "ymplug_jax/data"],
    "torch": ["convert"],
    "transformers": ["convert"],
}
# The reader takes the Example protobuf from TFDS, which loads without TensorFlow.
TFDS_HOMES = ("data_prep", "ymplug_jax/data/records.py")
SOURCES = sorted(
    p for folder in ("ymplug_jax", "data_prep", "configs", "benchmarks") for p in (ROOT / folder).rglob("*.py")
)
IDS = [str(p.relative_to(ROOT)) for p in SOURCES]


def imports_of(path: Path) -> set[str]:
    """Return the dotted names of all imports of a file, including those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def box_of(path: Path) -> str:
    """Return the package below ymplug_jax that holds the file: "models", "training", ..."""
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
    box, names = box_of(path), imports_of(path)
    used = ours(names)
    assert not any(name.split(".")[0] == "data_prep" for name in names), f"{path} imports data_prep"
    assert "convert" not in used or box == "convert", f"{path} imports convert"
    if box == "__init__":
        assert used == {"api"}  # at the first use of `load`, see test_import_is_quick_and_light
        return
    if box == "convert":
        assert used <= {"convert", "models", "core"}
        return
    for name in used - {box}:
        assert name in FLOOR, f"{path}: {name} has no floor"
        top = FLOOR[box] == FLOOR["main"]
        assert FLOOR[name] < FLOOR[box] or (top and FLOOR[name] == FLOOR[box]), f"{path} imports {name}"


def test_no_cycles():
    """No import cycles between modules, at any level of the package."""
    places = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    graph = {}
    for name, p in places.items():
        used = imports_of(p)
        graph[name] = ((used | {one.rpartition(".")[0] for one in used}) & places.keys()) - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]):
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def makes_a_task(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "make" for node in ast.parse(path.read_text()).body)


FAMILIES = {
    folder.name: sorted(folder.glob("*.py"))
    for folder in (PACKAGE / "tasks").iterdir()
    if folder.is_dir() and folder.name not in ("common", "__pycache__")
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tasks_do_not_import_each_other(family: str):
    """A task imports no other task, of its own or another family; shared code lies in tasks/common or a file without `make`."""
    tasks = {f"ymplug_jax.tasks.{family}.{path.stem}" for path in FAMILIES[family] if makes_a_task(path)}
    assert tasks
    for path in FAMILIES[family]:
        used = imports_of(path) | {name.rpartition(".")[0] for name in imports_of(path)}
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert not (used & tasks) - {own}, f"{path} imports another task"
        others = [f"ymplug_jax.tasks.{name}" for name in FAMILIES if name != family]
        assert not [name for name in used for other in others if f"{name}.".startswith(f"{other}.")], path


def test_shared_code_imports_no_task_family():
    """tasks/common, the task record and the packages above import no task family; configs choose the task."""
    families = tuple(f"ymplug_jax.tasks.{name}" for name in FAMILIES)
    shared = [*(PACKAGE / "tasks").glob("*.py"), *(PACKAGE / "tasks" / "common").glob("*.py")]
    above = [path for path in SOURCES if path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "tasks")]
    for path in (*shared, *above):
        assert not [name for name in imports_of(path) if name.startswith(families)], path


def test_data_prep_imports_only_data_places_and_settings():
    allowed = {
        "ymplug_jax",  # how buckets are reached; curation uses the Python API
        "ymplug_jax.core.config_file",  # thresholds are a config file
        "ymplug_jax.core.places",
        "ymplug_jax.core.place_requests",
        "ymplug_jax.core.exits",
    }
    prefixes = (
        "ymplug_jax.data.",
        "ymplug_jax.core.config.",
        "ymplug_jax.core.exits.",
    )  # settings are checked with these
    for path in (ROOT / "data_prep").rglob("*.py"):
        used = {name for name in imports_of(path) if name.startswith("ymplug_jax")}
        assert all(name in allowed or name.startswith(prefixes) for name in used), f"{path}: {used}"


def test_schema_is_standard_library():
    used = {name.split(".")[0] for name in imports_of(PACKAGE / "data" / "schema.py")}
    assert used <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_stay_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.name != "utils.py"


def test_import_is_quick_and_light():
    """`import ymplug_jax` loads neither JAX nor TensorFlow; this keeps it fast without measuring time."""
    code = (
        "import sys, ymplug_jax; print([m for m in ('jax', 'tensorflow', 'torch', 'apache_beam') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_training_loads_no_tensorflow():
    code = "import sys, ymplug_jax.training.loop, ymplug_jax.training.evaluate; print([m for m in ('tensorflow', 'torch', 'apache_beam', 'av') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_tests_are_found_by_pytest_alone() -> None:
    """`pytest`, unlike `python -m pytest`, does not put the project on the import path."""
    command = [
        Path(sys.executable).with_name("pytest"),
        "--collect-only",
        "-q",
        "tests/parity",
        "tests/test_scaling.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(PACKAGE)], ids=lambda p: p.stem)
def test_jax_is_used_by_its_public_names(path: Path):
    assert not [name for name in imports_of(path) if name.startswith("jax._src")]
    assert "jax._src" not in path.read_text(encoding="utf-8")
