"""Train, evaluate and serve the Youku-mPLUG family of Chinese video-language models in JAX.

`load` opens a trained run for use in Python; see `ymplug_jax.api`.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ymplug_jax.api import load as load

# Settings of the libraries that read buckets; a value in the environment wins. They must stand before etils and fsspec are imported.
os.environ.setdefault(
    "EPATH_USE_TF", "false"
)  # etils, Orbax and TFDS: gs:// through gcsfs, also where TensorFlow is installed
os.environ.setdefault("FSSPEC_GCS_USE_LISTINGS_CACHE", "false")  # a cached listing does not show what others wrote
os.environ.setdefault("FSSPEC_S3_USE_LISTINGS_CACHE", "false")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")  # else it waits for a silent server without end
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # true: zonal buckets, with one more service to ask

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load`, imported at its first use: `import ymplug_jax` imports neither JAX nor anything else that is heavy."""
    if name == "load":
        from ymplug_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
