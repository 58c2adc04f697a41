"""mPLUG-2: sizes, axes, generation with a cache, and long videos. Stored outputs are compared in tests/parity."""

import itertools
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.core import sharding, state
from ymplug_jax.models import bert_decoder, decode, decode_answers, decode_beam, decode_past_end, mplug2
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.universal import Fusion, Universal

PRETRAIN = {"contrastive_width": 256, "matching": True, "masked": True}
# Size, words, parts -> number of parameters.
COUNTS = (
    ("large", mplug2.ENGLISH, {}, 1_031_533_370),
    ("large", mplug2.ENGLISH, {"reads": False}, 621_853_498),
    ("base", mplug2.ENGLISH, {}, 379_952_442),
    ("base", 0, {"reads": False}, 249_657_224),
    ("youku-b16", 0, PRETRAIN, 384_990_483),
    ("youku-b16", 0, {"contrastive_width": 256, "matching": True, "generates": False}, 237_493_763),
    ("youku-b16", 0, {"classes": 45, "generates": False}, 237_723_693),
    ("youku-b16", 0, {"reads": False}, 251_895_176),
)


def shapes_of(model: mplug2.MPLUG2) -> dict:
    return state.flatten(jax.eval_shape(lambda: mplug2.init(model, jax.random.key(0))))


@pytest.mark.parametrize(("size", "vocab", "parts", "count"), COUNTS)
def test_sizes_are_those_of_the_release(size, vocab, parts, count):
    assert state.count(shapes_of(mplug2.sized(size, vocab=vocab, **parts))) == count


def test_every_parameter_has_axes_and_every_rule_a_parameter():
    mesh, used = sharding.make_mesh(), set()
    models = [mplug2.sized(size, classes=5, **PRETRAIN) for size in ("tiny", "youku-tiny")]
    models.append(models[0].clone(text=mplug2.TEXTS["base"][0], fusion=Fusion(depth=3, stride=2)))
    models[2] = models[2].clone(decoder=Decoder(), universal=Universal())
    for model in models:
        axes = mplug2.axes_of(model)
        for path, leaf in shapes_of(model).items():
            sharding.spec_of(path, leaf.shape, axes, {}, mesh)
            used |= {pattern for pattern, _ in axes if re.fullmatch(pattern, path)}
    unused = {pattern for model in models for pattern, _ in mplug2.axes_of(model)} - used
    assert unused == {"vision/patch/bias"}  # of a video encoder that does not come from CLIP


@pytest.mark.parametrize("size", ["tiny", "youku-tiny"])
def test_half_precision_keeps_parameters_and_logits_in_float32(size):
    model, half = mplug2.sized(size, classes=5, **PRETRAIN), {"dtype": "bfloat16", "remat": "full"}
    parts = {name: getattr(model, name).clone(**half) for name in ("vision", "text", "universal", "fusion", "decoder")}
    video, ids = jnp.zeros((2, 4, 64, 64, 3)), jnp.zeros((2, 5), jnp.int32)
    for one in (parts["fusion"], parts["fusion"].clone(stride=1)):
        made = model.clone(**{**parts, "fusion": one})
        out, params = jax.eval_shape(partial(made.init_with_output, jax.random.key(0)), video, ids, ids)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
        assert {name for name, value in out.items() if value.dtype == jnp.bfloat16} == {"tokens", "states", "fused"}


