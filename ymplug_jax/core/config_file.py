"""Loading a config file: any Python file with a `get_config`, wherever it lies and wherever the program was started.

A file below a folder `configs` finds `configs.<model>.recipe` in its own tree, not in that of another checkout or of the folder
that the program was started in. A file elsewhere finds the files beside it: as `import recipe` and as `from . import recipe`.
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from ymplug_jax.core.exits import Mistake

TREE = "configs"
ALONE = "_config_file"  # package of a file that lies in no tree


def load(name: str) -> ConfigDict:
    """Settings of a config file.

    Args:
      name: "FILE.py", or "FILE.py:ARGUMENT" where `get_config` takes one.

    Raises:
      Mistake: no such file, an error in it, or a `get_config` that is missing or gives no settings; in one line.
    """
    path, colon, argument = name.partition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise Mistake(f"--config {path}: {_missing(file)}")
    file = file.resolve()
    with _own_tree(file) as module_name:
        try:
            module = _run(module_name, file)
            make = getattr(module, "get_config", None)
            if not callable(make):
                raise Mistake(f"--config {path}: no function get_config in it; it returns the settings")
            _check_argument(make, path, colon, argument)
            made = make(argument) if colon else make()
        except Mistake:
            raise
        except Exception as error:
            raise Mistake(f"--config {name}: {_where(error, file)}") from error
    if not isinstance(made, ConfigDict):
        raise Mistake(
            f"--config {name}: get_config returns {type(made).__name__}, not settings; return to_config_dict(Experiment(...))"
        )
    return made


def _missing(file: Path) -> str:
    if file.with_name(file.name + ".py").is_file():
        return f"no such file; did you mean {str(file) + '.py'!r}?"
    if file.is_dir():
        return f"a folder, not a file; there are {', '.join(sorted(p.name for p in file.glob('*.py'))) or 'none in it'}"
    if not file.parent.is_dir():
        return f"no such file, and no folder {file.parent}"
    names = sorted(other.name for other in file.parent.glob("*.py"))
    if near := difflib.get_close_matches(file.name, names, 1):
        return f"no such file; did you mean {str(file.parent / near[0])!r}?"
    return (
        f"no such file; there are {', '.join(names[:20])}" if names else "no such file, and no other config beside it"
    )


def _check_argument(make: types.FunctionType, path: str, colon: str, argument: str) -> None:
    given = (argument,) if colon else ()
    try:
        inspect.signature(make).bind(*given)
    except TypeError:
        what = f"takes no argument, {argument!r} was given" if given else "needs an argument, as FILE.py:ARGUMENT"
        raise Mistake(f"--config {path}: its get_config {what}") from None


def _run(name: str, file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise Mistake(f"--config {file}: no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _own_tree(file: Path) -> Iterator[str]:
    """Module name for the file; inside, imports find its own tree. Afterwards path and modules are as they were."""
    path, before = list(sys.path), dict(sys.modules)
    root = next((folder.parent for folder in file.parents if folder.name == TREE), None)
    top = TREE if root else ALONE
    for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
        del sys.modules[name]
    if root:
        sys.path.insert(0, str(root))
        name = ".".join(file.relative_to(root).with_suffix("").parts)
    else:
        sys.path.append(str(file.parent))  # behind all others: a file named like a library must not hide it
        name = f"{ALONE}.folder.{file.stem}"
        for package, folder in ((ALONE, file.parent.parent), (f"{ALONE}.folder", file.parent)):
            module = sys.modules[package] = types.ModuleType(package)
            module.__path__ = [str(folder)]
    importlib.invalidate_caches()
    try:
        yield name
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            where = getattr(module, "__file__", None)
            beside = name not in before and where and Path(where).parent == file.parent
            if name.split(".")[0] in (TREE, ALONE) or beside:
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def _where(error: Exception, file: Path) -> str:
    """The error in one line, with the innermost line of the user's file that led to it."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} of {error.filename or file}: {error.msg}"
    text = " ".join(str(error).split()) or "no message"
    raised = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in raised if frame.filename == str(file)]
    # The package and the recipes say by themselves what is wrong with an argument.
    if isinstance(error, ValueError) and len(raised) > 1:
        return text
    line = f" (line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{line}"
