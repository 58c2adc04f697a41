"""Generation with a cache against computing everything again for each token."""

import functools
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.models import decode
from ymplug_jax.models.gpt3 import GPT3

LM = GPT3(vocab=40, width=32, depth=2, heads=4, max_positions=32)


@pytest.fixture(scope="module")
def params() -> dict:
    shapes = jax.eval_shape(lambda: LM.init(jax.random.key(0), jnp.zeros((1, 1, LM.width))))["params"]
    rng = np.random.default_rng(0)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        spread = {"scale": 0.1, "bias": 0.1}.get(kind, 0.5)  # lively enough for the tokens to differ
        return (float(kind == "scale") + rng.normal(0, spread, leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(value, shapes)


@partial(jax.jit, static_argnames="queries")
def logits_without_cache(params: dict, prefix: jax.Array, ids: jax.Array, queries: int) -> jax.Array:
    embeds = LM.apply({"params": params}, ids, method="embed")
    hidden = LM.apply({"params": params}, jnp.concatenate([prefix, embeds], axis=1))
    return LM.apply({"params": params}, hidden[:, queries:], method="logits")


def recompute(params: dict, prefix: np.ndarray | None, prompt: np.ndarray, new_tokens: int, eos: int) -> list[int]:
    """Greedy continuation of one row, computing everything again for each token, up to but without `eos`."""
    prefix = np.zeros((0, LM.width), np.float32) if prefix is None else prefix
    row = np.zeros((1, 16), np.int32)  # what stands behind the last token is not seen
    row[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + new_tokens):
        token = int(logits_without_cache(params, prefix[None], row, len(prefix))[0, end - 1].argmax())
        if token == eos:
            break
        row[0, end] = token
    else:
        end += 1
    return row[0, len(prompt) : end].tolist()


@pytest.mark.parametrize("queries", [0, 5])
def test_cached_greedy_equals_recomputation(params: dict, queries: int) -> None:
    rng = np.random.default_rng(queries)
    prefix = rng.normal(size=(3, queries, LM.width)).astype(np.float32) if queries else None
    ids, lengths, new = rng.integers(1, LM.vocab, (3, 4)).astype(np.int32), np.array([4, 1, 3]), 9
    rows = [(None if prefix is None else prefix[b], ids[b, : lengths[b]]) for b in range(3)]
    free = [recompute(params, *row, new, eos=-1) for row in rows]
    eos = free[0][4]  # so that the first row stops early
    expected = [recompute(params, *row, new, eos=eos) for row in rows]
    run = jax.jit(partial(decode.greedy, LM, new_tokens=new, eos=eos))
    out = run(params, prefix, ids, lengths)
    assert out.ids.shape == (3, new)
    assert out.lengths.tolist() == [len(row) for row in expected]
    for b, row in enumerate(expected):
        assert out.ids[b, : len(row) + 1].tolist() == (row + [eos])[:new]
    assert min(out.lengths) < max(out.lengths)


def test_branches_equal_one_pass(params: dict) -> None:
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(2, 9, LM.width)).astype(np.float32)
    first, cache = jax.jit(lambda: LM.apply({"params": params}, embeds[:, :4], method="prefill"))()
    assert cache.k.shape == (2, LM.depth, LM.heads, 4, LM.width // LM.heads)
    # The second row goes on from its third position: what the cache holds behind it must not be seen.
    length = np.array([4, 3], np.int32)
    more = rng.normal(size=(2, 3, 5, LM.width)).astype(np.float32)  # three branches of five tokens
    own = LM.apply({"params": params}, 2, 3, 6, method="open_branches")

    def branch(x: np.ndarray, own: decode.Cache, read: int) -> tuple:
        past = decode.Past(cache, length, jnp.int32(read))
        return jax.jit(lambda: LM.apply({"params": params}, x, past, own, method="branch"))()

    start, own = branch(more[:, :, :3], own, 0)
    rest, _ = branch(more[:, :, 3:], own, 3)
    for b in range(2):
        for k in range(3):
            whole = LM.apply({"params": params}, np.concatenate([embeds[b, : length[b]], more[b, k]])[None])[0]
            np.testing.assert_allclose(first[b, : length[b]], whole[: length[b]], atol=3e-5)
            np.testing.assert_allclose(start[b, k], whole[length[b] : length[b] + 3], atol=3e-5)
            np.testing.assert_allclose(rest[b, k], whole[length[b] + 3 :], atol=3e-5)


def test_what_does_not_fit_is_refused(params: dict) -> None:
    with pytest.raises(ValueError, match="need 33 positions, the model has 32"):
        decode.greedy(LM, params, None, np.ones((1, 3), np.int32), np.array([3]), new_tokens=30, eos=0)


SMALL = GPT3(vocab=4, width=16, depth=1, heads=2, max_positions=16)


def sentences(new: int, eos: int) -> list[tuple[int, ...]]:
    """Every output of at most `new` tokens: ended by `eos`, or out of room."""
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
    rows = np.zeros((len(everything), len(prompt) + new), np.int32)  # what stands behind a sentence is not seen
    for row, words in zip(rows, everything, strict=True):
        row[: len(prompt) + len(words)] = [*prompt, *words]
    each = np.asarray(log_probabilities(params, rows))
    logs = {}
    for r, words in enumerate(everything):
        total = sum(float(each[r, len(prompt) - 1 + i, word]) for i, word in enumerate(words))
        logs[words] = total / len(words) ** power
    best = max(logs, key=logs.get)
    # As many beams as there are prefixes: nothing is pruned. Two candidates for each need a vocabulary of that size.
    search = partial(decode.beam, SMALL, new_tokens=new, eos=eos, beams=27, length_power=power)
    ids = np.array([prompt], np.int32)
    out = jax.jit(search)(params, None, ids, np.array([2]))
    found = out.ids[0, : int(out.lengths[0])].tolist()
    assert found == [word for word in best if word != eos]
    np.testing.assert_allclose(out.scores[0], logs[best], rtol=1e-4)


def reference_rule(step_logs, beams: int, eos: int, prompt: int, row_length: int) -> tuple[list[int], float]:
    """The reference's search as section 9 tells it, one row, in plain Python; `step_logs(tokens)` are log-probabilities."""
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


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_reference_rule_in_batches(params: dict, beams: int) -> None:
    """Rows with prompts of different lengths, each as if it were alone."""
    rng = np.random.default_rng(beams)
    prefix = rng.normal(size=(4, 3, LM.width)).astype(np.float32)
    ids, lengths, row_length, eos = rng.integers(1, LM.vocab, (4, 4)).astype(np.int32), np.array([4, 1, 3, 2]), 11, 7
    search = partial(decode.beam, LM, new_tokens=10, eos=eos, beams=beams, row_length=row_length)
    out = jax.jit(search)(params, prefix, ids, lengths)
    for b in range(4):

        def logs(tokens: tuple[int, ...], b: int = b) -> np.ndarray:
            row = np.zeros((1, 16), np.int32)
            text = [*ids[b, : lengths[b]], *tokens]
            row[0, : len(text)] = text
            return jax.nn.log_softmax(logits_without_cache(params, prefix[b : b + 1], row, 3)[0, len(text) - 1])

        tokens, value = reference_rule(logs, beams, eos, int(lengths[b]), row_length)
        assert out.ids[b, : int(out.lengths[b])].tolist() == tokens
        np.testing.assert_allclose(out.scores[b], value, rtol=1e-4)


def test_sampling_stays_in_its_set(params: dict) -> None:
    ids, lengths = np.array([[5, 6]] * 64, np.int32), np.full(64, 2)
    logits = decode.start(LM, params, None, ids[:1], lengths[:1], 1).logits[0, 0]
    best = set(np.argsort(-np.asarray(logits))[:3].tolist())
    draw = jax.jit(partial(decode.sample, LM, new_tokens=1, eos=0, top_k=3))
    first = set(draw(params, None, ids, lengths, jax.random.key(0)).ids[:, 0].tolist())
    assert first <= best and len(first) > 1
    alone = jax.jit(partial(decode.sample, LM, new_tokens=4, eos=0, top_k=1))(
        params, None, ids, lengths, jax.random.key(1)
    )
    greedy = jax.jit(partial(decode.greedy, LM, new_tokens=4, eos=0))(params, None, ids, lengths)
    assert alone.ids.tolist() == greedy.ids.tolist()


def test_a_row_with_its_own_key_draws_the_same_in_any_batch(params: dict) -> None:
    ids, lengths = np.array([[5, 6]] * 6, np.int32), np.full(6, 2)
    keys = jax.random.split(jax.random.key(3), 6)
    draw = jax.jit(partial(decode.sample, LM, new_tokens=5, eos=0))
    drawn = draw(params, None, ids, lengths, keys).ids
    assert len({tuple(row) for row in drawn.tolist()}) > 1
    order = np.array([4, 0, 5, 2, 2, 1])
    assert draw(params, None, ids, lengths, keys[order]).ids.tolist() == drawn[order].tolist()


def full_size_results(program: str, shape: str) -> list[str]:
    """Instructions inside loops of a compiled program that make an array of this shape anew, instead of passing it on or
    writing a slice of it in place."""
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
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", program))  # what stays inside of a fusion is not stored
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
    assert whole  # the arrays are there under this shape
    return [line for line in whole if not in_place(line)]


@pytest.mark.parametrize("branches", [1, 3])
def test_no_cache_is_copied_in_the_loop(params: dict, branches: int) -> None:
    """Keys and values, those of the past and those of the branches, stay where they are while tokens are generated."""
    search = decode.greedy if branches == 1 else partial(decode.beam, beams=branches)
    run = jax.jit(partial(search, LM, new_tokens=9, eos=0))
    prefix, ids = np.zeros((2, 5, LM.width), np.float32), np.ones((2, 2), np.int32)
    program = run.lower(params, prefix, ids, np.ones(2, np.int32)).compile().as_text()
    head = LM.width // LM.heads
    for shape in (f"2,{branches},{LM.depth},{LM.heads},9,{head}", f"2,{LM.depth},{LM.heads},7,{head}"):
        assert full_size_results(program, shape) == []


@pytest.mark.parametrize(("size", "k"), [(1000, 3), (1024, 3), (700, 2), (300, 10), (2000, 1)])
def test_top_k_by_groups_is_top_k(size: int, k: int) -> None:
    """Values and indices, with many ties, with rows of which less than k are finite, and with an axis that 128 does not divide."""
    rng = np.random.default_rng(size)
    x = rng.integers(0, 4, (3, 5, size)).astype(np.float32)
    x[0, 0, :] = -np.inf
    x[0, 1, rng.integers(0, size, size - 1)] = -np.inf
    x[1] = rng.normal(size=(5, size))
    x[2, 0] = np.arange(size)
    for ours, theirs in zip(jax.jit(decode.top_k, static_argnums=1)(x, k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)
