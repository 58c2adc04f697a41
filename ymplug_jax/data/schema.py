"""Format of records, shards and indices, shared by the builder and the reader. Standard library only.

A data set is a folder of TFRecord shards `<name>-<split>.tfrecord-00000-of-00012` in the TFDS layout, each with an index beside it
(`<shard>.index.npy`), plus `manifest.json` and `rejects.jsonl`. A set joined from parts is a folder of such folders with a manifest that names
them, see `joined_set`. Each record is a `tf.train.Example` with the keys of DMVR and
MediaPipe, so that other video readers can read it too.
"""

SCHEMA_VERSION = "1.1.0"  # 1.1 added conversations; readers of 1.x read all other kinds

# Keys of the Example.
IMAGE = "image/encoded"  # bytes[T]: stored frames as JPEG, in time order; T is constant in a data set, except in conversations
TIMESTAMP = "image/timestamp"  # int64[T]: time of each stored frame in microseconds from the start of the clip
HEIGHT = "image/height"  # int64: height of the stored frames, pixels; conversations: int64[M]
WIDTH = "image/width"  # int64: width of the stored frames, pixels; conversations: int64[M]
MEDIA_ID = (
    "clip/media_id"  # bytes: FILE column of the CSV with its extension, UTF-8; conversations: see `Record.media_id`
)
ROW = "clip/row"  # int64: row of the CSV, 0-based without the header; evaluation keeps this order
TITLE = "clip/title"  # bytes: title or question of the CSV, UTF-8; may be empty
CAPTION = (
    "caption/string"  # bytes[K]: captions, UTF-8; retrieval has one, captioning one in train and several in validation
)
LABEL_TEXT = "clip/label/text"  # bytes: class name or answer to a question, UTF-8; empty if unknown or withheld
LABEL_INDEX = "clip/label/index"  # int64: index of the class name; -1 if unknown or withheld

# Keys of conversations only (kind "instruct"). M: images and clips of the record, 0 or more, in the order of their placeholders.
# `image/encoded` and `image/timestamp` hold the frames of all of them one after the other.
CHAT_TEXT = "chat/text"  # bytes: the conversation with its placeholders, UTF-8
CHAT_TASK = "chat/task_type"  # bytes: task_type of the row, UTF-8; may be empty
CHAT_OPTIONS = "chat/options"  # bytes[K]: answers to choose from in evaluation, UTF-8; none if the row gives none
MEDIUM_NAME = "medium/name"  # bytes[M]: file of each, UTF-8
MEDIUM_STILL = "medium/still"  # int64[M]: 1 for a still image, 0 for a clip
MEDIUM_FRAMES = "medium/frames"  # int64[M]: stored frames of each; 1 for a still image

# Kinds of CSV: the four of the Youku-mPLUG release, and questions. Kind -> (column of the video file, columns of text).
COLUMNS = {
    "pretrain": ("video_id:FILE", ("title",)),
    "classification": ("video_id:FILE", ("title", "label")),
    "retrieval": ("clip_name:FILE", ("caption",)),
    "captioning": ("video_id:FILE", ("golden_caption",)),
    "question": ("video_id:FILE", ("question", "answer")),
}
INSTRUCT = "instruct"  # conversations, from JSON lines instead of a CSV
KINDS = (*COLUMNS, INSTRUCT)

# The 45 categories of Youku-mPLUG, in the order of its classname.json.
CLASS_NAMES = tuple(
    [
        "翻唱",
        "电视剧剪辑",
        "电视剧周边（预告/杂谈）",
        "财经",
        "美发美妆",
        "萌娃日常",
        "传统文化",
        "少儿动漫",
        "医疗健康",
        "亲子育儿",
        "养生保健",
        "电影周边（预告/杂谈）",
        "篮球",
        "日常生活",
        "搞笑",
        "少儿才艺",
        "街舞",
        "广场舞",
        "学历教育",
        "房产装修",
        "美食制作",
        "竞技体育",
        "相声小品",
        "MV",
        "穿搭",
        "科技",
        "健身",
        "家居装饰",
        "纪录片",
        "三农",
        "职业职场",
        "游戏",
        "乐器演奏",
        "综艺",
        "电影剪辑",
        "美容护肤",
        "宠物",
        "生活百科",
        "旅游",
        "足球",
        "汽车",
        "动漫",
        "少儿玩具",
        "科学科普",
        "美食测评",
    ]
)


def parse_class_names(text: str, source: str, what: str = "class name") -> tuple[str, ...]:
    """Parse class names, one per line; line i is class i. A byte order mark and the "\\r" of "\\r\\n" are dropped.

    Args:
      text: content of the file.
      source: name of the file or setting, for messages.
      what: what a line holds, for messages.

    Raises:
      ValueError: no names, an empty line, a name with surrounding spaces or a carriage return, or a repeated name. The message
        names `source` and the line.
    """
    lines = text.lstrip("\ufeff").split("\n")
    names = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not names:
        raise ValueError(f"{source}: no {what}s in it; write one per line")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise ValueError(f"{source}, line {number}: an empty line; write one {what} per line")
        if name != name.strip() or "\x00" in name:
            raise ValueError(f"{source}, line {number}: spaces around the {what} {name!r}; remove them")
        if "\r" in name:
            raise ValueError(
                f"{source}, line {number}: a carriage return inside the {what}; end lines with a line feed"
            )
        if name in seen:
            raise ValueError(f"{source}, line {number}: {what} {name!r} repeats line {seen[name]}; keep one of them")
        seen[name] = number
    return tuple(names)


# TFRecord framing: uint64 length, uint32 masked crc32c of the length, payload, uint32 masked crc32c of the payload.
HEADER_BYTES = 12
FOOTER_BYTES = 4
CRC_MASK_DELTA = 0xA282EAD8

MANIFEST = "manifest.json"
PUBLISHING = "publishing"  # key of the manifest while the shards of a split get their names; readers refuse the folder
REJECTS = "rejects.jsonl"
INDEX_SUFFIX = ".index.npy"  # int64[n, 2]: (byte offset of the record's header, payload bytes) of each record


def masked_crc(crc: int) -> int:
    """Apply the mask of TFRecord to a crc32c value (both unsigned 32 bit)."""
    return (((crc >> 15) | (crc << 17)) + CRC_MASK_DELTA) & 0xFFFFFFFF


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
    """Return the file name of a shard in the TFDS convention: `youku_mplug-train.tfrecord-00003-of-00012`."""
    return f"{name}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"
