"""All settings of a curation as nested frozen dataclasses, one section for each stage: thresholds and what is measured with them.

A config file (configs/curate.py) returns `to_config_dict(Curation(...))`, and `from_config_dict` checks its values. The comment of a
field, behind it or in the lines above it, is its description.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from ymplug_jax.core.config import build, settings_of
from ymplug_jax.core.exits import Mistake

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# What a score or a reason is made of. None: the score does not apply to this clip.
Scores = dict[str, float | str | None]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the container says, with packets counted instead of trusting its header."""

    min_seconds: float = 10.0  # Shortest duration of a clip, in seconds.
    max_seconds: float = 120.0  # Longest duration of a clip, in seconds.
    min_side: int = 120  # Smallest width and height, in pixels.
    max_aspect: float = 2.5  # Largest ratio of the longer to the shorter side.
    # Container formats that are kept, by FFmpeg's names; a file may go by several names, of which one is enough.
    containers: tuple[str, ...] = ("mp4", "matroska", "webm", "avi", "flv", "mpegts", "mpeg", "asf", "ogg", "rm")
    time_limit: float = 60.0  # Seconds after which reading the container of one clip is given up.


@dataclasses.dataclass(frozen=True)
class Titles:
    """The text of a title. Characters are counted as a reader counts them: an emoji is one."""

    min_length: int = 5  # Smallest number of characters.
    max_length: int = 30  # Largest number of characters.
    min_chinese: float = (
        0.25  # Smallest share of Chinese words; a Chinese character is a word, as a word of another script is.
    )
    max_run: int = 7  # Largest number of equal characters in a row, digits excepted.
    max_repeated: float = (
        0.5  # Largest share of a title that repeats what stands right before it; three copies are 0.67.
    )
    max_series: int = 1000  # Largest number of titles in the corpus that differ in numbers only; 0: any.
    max_perplexity: float = 0.0  # Largest perplexity per character under the language model; 0: any.
    language_model: str = ""  # Folder of a run of the task `language` that measures perplexity; "": it is not measured.
    blocklist: str = ""  # File of phrases that no title may have, one a line; "": no such list.
    adverts: str = ""  # File of advert phrases in place of the package's own, data_prep/curation/words/adverts.txt.
    upload_words: str = ""  # File of words of upload names in place of the package's own.
    prints: int = 64  # Hashes in the print of a title.
    bands: int = 16  # Bands of that print; titles with an equal band are compared.
    min_alike: float = 0.8  # Two titles are alike if they share at least this part of their pairs of characters, or one contains the other.


@dataclasses.dataclass(frozen=True)
class Content:
    """What the pictures show, sampled at a constant rate in one pass over the clip."""

    per_second: float = 4.0  # Frames per second that are looked at.
    min_samples: int = 16  # Frames to look at in a clip too short for that rate.
    max_samples: int = 512  # Frames to look at in a clip too long for that rate.
    side: int = 160  # Length of the longer side of a frame while it is looked at, in pixels.
    time_limit: float = 300.0  # Seconds after which decoding of one clip is given up.
    min_decoded: float = 0.9  # Smallest share of the frames that decode.
    black_level: float = 24.0  # A picture is black if 98 % of its pixels are at most this bright, of 255.
    max_black: float = 0.5  # Largest share of black frames.
    # A frame is still if the mean brightness of none of its blocks of 8 x 8 pixels differs by more than this, of 255.
    still_level: float = 4.0
    max_frozen: float = 0.9  # Largest share of still steps from frame to frame.
    # Largest blur of the median frame: 0.1 to 0.5 in sharp clips, 0.7 and more where no detail is left.
    max_blur: float = 0.68
    max_border: float = 0.5  # Largest share of the picture that black bars at its edges cover.
    # Largest share of steps that are still or cuts between still pictures, with two or more such cuts.
    max_slides: float = 0.9
    # Largest number of cuts per minute. Cuts closer than three frames that are looked at are not told from motion.
    max_cuts_per_minute: float = 60.0
    cut_level: float = 15.0  # Change of hue, saturation and brightness that a cut has at least, of 255.
    # A cut changes the picture at least so many times as much as the steps around it (PySceneDetect's adaptive detector).
    cut_ratio: float = 3.0


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Near-duplicates among the clips."""

    frames: int = 32  # Largest number of frames in the print of a clip.
    max_distance: float = 5.0  # Two frames are alike if at most so many of the 64 bits of their hashes differ.
    min_alike: float = 0.5  # Two clips are duplicates if at least this share of the shorter one is found in the other.


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Whether the title describes the video."""


