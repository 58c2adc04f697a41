"""The rules that choose a token equal Hugging Face's, on random logits and in whole answers; edge cases have a defined result."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_decode import LMS, params_of
from transformers.generation import logits_process as theirs

from ymplug_jax.convert import bloom as tables
from ymplug_jax.convert import rules as convert_rules
from ymplug_jax.models import decode, decode_beam, decode_sampling
from ymplug_jax.models.decode_sampling import Rules

VOCAB, EOS = 40, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (6, VOCAB)).astype(np.float32)
SAID = RNG.integers(0, 6, (6, 12)).astype(np.int32)  # few different tokens, so that sequences repeat


def processors(rules: Rules) -> list:
    """Hugging Face's processors of the rules, in its order."""
    made = []
    if rules.repetition_penalty != 1:
        made.append(theirs.RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    if rules.no_repeat_ngram:
        made.append(theirs.NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram))
    if rules.draws:
        made.append(theirs.TemperatureLogitsWarper(rules.temperature))
        if rules.top_k:
            made.append(theirs.TopKLogitsWarper(rules.top_k))
        if rules.top_p < 1:
            made.append(theirs.TopPLogitsWarper(rules.top_p))
    return made


def expected(rules: Rules, logits: np.ndarray, said: np.ndarray, count: int) -> np.ndarray:
    scores = torch.from_numpy(logits.copy())
    for process in processors(rules):
        scores = process(torch.from_numpy(said[:, :count].astype(np.int64)), scores)
    return scores.numpy()


@pytest.mark.parametrize(
    "rules",
    [
        Rules(repetition_penalty=1.7),
        Rules(repetition_penalty=0.5),
        *(Rules(no_repeat_ngram=n) for n in (1, 2, 3, 12, 13)),
        Rules(temperature=0.4),
        *(Rules(temperature=1.0, top_k=k) for k in (1, 5, VOCAB, 999)),
        *(Rules(temperature=1.0, top_p=p) for p in (1e-6, 0.3, 0.9)),
        Rules(1.3, 2, 0.7, 9, 0.8),
    ],
    ids=str,
)
def test_rules_equal_those_of_hugging_face(rules: Rules) -> None:
    @jax.jit
    def ours(logits: jax.Array, said: jax.Array, count: jax.Array) -> jax.Array:
        scores = decode_sampling.penalised(logits, rules, said, count, EOS)
        return decode_sampling.filtered(scores, rules) if rules.draws else scores

    for count in (0, 1, 2, 7, 12):
        if not count and rules.repetition_penalty != 1:
            continue  # theirs cannot gather from an empty text
        found, wanted = np.asarray(ours(LOGITS, SAID, count)), expected(rules, LOGITS, SAID, count)
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(wanted))
        if rules.draws:  # ours subtracts the maximum
            found, wanted = found - found.max(-1, keepdims=True), wanted - wanted.max(-1, keepdims=True)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_ties_at_the_limit_are_kept_and_the_lower_id_wins() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [3, 9, 20]] = 2
    kept = np.asarray(decode_sampling.filtered(logits, Rules(temperature=1.0, top_k=2)))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [3, 9, 20]
    assert int(decode_sampling.choose(logits, Rules(), SAID[:1], jnp.int32(0), EOS)[0]) == 3


def test_when_all_tokens_are_forbidden_the_answer_ends() -> None:
    said = np.arange(VOCAB, dtype=np.int32)[None]
    for rules in (Rules(no_repeat_ngram=1), Rules(no_repeat_ngram=1, temperature=1.0, top_k=3, top_p=0.5)):
        token = decode_sampling.choose(LOGITS[:1], rules, said, jnp.int32(VOCAB), EOS, jax.random.key(0))
        assert int(token[0]) == EOS


