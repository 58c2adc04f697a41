"""Records of a data set: TFDS features, serialisation of rows and decoding of their files.

The data set has TFDS metadata, so `tfds.builder_from_directory` loads it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from tensorflow_datasets.proto import tf_example_pb2

from data_prep.conversations import Talk
from data_prep.rows import Row
from data_prep.videos import open_videos
from ymplug_jax.data import conversation, schema
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import Clip, Reader

KEPT = 64  # decoded files that a partition keeps for further rows with the same file


class Settings(NamedTuple):
    """Settings that determine the content of the records."""

    kind: str  # one of schema.KINDS
    num_frames: int  # frames stored per clip
    time_limit: float  # seconds per clip
    allow_links_to: tuple[str, ...] = ()  # folders outside the video root that symbolic links may point to
    tokenizer: str = ""  # conversations: file of the tokenizer that their length is measured with; "": not measured
    max_tokens: int = 0  # conversations: L
    slots: int = 0  # conversations: tokens of an image or clip
    archive_index: str = ""  # file of the index of a .tar with the videos; "": there is none


def features(kind: str, num_frames: int) -> Any:
    """Return the TFDS features of a kind. Their flattened names are the keys in `ymplug_jax.data.schema`."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
    if kind == schema.INSTRUCT:
        texts, numbers = tfds.features.Sequence(text), tfds.features.Sequence(number)
        return tfds.features.FeaturesDict(
            {
                # JPEG as bytes: the images and clips of a record differ in size, so TFDS could not stack them.
                "image": {"encoded": texts, "timestamp": numbers, "height": numbers, "width": numbers},
                "clip": {"media_id": text, "row": number},
                "chat": {"text": text, "task_type": text, "options": texts},
                "medium": {"name": texts, "still": numbers, "frames": numbers},
            }
        )
    return tfds.features.FeaturesDict(
        {
            "image": {
                "encoded": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg"), length=num_frames),
                "timestamp": tfds.features.Sequence(number, length=num_frames),
                "height": number,
                "width": number,
            },
            "clip": {"media_id": text, "row": number, "title": text, "label": {"text": text, "index": number}},
            "caption": {"string": tfds.features.Sequence(text)},
        }
    )


def serialize(row: Row, clip: Clip) -> bytes:
    """Serialise a clip and its row as a tf.train.Example."""
    return _example(
        {
            schema.IMAGE: clip.frames,
            schema.MEDIA_ID: [row.media_id.encode()],
            schema.TITLE: [row.title.encode()],
            schema.CAPTION: [caption.encode() for caption in row.captions],
            schema.LABEL_TEXT: [row.label_text.encode()],
        },
        {
            schema.TIMESTAMP: clip.timestamps,
            schema.HEIGHT: [clip.height],
            schema.WIDTH: [clip.width],
            schema.ROW: [row.number],
            schema.LABEL_INDEX: [row.label_index],
        },
    )


def serialize_talk(talk: Talk, clips: Sequence[Clip]) -> bytes:
    """Serialise a conversation and its images and clips, in the order of the placeholders, as a tf.train.Example."""
    return _example(
        {
            schema.IMAGE: [jpeg for clip in clips for jpeg in clip.frames],
            schema.MEDIA_ID: [talk.media_id.encode()],
            schema.CHAT_TEXT: [talk.text.encode()],
            schema.CHAT_TASK: [talk.task_type.encode()],
            schema.CHAT_OPTIONS: [option.encode() for option in talk.options],
            schema.MEDIUM_NAME: [name.encode() for _, name in talk.media],
        },
        {
            schema.TIMESTAMP: [moment for clip in clips for moment in clip.timestamps],
            schema.HEIGHT: [clip.height for clip in clips],
            schema.WIDTH: [clip.width for clip in clips],
            schema.ROW: [talk.number],
            schema.MEDIUM_STILL: [int(still) for still, _ in talk.media],
            schema.MEDIUM_FRAMES: [len(clip.frames) for clip in clips],
        },
    )


def _example(texts: dict[str, list[bytes]], numbers: dict[str, list[int]]) -> bytes:
    message = tf_example_pb2.Example()
    feature = message.features.feature
    for key, pieces in texts.items():
        feature[key].bytes_list.value.extend(pieces)
    for key, values in numbers.items():
        feature[key].int64_list.value.extend(values)
    return message.SerializeToString(deterministic=True)


class Media:
    """Decoder of images and clips in a child process. Keeps the latest KEPT results, since many rows may share a file."""

    def __init__(self, settings: Settings, root: str):
        self._settings = settings
        self._videos = open_videos(root, settings.allow_links_to, settings.time_limit, settings.archive_index)
        self._reader = Reader(settings.time_limit)
        self._kept: OrderedDict[tuple[bool, str], Clip | Reject] = OrderedDict()

    def read(self, name: str, *, still: bool = False) -> Clip:
        """Read a file below the video root. Raises Reject, OSError as `Videos.file` does, and DecoderFailed as `Reader.read` does."""
        key = (still, name)
        if key not in self._kept:
            try:
                with self._videos.file(name) as path:
                    self._kept[key] = self._reader.read(path, self._settings.num_frames, still=still)
            except Reject as reject:
                if reject.reason in ("missing_file", "hostile_path"):  # found without decoding
                    raise
                self._kept[key] = reject
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        found = self._kept[key]
        if isinstance(found, Reject):
            raise Reject(found.reason, found.detail)
        return found

    def forget(self) -> None:
        """Drop the results, e.g. because files may have changed since."""
        self._kept.clear()

    def close(self) -> None:
        """Stop the decoder process and delete temporary files."""
        self._reader.close()
        self._videos.close()


def is_cut(text: str, tokenizer: Tokenizer, slots: int, limit: int) -> bool:
    """Whether a conversation is longer than a row of `limit` tokens. Raises Reject if the row then holds no token of an answer."""
    if len(conversation.for_training(text, tokenizer, slots, 2**31).ids) <= limit + 1:
        return False
    if not conversation.for_training(text, tokenizer, slots, limit).answer.any():
        raise Reject("no_answer", f"no token of an answer fits into --max_tokens {limit}")
    return True