@dataclasses.dataclass(frozen=True)
class Safety:
    """What must not be in the data."""


@dataclasses.dataclass(frozen=True)
class Diversity:
    """How many clips of a kind are kept, chosen by a hash of the seed and the file's name."""

    max_per_source: int = 0  # Largest number of clips of one source, clips without a source excepted; 0: any.
    seed: int = 0  # Seed of what is chosen under this limit and under --target.


@dataclasses.dataclass(frozen=True)
class Curation:
    """All settings of a curation."""

    metadata: Metadata = Metadata()  # Settings of the first stage: the container.
    titles: Titles = Titles()  # Settings of the stage that reads titles.
    content: Content = Content()  # Settings of the stage that looks at pictures.
    duplicates: Duplicates = Duplicates()  # Settings of the search for near-duplicates.
    consistency: Consistency = Consistency()  # Settings of the comparison of title and video.
    safety: Safety = Safety()  # Settings of the safety stage.
    diversity: Diversity = Diversity()  # Settings of caps and sampling.


# Minimum and maximum values by section. What is beyond them drops everything or nothing.
LEAST: Mapping[str, Mapping[str, float]] = {
    "metadata": {"min_seconds": 0, "max_seconds": 1e-3, "min_side": 16, "max_aspect": 1, "time_limit": 1},
    "titles": {
        "min_length": 1, "max_length": 1, "min_chinese": 0, "max_run": 1, "max_repeated": 0, "max_series": 0, "max_perplexity": 0,
        "prints": 4, "bands": 1, "min_alike": 0.1,
    },
    "content": {
        "per_second": 0.1, "min_samples": 2, "max_samples": 2, "side": 32, "time_limit": 1, "min_decoded": 0, "black_level": 0, "max_black": 0,
        "still_level": 0, "max_frozen": 0, "max_blur": 0, "max_border": 0, "max_slides": 0, "max_cuts_per_minute": 0,
        "cut_level": 1, "cut_ratio": 1,
    },
    "duplicates": {"frames": 1, "max_distance": 0, "min_alike": 0.01},
    "diversity": {"max_per_source": 0, "seed": 0},
}  # fmt: skip
MOST: Mapping[str, Mapping[str, float]] = {
    "titles": {"max_length": 2000, "min_chinese": 1, "max_repeated": 1, "prints": 256, "bands": 256, "min_alike": 1},
    "content": {"side": 1024, "max_samples": 4096, "min_decoded": 1, "black_level": 255, "max_black": 1, "max_frozen": 1, "max_blur": 1, "max_border": 1, "max_slides": 1},
    "duplicates": {"frames": 256, "max_distance": 24, "min_alike": 1},
}  # fmt: skip


def to_config_dict(curation: Curation) -> "ConfigDict":
    """Convert the settings to a locked ConfigDict, as a config file returns it."""
    from ml_collections import ConfigDict  # imported here: workers need only the dataclasses

    return ConfigDict(settings_of(curation), convert_dict=True).lock()


def from_config_dict(config: "ConfigDict | Mapping[str, Any]") -> Curation:
    """Build the settings from a (possibly overridden) ConfigDict or from the dict of `settings_of`.

    Raises:
      Mistake: an unknown key, a value of the wrong type or out of range, or limits that contradict each other; the message names
        the setting.
    """
    plain: dict[str, Any] = dict(config) if isinstance(config, Mapping) else config.to_dict()
    for name, section in get_type_hints(Curation).items():
        plain[name] = build(
            section, plain.get(name, {}), f"config.{name}", least=LEAST.get(name, {}), most=MOST.get(name, {})
        )
    made = build(Curation, plain, "config")
    for low, high in (
        (made.metadata, ("min_seconds", "max_seconds")),
        (made.titles, ("min_length", "max_length")),
        (made.titles, ("bands", "prints")),
        (made.content, ("min_samples", "max_samples")),
    ):
        least, most = (getattr(low, name) for name in high)
        if least > most:
            section_name = type(low).__name__.lower()
            raise Mistake(f"config.{section_name}.{high[0]}: {least} is more than {high[1]}, {most}; give less")
    return made
