"""Source distribution and wheel: their metadata, and an installation in a fresh environment."""

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sdist and wheel of the files that git tracks. No network is needed."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with the wheel; its dependencies are those of the present environment."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    bare = folder / "bin" / "python"
    (site,) = folder.glob("lib/python3*/site-packages")
    (wheel,) = built.glob("*.whl")
    run(bare, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return bare


def clean() -> dict[str, str]:
    """The environment without the checkout on Python's path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}


def test_metadata(built: Path):
    pytest.importorskip("twine")
    files = sorted(built.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    assert run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built).count("PASSED") == 2


def test_the_source_distribution_holds_what_a_build_needs(built: Path):
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "setup.cfg",
        "README.md",
        "LICENSE",
        "ymplug_jax/main.py",
        "configs/tiny/pretrain.py",
    } <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "ymplug_jax/reports").glob("*.html")} <= names


def test_programs_of_the_wheel_run_from_another_folder(python: Path, tmp_path: Path):
    said = run(python, "-c", "import ymplug_jax; print(ymplug_jax.__file__)", cwd=tmp_path, env=clean())
    assert str(python.parent.parent.resolve()) in str(Path(said.strip()).resolve())
    assert "--checkpoint" in run(python, "-m", "ymplug_jax.predict", "--help", cwd=tmp_path, env=clean())
    plan = [python, "-m", "ymplug_jax.main", "--config", "configs/tiny/pretrain.py", "--mode", "plan"]
    out = run(*plan, "--config.data.examples=100", cwd=tmp_path, env=clean())
    assert out.splitlines()[-1].startswith("{")
