"""Examples, predictions and kept rows of a task without a run; shared by the tests of the tasks."""

import jax
import numpy as np

from ymplug_jax.core import sharding
from ymplug_jax.data.records import Records
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.task import Task


def batch_of(task: Task, records: Records, rng: np.random.Generator | None, indices: range) -> dict[str, np.ndarray]:
    examples = [task.one(records[i], rng) | {"valid": np.bool_(True)} for i in indices]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def rows_of(task: Task, params: dict, records: Records) -> list[dict]:
    """Return the predictions of all records from one batch, including those that a run keeps on its devices."""
    found = jax.device_get(jax.jit(task.predict)(params, batch_of(task, records, None, range(len(records)))))
    return [{key: value[i] for key, value in found.items()} | {"index": i} for i in range(len(records))]


def kept_of(task: Task, rows: list[dict], devices: int = 1, batch: int = 4) -> KeptRows:
    """Return the kept rows of a run with `devices` devices and batches of `batch` rows; the last batch is padded."""
    mesh = sharding.make_mesh(fsdp=devices // 2 or 1, devices=jax.devices()[:devices])
    kept = KeptRows(mesh, -(-len(rows) // batch))
    for number in range(kept.batches):
        part = [rows[min(i, len(rows) - 1)] for i in range(number * batch, (number + 1) * batch)]
        arrays = {name: np.stack([row[name] for row in part]) for name in task.kept}
        kept.put(number, jax.device_put(arrays, sharding.batch_sharding(mesh)))
    return kept
