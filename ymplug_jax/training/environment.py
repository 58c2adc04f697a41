"""Facts about the process of a run, for environment.json."""

import os
import platform
import sys
from importlib import metadata
from typing import Any

import jax


def facts() -> dict[str, Any]:
    """Return the content of environment.json: command, folder, devices and library versions of this process."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ymplug_jax")
    return {
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "versions": {name: metadata.version(name) for name in names},
    }
