"""What an installed wheel holds: the configs come with it and are found from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from ymplug_jax.core import config_file
print(config_file.load("configs/mplug_video/pretrain.py:1.3b").task, config_file.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of a wheel, which is built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    tree = folder / "tree"  # a build leaves files behind
    copied = subprocess.run(
        ["git", "ls-files", "-z", "ymplug_jax", "data_prep", "configs", "*.cfg", "*.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, copied.stdout.split("\0")):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_holds_every_module_and_config_and_no_test(installed: Path):
    def modules(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for folder in ("ymplug_jax", "data_prep", "configs")
            for path in (root / folder).rglob("*")
            if path.suffix in (".py", ".html")
        }

    assert modules(installed) == modules(ROOT)
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"ymplug_jax", "data_prep", "configs"}


def test_its_configs_are_found_from_another_folder(installed: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{LOAD}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, task = done.stdout.splitlines()
    assert said.endswith(f"using the file of the package, {installed}/configs/mplug_video/pretrain.py")
    assert task == f"pretrain {installed}/ymplug_jax/core/config_file.py"


def test_a_file_below_the_working_folder_comes_first(installed: Path, tmp_path: Path):
    own = tmp_path / "configs/mplug_video/pretrain.py"
    own.parent.mkdir(parents=True)
    own.write_text(
        "from ymplug_jax.core.config import Experiment, to_config_dict\n"
        "def get_config(size):\n    return to_config_dict(Experiment('language', {}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{LOAD}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("language "), done.stderr
