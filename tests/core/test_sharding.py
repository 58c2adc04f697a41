"""PartitionSpecs of parameters, rows of a host, and global arrays."""

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
    with pytest.raises(ValueError, match=r"is not the number of devices \(8\)"):
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
    with pytest.raises(ValueError, match="batch size 12 is not a multiple of 8"):
        sharding.local_rows(12, sharding.make_mesh())


def test_replicated_dimensions_are_reported_once():
    params = {
        "a": {"kernel": np.zeros((4, 3, 2)), "bias": np.zeros(4)},
        "b": {"up": np.zeros((7, 3, 6)), "down": np.zeros((7, 3, 6))},
    }
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.uncut(params, AXES, RULES, mesh) == [
        "a/kernel: dimension heads of 3 is not a multiple of mesh axis tensor=2; it is replicated on every device of the axis",
        "b/up and 1 more: dimension embed of 3 is not a multiple of mesh axis fsdp=2; it is replicated on every device of the axis",
    ]
    assert sharding.uncut(params, AXES, RULES, sharding.make_mesh(8, 1, 1)) == []


def test_axis_words_follow_the_rules_of_the_run():
    assert sharding.axis_of("heads") is None and sharding.parts("heads") == 1
    with sharding.computing(sharding.make_mesh(1, 4, 2), (("heads", "fsdp"),)):
        assert sharding.axis_of("heads") == "fsdp" and sharding.axis_of("mlp") is None
        assert (sharding.parts("heads"), sharding.parts("mlp"), sharding.parts("batch")) == (4, 1, 4)


def test_by_device_shards_a_word_only_if_all_its_dimensions_divide():
    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        shapes.append((x.shape, y.shape))
        return x

    for heads, local in ((4, 2), (3, 3)):
        shapes: list = []
        with sharding.computing(sharding.make_mesh(2, 2, 2), (("heads", "tensor"),)):
            axes = [("batch", "heads"), ("heads",)]
            out = jax.jit(lambda x, y, axes=axes: sharding.by_device(run, x, y, axes=axes))(
                np.ones((8, 4)), np.ones(heads)
            )
        assert shapes == [((2, local if heads == 4 else 4), (local,))] and out.shape == (8, 4)
