"""Texts packed into one row give the loss, gradients and logits of the same texts in rows of their own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_qwen import params_of
from ymplug_jax.models import attention, language_model, plain_attention
from ymplug_jax.models.bloom import Bloom
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.models.qwen import Qwen

LORA = {"lora_rank": 2, "lora_scale": 0.5, "lora_targets": ("attn/.*", "mlp/.*")}
DECODERS: dict[str, LanguageModel] = {
    "bloom": Bloom(vocab=53, width=24, depth=2, heads=3, **LORA),
    "gpt3": GPT3(vocab=53, width=24, depth=2, heads=2, max_positions=24, **LORA),
    "qwen": Qwen(vocab=53, width=24, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=40, max_positions=24, **LORA),
}

TEXTS = (7, 5, 9, 10, 1, 8)  # lengths; three in each row of 24, with padding at the end, or before and between
ROW, SLOTS = 24, 3


class Rows(NamedTuple):
    """Inputs of a pass, int32[B, L] each."""

    ids: np.ndarray
    index: np.ndarray  # row of the media vectors, or -1
    segments: np.ndarray
    target: np.ndarray  # the next token of the same text, or -1


def texts() -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and media index of each text; texts 0, 3 and 5 hold three media vectors each."""
    rng, found = np.random.default_rng(0), []
    for i, length in enumerate(TEXTS):
        index = np.full(length, -1)
        if i in (0, 3, 5):
            index[1 : 1 + SLOTS] = SLOTS * (0, 3, 5).index(i) + np.arange(SLOTS)
        found.append((rng.integers(1, 53, length), index))
    return found


def laid(places: list[tuple[int, int]], rows: int) -> Rows:
    """Rows with text i at (row, start) `places[i]`."""
    made = Rows(*(np.full((rows, ROW), fill, np.int32) for fill in (0, -1, 0, -1)))
    for i, ((ids, index), (row, start)) in enumerate(zip(texts(), places, strict=True)):
        here = slice(start, start + len(ids))
        made.ids[row, here], made.index[row, here], made.segments[row, here] = ids, index, i % 3 + 1
        made.target[row, start : start + len(ids) - 1] = ids[1:]
    return made


PACKED = laid([(0, 0), (0, 7), (0, 12), (1, 2), (1, 13), (1, 15)], 2)
ALONE = laid([(i, 0) for i in range(6)], 6)


def logits_of(model: MPLUGChat, params: dict, media: jax.Array, rows: Rows, **how) -> jax.Array:
    def run(model: MPLUGChat) -> jax.Array:
        return model.logits(model.hidden(model.embed(rows.ids, media, rows.index), **how))

    with jax.default_matmul_precision("highest"):
        return model.apply({"params": {"llm": params}}, method=run)


def loss(model: MPLUGChat, params: dict, media: jax.Array, rows: Rows, **how) -> jax.Array:
    logs = jax.nn.log_softmax(logits_of(model, params, media, rows, **how))
    at = jnp.take_along_axis(logs, jnp.maximum(rows.target, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(rows.target >= 0, at, 0)) / np.sum(rows.target >= 0)


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_rows_equal_rows_of_their_own(kind: str) -> None:
    lm = DECODERS[kind]
    model, params = MPLUGChat(llm=lm), params_of(lm)
    media = jax.random.normal(jax.random.key(1), (3, SLOTS, lm.width))

    def both(rows: Rows, **how) -> tuple:
        return jax.jit(jax.value_and_grad(lambda p, m: loss(model, p, m, rows, **how), argnums=(0, 1)))(params, media)

    (value, grads), (wanted, right) = both(PACKED, segments=PACKED.segments), both(ALONE, mask=ALONE.segments > 0)
    assert abs(value - wanted) <= 1e-5 * wanted
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(right))
    for path, made in jax.tree.leaves_with_path(grads):
        expected = dict(jax.tree.leaves_with_path(right))[path]
        bound = 1e-5 * float(jnp.abs(expected).max()) + 1e-7 * largest
        np.testing.assert_allclose(made, expected, atol=bound, err_msg=str(path))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_text_does_not_change_the_logits_of_others(kind: str) -> None:
    lm = DECODERS[kind]
    model, params = MPLUGChat(llm=lm), params_of(lm)
    run = jax.jit(lambda rows, media: logits_of(model, params, media, rows, segments=PACKED.segments))
    media = jax.random.normal(jax.random.key(1), (3, SLOTS, lm.width))
    before = run(PACKED, media)
    other = PACKED._replace(ids=np.where(PACKED.segments == 2, 53 - PACKED.ids, PACKED.ids))
    after = run(other, media.at[0].set(0))  # the media of the first text change as well
    changed = (PACKED.segments == 2) | ((PACKED.segments == 1) & (np.arange(2)[:, None] == 0))
    assert not np.array_equal(after[changed], before[changed])
    still = (PACKED.segments > 0) & ~changed
    np.testing.assert_array_equal(after[still], before[still])
    assert np.isfinite(before).all()


