"""Answers on stdout."""

from ymplug_jax.core.exits import PlaceFailed


class Closed(Exception):
    """The program that reads stdout has ended, such as `head`."""


def say(text: str, end: str = "\n") -> None:
    """Print a text and flush it.

    Raises:
      Closed: nobody reads stdout any more.
      PlaceFailed: stdout is redirected to a disk that is full.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise Closed from None
    except OSError as error:
        raise PlaceFailed(
            f"standard output: cannot be written ({error.strerror}); free some space or redirect to another disk, then run the same command again"
        ) from None
