"""Loading of config files: any Python file with a function `get_config`, independent of the working directory.

A file below a folder `configs` imports `configs.<model>.recipe` from its own tree, not from another checkout or the working
directory. A file elsewhere imports the files beside it, as `import recipe` or `from . import recipe`.
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from ymplug_jax.core.exits import Mistake

TREE = "configs"
BESIDE = Path(__file__).parents[2]  # folder that holds the package and its configs: a checkout or site-packages
ALONE = "_config_file"  # package name for a file outside a `configs` tree


def load(name: str) -> ConfigDict:
    """Load the settings of a config file.

    Args:
      name: "FILE.py", or "FILE.py:ARGUMENT" if `get_config` takes an argument. A path "configs/..." that does not exist below
        the working directory is loaded from the configs of the package.

    Raises:
      Mistake: the file is missing or raises an error, or its `get_config` is missing or does not return settings. One line.
    """
    path, colon, argument = name.partition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        installed = BESIDE / file
        if file.parts[:1] != (TREE,) or not installed.is_file():
            raise Mistake(f"--config {path}: {_missing(file)}")
        logging.info(
            "--config %s: not found in the working directory; using the file of the package, %s", path, installed
        )
        file = installed
    file = file.resolve()
    with _own_tree(file) as module_name:
        try:
            module = _execute(module_name, file)
            make = getattr(module, "get_config", None)
            if not callable(make):
                raise Mistake(
                    f"--config {path}: no function get_config; define one that returns to_config_dict(Experiment(...))"
                )
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
        return f"a folder, not a file; give a file in it: {', '.join(sorted(p.name for p in file.glob('*.py'))) or 'it has no *.py'}"
    if not file.parent.is_dir():
        return f"no such file, and no folder {file.parent}; correct the path"
    names = sorted(other.name for other in file.parent.glob("*.py"))
    if near := difflib.get_close_matches(file.name, names, 1):
        return f"no such file; did you mean {str(file.parent / near[0])!r}?"
    return f"no such file; its folder has {', '.join(names[:20])}" if names else "no such file; correct the path"


def _check_argument(make: types.FunctionType, path: str, colon: str, argument: str) -> None:
    taken = list(inspect.signature(make).parameters.values())
    places = [one for one in taken if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD, one.VAR_POSITIONAL)]
    needed = [
        one for one in taken if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if colon and not places:
        raise Mistake(f"--config {path}: its get_config takes no argument; remove :{argument}")
    if needed and not (colon and needed == places[:1]):
        raise Mistake(f"--config {path}: its get_config needs {_words(needed)}")


def _words(needed: list[inspect.Parameter]) -> str:
    if len(needed) == 1 and needed[0].kind != needed[0].KEYWORD_ONLY:
        return "an argument, as FILE.py:ARGUMENT"
    return f"{', '.join(one.name for one in needed)}; define it with at most one argument"


def _execute(name: str, file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise Mistake(f"--config {file}: not a Python file; give a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _own_tree(file: Path) -> Iterator[str]:
    """Yield the module name of the file; imports in the block search its own tree. Restores sys.path and sys.modules."""
    path, before = list(sys.path), dict(sys.modules)
    root = next((folder.parent for folder in file.parents if folder.name == TREE), None)
    top = TREE if root else ALONE
    for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
        del sys.modules[name]
    if root:
        sys.path.insert(0, str(root))
        name = ".".join(file.relative_to(root).with_suffix("").parts)
    else:
        sys.path.append(str(file.parent))  # last, so that a file named like a library does not shadow it
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
    """Format an error in one line, with the innermost line of the config file in its traceback."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} of {error.filename or file}: {error.msg}"
    text = " ".join(str(error).split()) or "no message"
    raised = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in raised if frame.filename == str(file)]
    # ValueErrors of the package and the recipes already explain what is wrong.
    if isinstance(error, ValueError) and len(raised) > 1:
        return text
    line = f" (line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{line}"