def test_padding_of_the_mask_and_of_the_segments_is_padding() -> None:
    lm = DECODERS["bloom"]
    model, params, media = MPLUGChat(llm=lm), params_of(lm), jnp.zeros((3, SLOTS, lm.width))
    mask = np.ones((2, ROW), bool)
    mask[0, 3], mask[1, 20] = False, False  # inside a text
    given = logits_of(model, params, media, PACKED, mask=mask, segments=PACKED.segments)
    same = logits_of(model, params, media, PACKED, segments=np.where(mask, PACKED.segments, 0))
    np.testing.assert_array_equal(given, same)
    context = language_model.context_of(ROW, jnp.asarray(mask), None, jnp.asarray(PACKED.segments))
    assert context.mask is None
    assert context.positions[0].tolist() == [0, 1, 2, 0, 3, 4, 5, *range(5), *range(9), 0, 0, 0]
    assert context.positions[1].tolist() == [0, 0, *range(10), 0, 0, 0, *range(5), 0, 5, 6, 0]


def test_the_longest_text_counts_where_it_is_known() -> None:
    for limit, fits in ((10, True), (9, False)):
        lm = DECODERS["gpt3"].clone(max_positions=limit)
        variables, embeds = {"params": params_of(lm)}, jnp.zeros((2, ROW, lm.width))
        if fits:
            jax.eval_shape(lambda of=(lm, variables, embeds): of[0].apply(*of[1:], segments=PACKED.segments))
            with pytest.raises(ValueError, match="need 24 positions, the model has 10"):
                jax.eval_shape(lambda s, of=(lm, variables, embeds): of[0].apply(*of[1:], segments=s), PACKED.segments)
        else:
            with pytest.raises(ValueError, match="need 10 positions, the model has 9"):
                lm.apply(variables, embeds, segments=PACKED.segments)


def test_long_rows_in_blocks_equal_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments, padding, ALiBi, bias and masks in blocks of 8 queries, the last one incomplete."""
    q, grad = jax.random.normal(jax.random.key(0), (2, 2, ROW - 3, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, ROW - 3, 2, 8))
    segments = PACKED.segments[:, :-3]
    at, slopes = jnp.cumsum(jnp.ones_like(segments), axis=1), 0.5 ** jnp.arange(1.0, 5)
    bias = jax.random.normal(jax.random.key(2), (1, 4, ROW - 3, ROW - 3))
    mask = jnp.asarray(np.random.default_rng(0).random((2, 1, ROW - 3, ROW - 3)) < 0.5)
    for given in (
        {"causal": True, "segments": segments, "slopes": slopes, "key_positions": at},
        {"causal": True, "key_mask": segments > 1, "slopes": slopes, "key_positions": at},  # some queries see no key
        {"causal": True, "bias": bias, "segments": segments},
        {"causal": False, "mask": mask, "bias": bias[:, :, :1]},
        {"causal": True, "mask": mask[..., :1, :]},
    ):

        def run(given: dict = given) -> list[jax.Array]:
            def both(*x: jax.Array) -> list[jax.Array]:
                out, back = jax.vjp(lambda *x: attention.attend(*x, **given), *x)
                return [out, *back(grad)]

            return jax.jit(both)(q, k, v)

        whole = run()
        with monkeypatch.context() as patch:
            patch.setattr(plain_attention, "WHOLE", 8)
            patch.setattr(plain_attention, "BLOCK", 8)
            parts = run()
        for made, wanted in zip(parts, whole, strict=True):
            np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_segments_need_a_causal_mask_and_no_other() -> None:
    q = jnp.zeros((1, 4, 2, 8))
    for given in ({}, {"causal": True, "key_mask": jnp.ones((1, 4), bool)}):
        with pytest.raises(ValueError, match="segments need causal"):
            attention.attend(q, q, q, segments=jnp.ones((1, 4), jnp.int32), **given)
