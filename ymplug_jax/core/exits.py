"""How programs end: the exit codes that launch scripts read, and the errors that lead to them."""

MISTAKE = 2  # in the settings, flags, paths or data; the same command fails again, so it is never retried
DOES_NOT_FIT = 3  # --mode compile: the step needs more memory than a chip has
LOST = 4  # another process of the run is missing or gone
PLACE = 5  # a disk, folder or bucket failed in the middle of a run; worth a bounded number of retries
STOPPED = 130  # Ctrl-C where nothing is to be saved: as shells count it, 128 and SIGINT


class Mistake(ValueError):
    """Something that the user can mend. The message is one line that names the file or setting and the fix; exit code MISTAKE."""


class PlaceFailed(RuntimeError):
    """A place that worked at the start failed later: a shard vanished, a disk is full. The message is one line; exit code PLACE."""
