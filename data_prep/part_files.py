"""Names of the files that workers write into the work folder, in the order in which they write those of partition N:

    part-N.tfrecord             records; absent if all rows were rejected
    part-N.tfrecord.index.npy   its index
    part-N.rejects.jsonl        lines of rejects.jsonl; absent if there are none
    part-N.json                 counts; the partition is complete when this file exists
    group-N.rejects.jsonl, group-N.json    the same of GROUP partitions, merged

All of them appear whole: they are renamed on a local disk, and put at once in a bucket.
"""

import re

from etils import epath

from ymplug_jax.core import places

GROUP = 256  # partitions whose facts one worker merges
TOKEN = "attempt"  # file that names the attempt whose workers may write
PART_DONE = re.compile(r"part-(\d{5})\.json")
GROUP_DONE = re.compile(r"group-(\d{4})\.json")


def part_name(number: int, suffix: str) -> str:
    """Return the name of a file of a partition."""
    return f"part-{number:05d}{suffix}"


def group_name(group: int, suffix: str) -> str:
    """Return the name of a file of a group of partitions."""
    return f"group-{group:04d}{suffix}"


def finished(work: epath.Path) -> tuple[set[int], set[int], dict[str, int]]:
    """Return the (partitions, groups) that are complete, and the files of the work folder with their bytes. Raises OSError."""
    files = places.sizes(work)
    parts = {int(found[1]) for name, size in files.items() if size and (found := PART_DONE.fullmatch(name))}
    groups = {int(found[1]) for name, size in files.items() if size and (found := GROUP_DONE.fullmatch(name))}
    return parts, groups, files
