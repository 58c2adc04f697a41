"""Settings of a curation: both configs, values out of range, and a sentence for each setting."""

import dataclasses
import io
import re
import tokenize
from pathlib import Path
from typing import get_type_hints

import pytest

from data_prep.curation import settings
from data_prep.curation.settings import Curation, from_config_dict
from ymplug_jax.core import config_file
from ymplug_jax.core.config import settings_of
from ymplug_jax.core.exits import Mistake

ROOT = Path(__file__).parents[3]
SECTIONS = get_type_hints(Curation)


def test_the_default_config_is_the_defaults():
    assert from_config_dict(config_file.load(str(ROOT / "configs/curate.py"))) == Curation()


def test_the_tiny_config_lowers_only_the_shortest_duration():
    default, tiny = Curation(), from_config_dict(config_file.load(str(ROOT / "configs/tiny/curate.py")))
    assert tiny.metadata.min_seconds == 0.05
    metadata = dataclasses.replace(tiny.metadata, min_seconds=default.metadata.min_seconds)
    assert dataclasses.replace(tiny, metadata=metadata) == default


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"min_second": 1.0}}, "config.metadata: unknown setting 'min_second'; did you mean 'min_seconds'?"),
        ({"metadata": {"min_seconds": "ten"}}, "config.metadata.min_seconds: 'ten' is not a number; give one such as 0.5"),
        ({"metadata": {"min_seconds": 130}}, "config.metadata.min_seconds: 130.0 is more than max_seconds, 120.0; give less"),
        ({"content": {"max_black": 1.5}}, "config.content.max_black: 1.5 is out of range; give at most 1"),
        ({"contents": {}}, "config: unknown setting 'contents'; did you mean 'content'?"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_that_names_the_setting(change, message):
    with pytest.raises(Mistake) as caught:
        from_config_dict(change)
    assert str(caught.value) == message


def test_settings_survive_a_round_trip_through_plain_dicts():
    changed = Curation(metadata=settings.Metadata(min_seconds=2.0, containers=("mp4",)))
    assert from_config_dict(settings_of(changed)) == changed


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_every_setting_has_a_sentence(name):
    """The comment behind a field, or the lines above it, is a sentence."""
    source = Path(settings.__file__).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    }  # fmt: skip
    lines = source.splitlines()
    start = lines.index(f"class {SECTIONS[name].__name__}:")
    for field in dataclasses.fields(SECTIONS[name]):
        at = next(i for i in range(start, len(lines)) if re.match(rf"    {field.name}: ", lines[i])) + 1
        sentence = comments.get(at) or comments.get(at - 1, "")
        assert sentence.startswith("# ") and sentence.endswith("."), f"{name}.{field.name}: {sentence!r}"
