"""The kernel check at the start of a run keeps correct kernels and disables wrong ones."""

import logging

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from ymplug_jax.core import sharding
from ymplug_jax.models import attention, kernel_check, kernels
from ymplug_jax.models.kernels import Use
from ymplug_jax.training import step as step_lib

ROWS = Use("tpu_rows", 24, 24, 4, 2, 16, "bfloat16", causal=True, masked=True, alibi=True)
PACKED = ROWS._replace(length=48, keys=48, masked=False, packed=True)
BESIDE = Use("tpu_rows", 24, 24, 6, 6, 64, "bfloat16", beside=True)
USES = (
    *(ROWS, Use("tpu_frames", 3, 16, 2, 2, 16, "bfloat16"), ROWS._replace(kernel="cudnn")),
    *(PACKED, PACKED._replace(kernel="cudnn"), BESIDE),
)


def test_correct_kernels_stay_enabled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert kernel_check.differing([*USES, ROWS]) == frozenset()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6 and "alibi, packed: error" in "".join(lines)
    assert "24 x 24, 4 heads on 2 of 16, bfloat16, causal, masked, alibi:" in "".join(lines)


def without_mask(q, k, v, per_key, slopes, segments, causal, interpret, block):
    assert block is None
    return attention.attend(q, k, v, causal=causal)


def swapped(q, k, v, per_key, slopes, segments, causal, interpret, block):
    assert block.beside
    return attention.attend(q[:, :, ::-1], k, v)


def wrong_gradient(q, k, v, heads, interpret):
    return attention.attend_frames(jax.lax.stop_gradient(q), k, v, heads)


def not_finite(q, *rest):
    return q * jnp.nan


def refused(*given, **more):
    raise jax.errors.JaxRuntimeError("INTERNAL: no kernel image\nsecond line")


@pytest.mark.parametrize(
    ("use", "place", "wrong"),
    [
        (USES[0], (kernels, "attention"), without_mask),
        (USES[0], (kernels, "attention"), refused),
        (USES[1], (kernels, "over_frames"), wrong_gradient),
        (USES[2], (attention, "with_columns"), not_finite),
        (PACKED, (kernels, "attention"), without_mask),
        (BESIDE, (kernels, "attention"), swapped),
    ],
)
def test_wrong_kernels_are_disabled(monkeypatch, caplog, use: Use, place: tuple, wrong) -> None:
    monkeypatch.setattr(*place, wrong)
    with caplog.at_level(logging.WARNING):
        assert kernel_check.differing([use]) == {use.kernel}
    assert len(caplog.records) == (2 if wrong is refused else 1)  # an exception has a line of its own
    assert "plain XLA computes it in this run" in caplog.text


@pytest.mark.parametrize("setting", [True, False])
def test_a_run_uses_the_kernels_that_agree(monkeypatch: pytest.MonkeyPatch, setting: bool) -> None:
    """On a TPU the run's own shapes are compared and a wrong kernel is left out; the setting disables all kernels."""
    half = tiny.MODEL.clone(
        vision=tiny.MODEL.vision.clone(dtype="bfloat16"), llm=tiny.MODEL.llm.clone(dtype="bfloat16")
    )
    run = tiny.prepare(1, model=half, train={"fused_kernels": setting})
    assert step_lib.with_checked_kernels(run) is run  # CPU has no kernels
    monkeypatch.setattr(sharding, "computes_on", lambda name: name == "tpu")
    checked = []
    monkeypatch.setattr(
        kernel_check, "difference", lambda use: checked.append(use) or kernel_check.Difference(0.2, 0.001)
    )
    off = step_lib.with_checked_kernels(run).kernels_off
    assert off == ({"tpu_rows", "tpu_frames"} if setting else set(kernels.KERNELS))
    assert {use.kernel for use in checked} == ({"tpu_rows", "tpu_frames"} if setting else set())
    if setting:
        assert any(use.causal and use.width == 16 for use in checked)
        assert "pallas_call" in str(step_lib.trace_step(run).jaxpr)
        assert "pallas_call" not in str(step_lib.trace_step(step_lib.with_checked_kernels(run)).jaxpr)
