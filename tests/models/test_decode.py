"""Generation with a cache equals recomputing the whole sequence for each token, for every decoder."""

import functools
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.models import decode, decode_beam, decode_sampling, language_model
from ymplug_jax.models.bloom import Bloom
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.qwen import Qwen

LMS = {
    "gpt3": GPT3(vocab=40, width=32, depth=2, heads=4, max_positions=32),
    "bloom": Bloom(vocab=40, width=32, depth=2, heads=4),
    "qwen": Qwen(
        vocab=40,
        width=32,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=12,
        mlp=48,
        qk_norm=True,
        tied=False,
        max_positions=32,
    ),
}
LM = LMS["gpt3"]
ROOM = 24  # length of the uncached pass
PLACES = ("start", "middle", "end")  # of the media in a prompt


@functools.cache
def params_of(name: str) -> dict:
    shapes = jax.eval_shape(partial(language_model.init, LMS[name]), jax.random.key(0))
    rng = np.random.default_rng(0)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        spread = {"scale": 0.1, "bias": 0.1}.get(kind, 0.5)  # large enough for the generated tokens to differ
        return (float(kind == "scale") + rng.normal(0, spread, leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(value, shapes)


@pytest.fixture(scope="module")
def params() -> dict:
    return params_of("gpt3")


@functools.cache
def table(name: str) -> np.ndarray:
    """Embedding of every token, f32[V, D]."""
    lm = LMS[name]
    return np.asarray(lm.apply({"params": params_of(name)}, np.arange(lm.vocab), method="embed"))


@partial(jax.jit, static_argnums=0)
def all_logits(lm: LanguageModel, params: dict, embeds: jax.Array) -> jax.Array:
    hidden = lm.apply({"params": params}, embeds)
    return lm.apply({"params": params}, hidden, method="logits")


def next_logits(name: str, row: np.ndarray, tokens: list[int] | tuple[int, ...]) -> np.ndarray:
    """Logits f32[V] after one prompt f[n, D] and further tokens, by one pass without a cache."""
    whole = np.zeros((1, ROOM, row.shape[1]), np.float32)  # causal: the last token does not see the zeros
    end = len(row) + len(tokens)
    whole[0, : len(row)] = row
    whole[0, len(row) : end] = table(name)[list(tokens)]
    return np.asarray(all_logits(LMS[name], params_of(name), whole)[0, end - 1])


def recompute(
    name: str, row: np.ndarray, new_tokens: int, eos: int, pick=lambda step, logits: logits.argmax()
) -> list[int]:
    """Continuation of one prompt without its `eos`, recomputing the whole sequence for each token."""
    tokens: list[int] = []
    for step in range(new_tokens):
        token = int(pick(step, next_logits(name, row, tokens)))
        if token == eos:
            break
        tokens.append(token)
    return tokens


@functools.cache
def rows_of(name: str, place: str) -> list[np.ndarray]:
    """Three prompts f[n, D] of different lengths, with visual vectors at a place."""
    rng = np.random.default_rng(PLACES.index(place))
    rows = []
    for words, visual in ((4, 3), (1, 5), (3, 2)):
        text = table(name)[rng.integers(1, 40, words)]
        media = rng.normal(size=(visual, 32)).astype(np.float32)
        cut = (words + 1) // 2
        parts = {
            "start": [media, text],
            "middle": [text[:cut], media[:1], text[cut:-1], media[1:], text[max(cut, words - 1) :]],
            "end": [text, media],
        }
        rows.append(np.concatenate(parts[place]))
    return rows


def padded(rows: list[np.ndarray], side: str, length: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as one batch. Padding holds large numbers, which must not matter."""
    embeds = np.full((len(rows), length, rows[0].shape[1]), 50, np.float32)
    mask = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        embeds[b, place], mask[b, place] = row, 1
    return embeds, mask


@partial(jax.jit, static_argnums=0)
def greedy(lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, eos: jax.Array) -> decode.Generated:
    return decode.greedy(lm, params, embeds, mask, new_tokens=8, eos=eos)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LMS)
def test_cached_greedy_equals_recomputation(name: str, place: str) -> None:
    rows = rows_of(name, place)
    free = [recompute(name, row, 8, eos=-1) for row in rows]
    eos = free[0][4]  # so that the first row stops early
    expected = [row[: row.index(eos)] if eos in row else row for row in free]
    assert len({tuple(row) for row in expected}) == 3
    for side in ("left", "right"):
        out = greedy(LMS[name], params_of(name), *padded(rows, side), eos)
        assert out.ids.shape == (3, 8)
        assert out.lengths.tolist() == [len(row) for row in expected], side
        for b, row in enumerate(expected):
            assert out.ids[b, : len(row) + 1].tolist() == [*row, eos][:8], side


@partial(jax.jit, static_argnums=0)
def sample(lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, keys: jax.Array) -> decode.Generated:
    return decode.generate(lm, params, embeds, mask, Rules(top_k=9, temperature=1.5), keys, new_tokens=6, eos=-1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LMS)
def test_cached_sampling_equals_recomputation(name: str, place: str) -> None:
    rows, keys = rows_of(name, place), jax.random.split(jax.random.key(5), 3)

    def draw(b: int, step: int, logits: np.ndarray) -> int:
        logits = np.where(logits >= np.sort(logits)[-9], logits / 1.5, -np.inf)
        return int(jax.random.categorical(jax.random.fold_in(keys[b], step), logits[None])[0])

    expected = [recompute(name, row, 6, -1, partial(draw, b)) for b, row in enumerate(rows)]
    for side in ("left", "right"):
        assert sample(LMS[name], params_of(name), *padded(rows, side), keys).ids.tolist() == expected, side


@partial(jax.jit, static_argnums=0, static_argnames=("beams", "row_length", "visual"))
def beam(lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, **settings: int) -> decode.Generated:
    return decode_beam.beam(lm, params, embeds, mask, new_tokens=10, eos=7, **settings)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LMS)
def test_beams_of_the_reference_rule_equal_recomputation(name: str, place: str) -> None:
    """Each row of a batch with prompts of different lengths equals its own search, with beams that are reordered."""
    rows, row_length = rows_of(name, place), 14
    wanted = [
        reference_rule(lambda tokens, row=row: log_softmax(next_logits(name, row, tokens)), 3, 7, len(row), row_length)
        for row in rows
    ]
    for side in ("left", "right"):
        out = beam(LMS[name], params_of(name), *padded(rows, side), beams=3, row_length=row_length)
        assert [ids[:n].tolist() for ids, n in zip(out.ids, out.lengths, strict=True)] == [
            tokens for tokens, _ in wanted
        ]
        np.testing.assert_allclose(out.scores, [value for _, value in wanted], rtol=1e-4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max()
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("name", LMS)
def test_padded_rows_equal_single_rows(name: str) -> None:
    """Hidden states and gradients; padding gets no gradient, and nothing is NaN."""
    lm, params, rows = LMS[name], params_of(name), rows_of(name, "middle")
    weigh = np.random.default_rng(1).normal(size=(ROOM, lm.width)).astype(np.float32)

    @jax.jit
    def run(embeds: jax.Array, mask: jax.Array, weights: jax.Array) -> tuple:
        def loss(embeds: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = lm.apply({"params": params}, embeds, mask)
            return jnp.sum(jnp.where(mask[..., None] == 1, hidden * weights, 0)), hidden

        (_, hidden), grad = jax.value_and_grad(loss, has_aux=True)(embeds)
        prefilled, past = lm.apply({"params": params}, embeds, mask, method="prefill")
        return hidden, grad, prefilled, past.length

    for side in ("left", "right", "both"):
        embeds, mask = padded(rows, side if side != "both" else "right")
        if side == "both":
            embeds, mask = np.roll(embeds, 1, axis=1), np.roll(mask, 1, axis=1)
        weights = np.zeros_like(embeds)
        for b, row in enumerate(rows):
            weights[b][mask[b] == 1] = weigh[: len(row)]
        hidden, grad, prefilled, length = run(embeds, mask, weights)
        assert np.isfinite(hidden).all() and np.isfinite(grad).all()
        assert not np.asarray(grad)[mask == 0].any()
        np.testing.assert_allclose(prefilled, hidden, atol=1e-5)
        assert length.tolist() == [len(row) for row in rows]
        for b, row in enumerate(rows):
            alone, ones = np.zeros((3, 9, lm.width), np.float32), np.zeros((3, 9), np.int32)
            alone[0, : len(row)], ones[0, : len(row)] = row, 1
            own = np.zeros_like(alone)
            own[0, : len(row)] = weigh[: len(row)]
            expected, of_row, *_ = run(alone, ones, own)
            np.testing.assert_allclose(hidden[b][mask[b] == 1], expected[0, : len(row)], atol=2e-5)
            np.testing.assert_allclose(np.asarray(grad)[b][mask[b] == 1], of_row[0, : len(row)], atol=1e-4)


def test_with_media_inserts_vectors() -> None:
    embeds = np.arange(2 * 5 * 2, dtype=np.float32).reshape(2, 5, 2)
    places = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 1, 1]], bool)
    media = -np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)
    made = np.asarray(language_model.with_media(embeds, places, media))
    expected = embeds.copy()
    expected[0, 1:3], expected[1, [0, 3, 4]] = media[0, :2], media[1]
    np.testing.assert_array_equal(made, expected)
    short = np.asarray(language_model.with_media(embeds, places, media[:, :2]))
    assert np.isnan(short[1, 4]).all() and np.isnan(short).sum() == 2  # a place without a vector is NaN


def test_a_prompt_with_a_prefix() -> None:
    name, lm = "bloom", LMS["bloom"]
    ids, prefix = np.array([[3, 4, 0], [5, 0, 0]], np.int32), np.ones((2, 2, lm.width), np.float32)
    embeds, mask = decode.prompt_of(lm, params_of(name), prefix, ids, np.array([2, 1]))
    assert mask.tolist() == [[True] * 4 + [False], [True] * 3 + [False] * 2]
    np.testing.assert_allclose(embeds[0], np.concatenate([prefix[0], table(name)[ids[0]]]), rtol=1e-6)
    np.testing.assert_allclose(decode.prompt_of(lm, params_of(name), None, ids, np.array([2, 1]))[0], embeds[:, 2:])


@pytest.mark.parametrize("name", LMS)
def test_branches_equal_one_pass(name: str) -> None:
    lm, params = LMS[name], params_of(name)
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(3, 4, lm.width)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])  # unpadded, padded left, padded right
    first, past = jax.jit(lambda: lm.apply({"params": params}, embeds, mask, method="prefill"))()
    heads, size = (lm.kv_heads, lm.head_dim) if name == "qwen" else (lm.heads, lm.width // lm.heads)
    assert past.cache.k.shape == (3, lm.depth, heads, 4, size)
    more = rng.normal(size=(3, 2, 5, lm.width)).astype(np.float32)  # two branches of five tokens
    own = lm.apply({"params": params}, 3, 2, 6, method="open_branches")
    assert own.k.shape == (3, 2, lm.depth, heads, 6, size)

    @jax.jit
    def branch(x: jax.Array, own: language_model.Cache, read: int) -> tuple:
        return lm.apply({"params": params}, x, past._replace(read=jnp.int32(read)), own, method="branch")

    start, own = branch(more[:, :, :3], own, 0)
    rest, _ = branch(more[:, :, 3:], own, 3)
    whole_pass = jax.jit(lambda x: lm.apply({"params": params}, x)[0])
    for b, seen in enumerate(mask):
        row = embeds[b][seen == 1]
        n = len(row)
        for c in range(2):
            padding = np.zeros((9 - n - 5, lm.width), np.float32)
            whole = whole_pass(np.concatenate([row, more[b, c], padding])[None])
            np.testing.assert_allclose(first[b][seen == 1], whole[:n], atol=3e-5)
            np.testing.assert_allclose(start[b, c], whole[n : n + 3], atol=3e-5)
            np.testing.assert_allclose(rest[b, c], whole[n + 3 : n + 5], atol=3e-5)


@pytest.mark.parametrize("name", LMS)
def test_scores_of_branches_equal_recomputation(name: str) -> None:
    """Log-probabilities of two answers after left-padded prompts."""
    lm, params, rows = LMS[name], params_of(name), rows_of(name, "middle")
    answers = np.random.default_rng(3).integers(1, 40, (3, 2, 4)).astype(np.int32)
    targets = np.ones((3, 2, 4), bool)
    targets[:, 1, 3] = False

    @jax.jit
    def score(embeds: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, past = lm.apply({"params": params}, embeds, mask, method="prefill")
        return decode.branch_scores(lm, params, past, answers, targets, language_model.last_state(hidden, mask))

    found = score(*padded(rows, "left"))
    for b, row in enumerate(rows):
        for c in range(2):
            words = answers[b, c][targets[b, c]].tolist()
            logs = [log_softmax(next_logits(name, row, words[:i]))[word] for i, word in enumerate(words)]
            np.testing.assert_allclose(found[b, c], sum(logs), rtol=1e-4)


def test_rows_longer_than_max_positions_raise(params: dict) -> None:
    prompt = decode.prompt_of(LM, params, None, np.ones((1, 3), np.int32), np.array([3]))
    with pytest.raises(ValueError, match="need 33 positions, the model has 32"):
        decode.greedy(LM, params, *prompt, new_tokens=30, eos=0)
    for lm in (LM, LMS["qwen"]):
        with pytest.raises(ValueError, match=r"max_positions: .*need 33 positions, the model has 32"):
            jax.eval_shape(lambda x, lm=lm: lm.init(jax.random.key(0), x), np.zeros((1, 33, 32)))
    for lm in (LMS["bloom"], LMS["qwen"].clone(max_positions=None)):
        jax.eval_shape(lambda x, lm=lm: lm.init(jax.random.key(0), x), np.zeros((1, 9999, 32)))


SMALL = GPT3(vocab=4, width=16, depth=1, heads=2, max_positions=16)


def sentences(new: int, eos: int) -> list[tuple[int, ...]]:
    """Every output of at most `new` tokens, ended by `eos` or by the limit."""
    inner = [t for t in range(SMALL.vocab) if t != eos]
    ended = [(*words, eos) for n in range(new) for words in itertools.product(inner, repeat=n)]
    return ended + list(itertools.product(inner, repeat=new))


@functools.cache
def sharp(seed: int) -> dict:
    shapes = jax.eval_shape(lambda: SMALL.init(jax.random.key(0), jnp.zeros((1, 1, SMALL.width))))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.7, leaf.shape).astype(np.float32), shapes)


@jax.jit
def log_probabilities(params: dict, rows: jax.Array) -> jax.Array:
    hidden = SMALL.apply({"params": params}, SMALL.apply({"params": params}, rows, method="embed"))
    return jax.nn.log_softmax(SMALL.apply({"params": params}, hidden, method="logits"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_wide_beam_finds_what_brute_force_finds(seed: int, power: float) -> None:
    params, eos, new, prompt = sharp(seed), 3, 3, [0, 1]
    everything = sentences(new, eos)
    rows = np.zeros((len(everything), len(prompt) + new), np.int32)  # causal: sentences do not see the zeros
    for row, words in zip(rows, everything, strict=True):
        row[: len(prompt) + len(words)] = [*prompt, *words]
    each = np.asarray(log_probabilities(params, rows))
    logs = {}
    for r, words in enumerate(everything):
        total = sum(float(each[r, len(prompt) - 1 + i, word]) for i, word in enumerate(words))
        logs[words] = total / len(words) ** power
    best = max(logs, key=logs.get)
    # With as many beams as prefixes nothing is pruned. The vocabulary is large enough for two candidates of each beam.
    search = partial(decode_beam.beam, SMALL, new_tokens=new, eos=eos, beams=27, length_power=power)
    out = jax.jit(search)(params, params["token_embed"][np.array([prompt])], np.ones((1, 2), bool))
    found = out.ids[0, : int(out.lengths[0])].tolist()
    assert found == [word for word in best if word != eos]
    np.testing.assert_allclose(out.scores[0], logs[best], rtol=1e-4)


def reference_rule(step_logs, beams: int, eos: int, prompt: int, row_length: int) -> tuple[list[int], float]:
    """The reference's beam search for one row (docs/models/language_models.md, "Beam search"), in plain Python.

    `step_logs(tokens)` returns the log-probabilities of the next token.
    """
    open_beams, finished = [((), 0.0)], []
    for n in range(prompt, row_length):
        pool = []
        for tokens, score in open_beams:
            pool += [(score + float(log), tokens, t) for t, log in enumerate(step_logs(tokens))]
        best = sorted(pool, key=lambda item: -item[0])[: 2 * beams]
        following = []
        for r, (score, tokens, t) in enumerate(best):
            if t == eos:
                if r < beams:
                    finished.append((score / row_length, tokens))
            else:
                following.append(((*tokens, t), score))
            if len(following) == beams:
                break
        finished = sorted(finished, key=lambda item: -item[0])[:beams]
        if len(finished) == beams and finished[-1][0] >= best[0][0] / (n + 1 - prompt):
            break
        open_beams = following
    else:
        finished += [(score / row_length, tokens) for tokens, score in open_beams]
    value, tokens = max(finished, key=lambda item: item[0])
    return list(tokens), value


@pytest.mark.parametrize("beams", [2, 5])
def test_reference_rule_behind_a_prefix(params: dict, beams: int) -> None:
    """`row_length` counts text tokens only, as in the reference."""
    rng = np.random.default_rng(beams)
    prefix = rng.normal(size=(4, 3, LM.width)).astype(np.float32)
    ids, lengths, row_length, eos = rng.integers(1, LM.vocab, (4, 4)).astype(np.int32), np.array([4, 1, 3, 2]), 11, 7
    prompt = decode.prompt_of(LM, params, prefix, ids, lengths)
    out = beam(LM, params, *prompt, beams=beams, row_length=row_length, visual=3)
    for b in range(4):
        row = np.concatenate([prefix[b], table("gpt3")[ids[b, : lengths[b]]]])

        def logs(tokens: tuple[int, ...], row: np.ndarray = row) -> np.ndarray:
            return log_softmax(next_logits("gpt3", row, tokens))

        tokens, value = reference_rule(logs, beams, eos, int(lengths[b]), row_length)
        assert out.ids[b, : int(out.lengths[b])].tolist() == tokens
        np.testing.assert_allclose(out.scores[b], value, rtol=1e-4)


def test_sampling_stays_in_its_set(params: dict) -> None:
    prompt = params["token_embed"][np.array([[5, 6]] * 64)], np.ones((64, 2), bool)
    logits = next_logits("gpt3", prompt[0][0], [])
    best = set(np.argsort(-logits)[:3].tolist())

    def draw(top_k: int, tokens: int, key: jax.Array) -> jax.Array:
        run = partial(decode.generate, LM, rules=Rules(temperature=1, top_k=top_k), new_tokens=tokens, eos=0)
        return jax.jit(run)(params, *prompt, key=key).ids

    first = set(draw(3, 1, jax.random.key(0))[:, 0].tolist())
    assert first <= best and len(first) > 1
    alone = draw(1, 4, jax.random.key(1))
    greedy = jax.jit(partial(decode.greedy, LM, new_tokens=4, eos=0))(params, *prompt)
    assert alone.tolist() == greedy.ids.tolist()


def test_a_row_with_its_own_key_draws_the_same_in_any_batch(params: dict) -> None:
    prompt = params["token_embed"][np.array([[5, 6]] * 6)], np.ones((6, 2), bool)
    keys = jax.random.split(jax.random.key(3), 6)
    draw = jax.jit(partial(decode.generate, LM, rules=Rules(temperature=1), new_tokens=5, eos=0))
    drawn = draw(params, *prompt, key=keys).ids
    assert len({tuple(row) for row in drawn.tolist()}) > 1
    order = np.array([4, 0, 5, 2, 2, 1])
    assert draw(params, *prompt, key=keys[order]).ids.tolist() == drawn[order].tolist()


def full_size_results(program: str, shape: str) -> list[str]:
    """Instructions in loops of a compiled program that create an array of this shape.

    Instructions that pass the array on or update a slice of it in place are not counted.
    """
    computations: dict[str, list[str]] = {}
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computations[head[1]] = current = []
        elif " = " in line:
            current.append(line.strip())
    calls = {
        name: {
            called for line in body for called in re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", line)
        }
        for name, body in computations.items()
    }
    loops = set(re.findall(r"body=%?([\w.\-]+)", program))
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", program))  # values inside a fusion are not stored
    inside, ahead = set(), list(loops)
    while ahead:
        if (name := ahead.pop()) not in inside:
            inside.add(name)
            ahead += calls[name]
    assert loops and inside <= computations.keys()

    def in_place(line: str) -> bool:
        operation = re.search(r"\]\S* ([\w\-]+)\(", line)[1]
        if operation == "fusion":
            root = next(x for x in computations[re.search(r"calls=%?([\w.\-]+)", line)[1]] if x.startswith("ROOT"))
            return "dynamic-update-slice(" in root
        return operation in ("parameter", "get-tuple-element", "bitcast", "dynamic-update-slice")

    lines = [line for name in inside - fused for line in computations[name]]
    whole = [line for line in lines if re.search(rf"= f32\[{shape}\]", line)]
    assert whole  # the program has arrays of this shape
    return [line for line in whole if not in_place(line)]


@pytest.mark.parametrize(("name", "branches"), [("gpt3", 1), ("gpt3", 3), ("qwen", 3)])
def test_no_cache_is_copied_in_the_loop(name: str, branches: int) -> None:
    """Generation never copies the keys and values of the past or of the branches."""
    lm = LMS[name]
    search = decode.greedy if branches == 1 else partial(decode_beam.beam, beams=branches)
    run = jax.jit(partial(search, lm, new_tokens=9, eos=0))
    prompt = np.zeros((2, 7, lm.width), np.float32), np.ones((2, 7), bool)
    program = run.lower(params_of(name), *prompt).compile().as_text()
    heads, head = (lm.kv_heads, lm.head_dim) if name == "qwen" else (lm.heads, lm.width // lm.heads)
    for shape in (f"2,{branches},{lm.depth},{heads},9,{head}", f"2,{lm.depth},{heads},7,{head}"):
        assert full_size_results(program, shape) == []


@pytest.mark.parametrize(("size", "k"), [(1000, 3), (1024, 3), (700, 2), (300, 10), (2000, 1)])
def test_top_k_by_groups_is_top_k(size: int, k: int) -> None:
    """Equal values and indices with many ties, rows with fewer than k finite values, and axes that 128 does not divide."""
    rng = np.random.default_rng(size)
    x = rng.integers(0, 4, (3, 5, size)).astype(np.float32)
    x[0, 0, :] = -np.inf
    x[0, 1, rng.integers(0, size, size - 1)] = -np.inf
    x[1] = rng.normal(size=(5, size))
    x[2, 0] = np.arange(size)
    for ours, theirs in zip(jax.jit(decode_sampling.top_k, static_argnums=1)(x, k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)
