"""Perplexity of titles under a language model of this project: a run of the task `language`.

Off unless `config.titles.language_model` names a run. Without it the score `title_perplexity` is None, which says that no model looked
at the title. `TitleModel` loads JAX and the weights at its first call, so that a pipeline creates one in each worker.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from data_prep.curation.settings import Titles
from data_prep.curation.title_text import clean, compact


class Perplexity(Protocol):
    """Anything that says how improbable titles are."""

    def __call__(self, titles: Sequence[str]) -> list[float | None]:
        """Return the perplexity per character of each title, None for one that cannot be measured."""
        ...


class TitleModel:
    """The language model of a run, see `ymplug_jax.load`."""

    def __init__(self, run: str):
        """Name the run's folder; it is opened at the first call."""
        self._run = run
        self._model: Any = None  # a ymplug_jax.api.VideoModel

    def __call__(self, titles: Sequence[str]) -> list[float | None]:
        """Return the perplexity per character of each title; None for a title without letters or digits.

        Raises:
          Mistake: the folder holds no run of the task `language`, or its weights are damaged.
        """
        if self._model is None:
            import ymplug_jax

            self._model = ymplug_jax.load(self._run, needs="perplexity")
        cleaned = [clean(title) for title in titles]
        asked = [title for title in cleaned if compact(title)]
        found = iter(self._model.perplexity(asked) if asked else ())
        return [next(found) if compact(title) else None for title in cleaned]


def perplexity_of(settings: Titles) -> Perplexity | None:
    """Return the model of the settings, None if they name none."""
    return TitleModel(settings.language_model) if settings.language_model else None
