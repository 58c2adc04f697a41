"""Temporary local copies of videos that lie in a bucket or an archive."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from etils import epath

from data_prep.scratch import Scratch
from ymplug_jax.data.video_container import Reject


class Copies:
    """Temporary copies. One process uses an object; the folder is made at the first copy."""

    def __init__(self) -> None:
        self._scratch: Scratch | None = None

    @contextlib.contextmanager
    def new(self, name: str, shown: str | epath.Path) -> Iterator[Path]:
        """Give the path of a copy to write, which is deleted afterwards. It ends as `name` does, since decoders look at the suffix.

        Messages of decoders name the copy; in a Reject they name `shown` instead.
        """
        if self._scratch is None:
            self._scratch = Scratch()
        local = self._scratch.path / f"video{PurePosixPath(name).suffix}"
        try:
            yield local
        except Reject as reject:
            raise Reject(reject.reason, reject.detail.replace(str(local), str(shown))) from None
        finally:
            local.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the folder of the copies."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
