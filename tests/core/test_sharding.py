"""Paths to specs, rows of a host, and global arrays that equal their numpy source."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ymplug_jax.core import sharding

AXES = ((r"a/kernel", "embed heads head_dim"), (r".*/bias", "embed"), (r"b/.*", "layers embed mlp"))
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}


def test_specs():
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.spec_of("a/kernel", (4, 4, 3), AXES, RULES, mesh) == P("fsdp", "tensor", None)
    assert sharding.spec_of("b/kernel", (7, 4, 6), AXES, RULES, mesh) == P(None, "fsdp", "tensor")
    assert sharding.spec_of("b/kernel", (7, 3, 6), AXES, RULES, mesh) == P(None, None, "tensor"), (
        "3 rows are not cut in two"
    )


def test_every_path_needs_exactly_one_rule():
    with pytest.raises(ValueError, match="'c/kernel' matches 0 rules"):
        sharding.axis_words("c/kernel", AXES)
    with pytest.raises(ValueError, match="'b/bias' matches 2 rules"):
        sharding.axis_words("b/bias", AXES)


def test_rank_must_agree():
    with pytest.raises(ValueError, match="names 3 axes"):
        sharding.spec_of("a/kernel", (4, 4), AXES, RULES, sharding.make_mesh())


def test_mesh_must_use_all_devices():
    with pytest.raises(ValueError, match="does not make 8 devices"):
        sharding.make_mesh(3, 1, 1)
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_put_batch_is_the_numpy_batch(shape: tuple[int, int, int]):
    mesh = sharding.make_mesh(*shape)
    rows = sharding.local_rows(16, mesh)
    assert rows.tolist() == list(range(16))
    local = {"x": np.arange(48).reshape(16, 3)}
    batch = sharding.put_batch(local, rows, 16, mesh)
    np.testing.assert_array_equal(jax.device_get(batch["x"]), local["x"])
    assert batch["x"].sharding.spec == P(("data", "fsdp"))


def test_batch_must_divide():
    with pytest.raises(ValueError, match="batch size 12 cannot be cut into 8"):
        sharding.local_rows(12, sharding.make_mesh())