def test_frames_and_words_of_a_size():
    model = mplug2.sized("youku-tiny", vocab=99, frames=7)
    assert (model.vision.frames, model.text.vocab, model.decoder.vocab) == (7, 99, 99)
    with pytest.raises(ValueError, match=r"unknown size 'huge'; choose one of base"):
        mplug2.sized("huge")
    for fields, message in ({"variant": "both"}, "unknown variant 'both'"), (
        {"reads": False, "classes": 3}, "config.model.reads: heads that read a text need the text encoder"
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            shapes_of(mplug2.sized("tiny").clone(**fields))


# Generation: a small decoder, and the whole text of every hypothesis read at once instead of with a cache.

SMALL = Decoder(vocab=7, width=16, depth=2, heads=2, hidden=24, max_positions=8, dropout=0.0)
START, END, NEW, POWER, OFFSET, LEAST = 5, 6, 3, 0.6, 5, 1


@pytest.fixture(scope="module")
def params() -> dict:
    memory = Memory(jnp.zeros((1, 3, 16)))
    like = jax.eval_shape(lambda: SMALL.init(jax.random.key(0), jnp.zeros((1, 1), int), memory, method=_logits))
    rng = np.random.default_rng(25)  # with which hypotheses of the reference search go on after their end
    made = jax.tree.map(lambda leaf: rng.normal(0, 0.6, leaf.shape).astype(np.float32), like["params"])
    made["head"]["bias"][END] += 1.0  # texts of all lengths are likely
    return made


@pytest.fixture(scope="module")
def memory() -> Memory:
    rng = np.random.default_rng(4)
    return Memory(rng.normal(size=(2, 3, 16)).astype(np.float32), np.array([[1, 1, 1], [1, 1, 0]], bool))


def _logits(decoder: Decoder, ids: jax.Array, memory: Memory) -> jax.Array:
    return decoder.logits(decoder(decoder.embed(ids), memory=memory))


@pytest.fixture(scope="module")
def logs(params, memory) -> Callable[[int, tuple[int, ...]], np.ndarray]:
    """Log-probabilities of the token after some tokens, without a cache: row, tokens -> f32[V]."""
    every = np.array(list(itertools.product(range(SMALL.vocab), repeat=NEW - 1)))
    ids = np.concatenate([np.full((len(every), 1), START), every], axis=1)

    @jax.jit
    def whole(one: Memory) -> jax.Array:
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(ids), *x.shape[1:])), one)
        return jax.nn.log_softmax(SMALL.apply({"params": params}, ids, many, method=_logits))

    tables = [np.asarray(whole(jax.tree.map(lambda x, i=i: x[i : i + 1], memory))) for i in range(2)]

    def after(row: int, tokens: tuple[int, ...]) -> np.ndarray:
        full = (*tokens, *(0,) * (NEW - 1 - len(tokens)))
        return tables[row][int(np.ravel_multi_index(full, (SMALL.vocab,) * (NEW - 1)))][len(tokens)]

    return after


def opened(params: dict, memory: Memory, beams: int) -> decode.State:
    start = SMALL.apply({"params": params}, jnp.full((2, 1), START), method="embed")
    return decode.start(SMALL, params, start, jnp.ones((2, 1), bool), NEW, beams, memory=memory)


def test_a_search_with_a_cache_finds_the_best_of_all_texts(params, memory, logs):
    beams = SMALL.vocab**2  # no beam is ever lost

    @jax.jit
    def run(params: dict, memory: Memory) -> decode.Generated:
        return decode_beam.search(
            SMALL, params, opened(params, memory, beams), jnp.full(2, NEW), Rules(), NEW, END, length_power=POWER,
            length_offset=OFFSET, least_tokens=LEAST,
        )  # fmt: skip

    found = jax.device_get(run(params, memory))
    for row in range(2):
        values = {}
        for length in range(LEAST + 1, NEW + 1):
            for tokens in itertools.product([t for t in range(SMALL.vocab) if t != END], repeat=length - 1):
                for last in range(SMALL.vocab) if length == NEW else [END]:
                    text = (*tokens, last)
                    total = sum(logs(row, text[:i])[text[i]] for i in range(length))
                    values[text] = total / ((OFFSET + length) / (OFFSET + 1)) ** POWER
        best = max(values, key=values.__getitem__)
        length = len(best) - (best[-1] == END)
        assert tuple(found.ids[row][:length]) == best[:length] and found.lengths[row] == length
        np.testing.assert_allclose(found.scores[row], values[best], rtol=1e-5)


def test_the_reference_search_goes_on_after_the_end(params, memory, logs):
    beams = 3

    @jax.jit
    def run(params: dict, memory: Memory) -> decode_past_end.Hypotheses:
        return decode_past_end.search(
            SMALL, params, opened(params, memory, beams), NEW, END, length_power=POWER, length_offset=OFFSET,
            least_tokens=LEAST,
        )  # fmt: skip

    found = jax.device_get(run(params, memory))
    past = False
    for row in range(2):
        alive, kept = [((), 0.0)], []
        for step in range(NEW):
            more = []
            for tokens, total in alive:
                each = logs(row, tokens).copy()
                each[END] = -1e20 if step < LEAST else each[END]
                more += [((*tokens, t), total + each[t]) for t in range(SMALL.vocab)]
            alive = sorted(more, key=lambda one: -one[1])[:beams]
            ends = [tokens[-1] == END or step == NEW - 1 for tokens, _ in alive]
            term = ((OFFSET + step + 1) / (OFFSET + 1)) ** POWER
            kept += [(t, total / term) for (t, total), end in zip(alive, ends, strict=True) if end or ends[0]]
            if ends[0]:
                break
        kept = sorted(kept, key=lambda one: -one[1])[:beams]
        past |= any(END in tokens[:-1] for tokens, _ in kept)
        assert [tuple(ids[:n]) for ids, n in zip(found.ids[row], found.lengths[row], strict=True)] == [
            t for t, _ in kept
        ]
        np.testing.assert_allclose(found.values[row], [value for _, value in kept], rtol=1e-5)
    assert past, "no hypothesis of this test has a token after its end, so nothing is shown"


