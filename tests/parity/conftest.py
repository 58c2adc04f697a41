"""Stored outputs of the PyTorch reference. `--golden ROOT` takes other fixtures: one folder a model, the same file names."""

from collections.abc import Callable
from pathlib import Path

import pytest

DEFAULT = Path(__file__).parents[1] / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", help=f"root of the golden fixtures, one folder a model (default: {DEFAULT})")


@pytest.fixture(scope="module")
def golden_folder(request: pytest.FixtureRequest) -> Path:
    """Folder of the model that the test module is named after; the module is skipped if the root has no such folder."""
    root = Path(request.config.getoption("golden", None) or DEFAULT)
    if not root.is_dir():
        raise pytest.UsageError(f"--golden {root}: no such folder")
    folder = root / request.module.__name__.rpartition(".")[2].removeprefix("test_")
    if not folder.is_dir():
        pytest.skip(f"{root} has no folder {folder.name}")
    return folder


@pytest.fixture(scope="module")
def golden(golden_folder: Path) -> Callable[[str], Path]:
    """Path of a fixture file by name; the test fails if the folder lacks it."""

    def path(name: str) -> Path:
        file = golden_folder / name
        assert file.is_file(), f"{file} is missing"
        return file

    return path
