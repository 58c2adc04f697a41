"""Eight virtual CPU devices for every test, and one cache of compiled programs for all of them and their subprocesses."""

import collections
import contextlib
import ctypes
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Compiling is most of the time of this suite: what runs for a moment is not worth LLVM's optimisations, and many tests compile
# the same tiny step.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "ymplug_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a worker takes whole files, and would else be alone with the longest at the end."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """JAX keeps every program that it compiled, and glibc the memory of those that are gone: 4 GB at the end of all tests."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