def test_answers_are_ranked_by_all_their_tokens(params, memory, logs):
    ids = np.array([[START, 1, 2, END], [START, 3, END, 0], [START, 1, END, 0], [START, 4, 0, END]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    found = jax.jit(decode_answers.rank, static_argnums=(0, 5))(SMALL, params, memory, ids, mask, 3)
    for row in range(2):
        first = np.array([logs(row, ())[one[1]] for one in ids])
        total = [
            sum(logs(row, tuple(one[1:i]))[one[i]] for i in range(1, m.sum())) for one, m in zip(ids, mask, strict=True)
        ]
        chosen = np.argsort(-first, kind="stable")[:3]
        values = first[chosen] + np.array(total)[chosen]
        order = np.argsort(-values, kind="stable")
        np.testing.assert_array_equal(found.answers[row], chosen[order])
        odds = np.exp(values[order])
        np.testing.assert_allclose(found.probabilities[row], odds / odds.sum(), rtol=1e-4)


def test_a_decoder_needs_something_to_read(params):
    with pytest.raises(ValueError, match="cross-attention has nothing to read; give memory"):
        SMALL.apply({"params": params}, jnp.zeros((1, 2, 16)))
    with pytest.raises(
        ValueError, match=r"config.model.decoder.max_positions: the tokens need 9 positions, the model has 8"
    ):
        SMALL.apply({"params": params}, jnp.zeros((1, 9, 16)), memory=Memory(jnp.zeros((1, 3, 16))))


# Universal layers and fusion.


def test_recomputing_layers_changes_nothing():
    """With dropout, in layers that are run one by one; here a single universal layer that reads the latents themselves."""
    tokens = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    shared = Universal(width=16, depth=1, queries=5, heads=2, hidden=24)

    @partial(jax.jit, static_argnums=1)
    def run(params: dict, remat: str) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            rngs = {"dropout": jax.random.key(1, impl="rbg")}
            model = shared.clone(remat=remat)
            video = model.apply({"params": params}, tokens, method="read_video", rngs=rngs, deterministic=False)
            return jnp.sum(video**3)

        return jax.value_and_grad(loss)(params)

    params = jax.jit(partial(shared.init, method="read_video"))(jax.random.key(0), tokens)["params"]
    (loss, grads), (again, others) = run(params, "none"), run(params, "full")
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), grads, others)
    moved = {path for path, leaf in state.flatten(grads).items() if np.abs(leaf).max() > 0}
    assert moved == set(state.flatten(params)), "every parameter takes part"
    fixed = jax.jit(partial(shared.apply, method="read_video"))({"params": params}, tokens)
    assert np.abs(np.sum(fixed**3) - loss) > 1e-3, "dropout changes the loss"


def test_no_array_holds_the_logits_of_a_long_video():
    shared, tokens = (
        Universal(width=16, queries=5, heads=2, hidden=24),
        jax.ShapeDtypeStruct((1, 1100, 16), jnp.float32),
    )
    params = jax.eval_shape(lambda x: shared.init(jax.random.key(0), x, method="read_video"), tokens)

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.key(1, impl="rbg")}
        return jnp.sum(shared.apply(params, tokens, method="read_video", deterministic=False, rngs=rngs))

    text = jax.jit(jax.grad(loss)).lower(params, tokens).as_text()
    assert re.search(r"tensor<1x2x367x1100x", text), "logits of a block of queries"
    assert not re.search(r"x1100x1100x", text)
    assert bert_decoder.SIZES["tiny"].width == mplug2.TEXTS["tiny"][0].width
