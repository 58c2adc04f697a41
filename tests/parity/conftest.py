"""Stored outputs of the PyTorch reference. `--golden ROOT` reads other fixtures with the same folders and file names."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

DEFAULT = Path(__file__).parents[1] / "golden"


class File:
    """A fixture file that records which of its arrays no check has used. `config` holds its settings."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.arrays = dict(arrays)
        self.config = json.loads(str(self.arrays.pop("config")))
        self.unused = set(self.arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        self.unused.discard(name)
        return self.arrays[name]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose name starts with `prefix/`, keyed by the rest of the name."""
        return {name.removeprefix(f"{prefix}/"): self[name] for name in self.arrays if name.startswith(f"{prefix}/")}

    def check(self, name: str, value: np.ndarray, tolerance: float) -> None:
        expected, value = self[name], np.asarray(value)
        assert value.shape == expected.shape, f"{name}: shape {value.shape}, expected {expected.shape}"
        error = np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-30)
        print(f"{error:.1e}  {name}")  # shown by `pytest -rP`
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance}"

    def check_all(self, prefix: str, values: dict[str, np.ndarray], tolerance: float) -> None:
        """Check every array stored below `prefix`, which may be some of `values`."""
        names = [name for name in self.arrays if name.startswith(f"{prefix}/")]
        assert names, f"the file has no {prefix}/*"
        for name in names:
            self.check(name, values[name.removeprefix(f"{prefix}/")], tolerance)

    def done(self) -> None:
        assert not self.unused, f"arrays that no check used: {sorted(self.unused)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", help=f"root of the golden fixtures with one folder for each model (default: {DEFAULT})"
    )


@pytest.fixture(scope="module")
def golden_folder(request: pytest.FixtureRequest) -> Path:
    """Folder of the model that the test module is named after. The module is skipped if the root has no such folder."""
    root = Path(request.config.getoption("golden", None) or DEFAULT)
    if not root.is_dir():
        raise pytest.UsageError(f"--golden {root}: no such folder; give the root of the golden fixtures")
    folder = root / request.module.__name__.rpartition(".")[2].removeprefix("test_")
    if not folder.is_dir():
        pytest.skip(f"{root} has no folder {folder.name}")
    return folder


@pytest.fixture(scope="module")
def golden(golden_folder: Path) -> Callable[[str], Path]:
    """Path of a fixture file by name. The test fails if the file is missing."""

    def path(name: str) -> Path:
        file = golden_folder / name
        assert file.is_file(), f"{file} is missing"
        return file

    return path


@pytest.fixture(scope="module")
def read(golden: Callable[[str], Path]) -> Callable[[str], File]:
    """Open a fixture file by name."""
    return lambda name: File(golden(name))