def test_a_tiny_temperature_chooses_the_likeliest_token() -> None:
    found = decode_sampling.choose(
        LOGITS, Rules(temperature=1e-30, top_p=0.9), SAID, jnp.int32(0), EOS, jax.random.key(0)
    )
    assert found.tolist() == LOGITS.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("top_p", float("nan")),
        ("repetition_penalty", 0), ("repetition_penalty", float("inf")), ("no_repeat_ngram", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .* is out of range; give "):
        Rules(**{name: value})


def bloom_of_hugging_face() -> transformers.BloomForCausalLM:
    """Hugging Face's BLOOM with the parameters of the tests' BLOOM."""
    lm = LMS["bloom"]
    config = transformers.BloomConfig(
        vocab_size=lm.vocab, hidden_size=lm.width, n_layer=lm.depth, n_head=lm.heads, layer_norm_epsilon=lm.ln_eps,
        attn_implementation="eager", bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    model = transformers.BloomForCausalLM(config).eval()
    weights = convert_rules.to_torch(tables.BLOOM, params_of("bloom"))
    model.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}, strict=False
    )  # tied output
    return model


NEW, PROMPTS = 10, [[3, 9, 4, 22], [5], [30, 2, 14]]


@pytest.mark.parametrize(
    ("rules", "beams", "power"),
    [(Rules(1.5, 2), 1, 1.0), (Rules(), 4, 0.5), (Rules(1.5, 2), 3, 1.0)],
)
def test_answers_equal_those_of_hugging_face(rules: Rules, beams: int, power: float) -> None:
    """Ids of greedy and beam search. Rows of different length, padded on the left, give what Hugging Face gives for each alone."""
    model, lm, params = bloom_of_hugging_face(), LMS["bloom"], params_of("bloom")
    ids, mask = np.zeros((3, 4), np.int32), np.zeros((3, 4), bool)
    for row, words in enumerate(PROMPTS):
        ids[row, 4 - len(words) :], mask[row, 4 - len(words) :] = words, True

    @jax.jit
    def run(params: dict) -> decode.Generated:
        embeds = lm.apply({"params": params}, ids, method="embed")
        if beams == 1:
            return decode.generate(lm, params, embeds, mask, rules, new_tokens=NEW, eos=EOS)
        state = decode.start(lm, params, embeds, mask, NEW, beams)
        return decode_beam.search(lm, params, state, jnp.full(3, NEW), rules, NEW, EOS, length_power=power)

    found = run(params)
    for row, words in enumerate(PROMPTS):
        embeds = model.transformer.word_embeddings(torch.tensor([words]))  # as in chat: penalties see no prompt
        out = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(1, len(words)), max_new_tokens=NEW, num_beams=beams, do_sample=False,
            repetition_penalty=rules.repetition_penalty, no_repeat_ngram_size=rules.no_repeat_ngram,
            **({"early_stopping": "never", "length_penalty": power} if beams > 1 else {}),
        )[0].tolist()  # fmt: skip
        wanted = out[: out.index(EOS)] if EOS in out else out
        assert found.ids[row, : int(found.lengths[row])].tolist() == wanted


def test_rows_with_their_own_keys_draw_what_they_draw_alone() -> None:
    """Left and right padding, penalties included."""
    lm, params, keys = LMS["bloom"], params_of("bloom"), jax.random.split(jax.random.key(1), 3)
    rules = Rules(1.3, 2, 1.2, 20, 0.9)

    @partial(jax.jit, static_argnums=0)
    def run(count: int, ids: jax.Array, mask: jax.Array, keys: jax.Array) -> jax.Array:
        embeds = lm.apply({"params": params}, ids, method="embed")
        return decode.generate(lm, params, embeds, mask, rules, keys, new_tokens=NEW, eos=-1).ids

    rows = {}
    for side in ("left", "right"):
        ids, mask = np.zeros((3, 4), np.int32), np.zeros((3, 4), bool)
        for row, words in enumerate(PROMPTS):
            place = slice(4 - len(words), 4) if side == "left" else slice(0, len(words))
            ids[row, place], mask[row, place] = words, True
        rows[side] = run(3, ids, mask, keys).tolist()
    assert rows["left"] == rows["right"] and len({tuple(row) for row in rows["left"]}) == 3
    for row in range(3):
        assert run(1, ids[row : row + 1], mask[row : row + 1], keys[row : row + 1])[0].tolist() == rows["left"][row]
