"""Keeps what Beam, its workers and TensorFlow write out of the way of a program's own messages."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

from data_prep.build_flags import BuildError, PlaceError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Capture what Beam, its workers and TensorFlow write to stderr, so that only messages of this program appear.

    The last captured lines are shown if the build ends with an unexpected error.
    """
    logging.getLogger().addHandler(logging.NullHandler())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    real, shown = os.dup(2), sys.stderr
    with tempfile.TemporaryFile() as log, os.fdopen(os.dup(real), "w", encoding="utf-8", buffering=1) as ours:
        os.dup2(log.fileno(), 2)
        sys.stderr = ours
        try:
            yield
        except (BuildError, PlaceError, ValueError, OSError, KeyboardInterrupt):
            raise
        except BaseException:
            log.seek(0)
            ours.write("".join(log.read().decode("utf-8", "replace").splitlines(True)[-40:]))
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)
            sys.stderr = shown
