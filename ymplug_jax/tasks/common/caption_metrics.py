"""BLEU, METEOR, ROUGE-L and CIDEr of captions, equal to the COCO caption toolkit's but without Java.

Each item has one predicted text and one or more references. Texts become tokens first: single Chinese characters, or the words of
`english_tokens`. METEOR is computed for Chinese only, because for English it compares stems, synonyms and paraphrases as well.
BLEU comes from sacrebleu. The other three are implemented here because no maintained library computes the COCO versions without a
Java runtime. The tests compare all four with stored outputs of the toolkit. See docs/models/mplug_video.md, "Caption metrics".
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ymplug_jax.tasks.common import english_tokens

ROUGE_BETA = 1.2
CIDER_SIGMA, CIDER_ORDER = 6.0, 4
# The toolkit runs METEOR 1.5 for English. Of its four matchers only exact matching applies to single Chinese characters, and its list
# of function words contains none of them.
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA = 0.85, 0.2, 0.6
METEOR_BEAM = 40
NO_METEOR = "METEOR is left out: for English it compares stems, synonyms and paraphrases, which need its Java program"

Tokens = list[str]


def normalise(text: str) -> Tokens:
    """The characters U+4E00..U+9FA5 of a text. Letters, digits and punctuation are dropped."""
    return re.findall(r"[\u4e00-\u9fa5]", text)


TOKENS: dict[str, Callable[[str], Tokens]] = {"zh": normalise, "en": english_tokens.tokens}
LANGUAGES = tuple(TOKENS)


def counts(text: str, language: str) -> bool:
    """Whether the metrics of a language count a text: it has a Chinese character or, for English, a Latin letter or a digit."""
    return bool(normalise(text) if language == "zh" else re.search(r"[A-Za-z0-9\u00C0-\u024F]", text))


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], language: str = "zh"
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Score a set of captions.

    Args:
      predictions: N texts.
      references: N lists of at least one text.
      language: Language of all texts, one of LANGUAGES.

    Returns:
      {"bleu1", ..., "bleu4", "meteor", "rouge_l", "cider"} of the whole set, as fractions (CIDEr: 0..10), and
      {"meteor", "rouge_l", "cider"} of each item; without "meteor" for English.

    Raises:
      ValueError: There is nothing to score, an item has no references, or a reference is not in the language.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references; give each prediction one or more references"
        )
    for item, texts in enumerate(references):
        for text in texts:
            if not counts(text, language):
                raise ValueError(f"item {item}: the reference {text!r} is not in the language {language!r}; remove it")
    said = [TOKENS[language](text) for text in predictions]
    right = [[TOKENS[language](text) for text in texts] for texts in references]
    total: dict[str, float] = {f"bleu{n}": bleu(said, right, n) for n in range(1, 5)}
    each: dict[str, list[float]] = {}
    if language == "zh":
        total["meteor"], each["meteor"] = meteor(said, right)
    each["rouge_l"] = [rouge_l(tokens, texts) for tokens, texts in zip(said, right, strict=True)]
    each["cider"] = cider(said, right)
    total |= {name: float(np.mean(each[name])) for name in ("rouge_l", "cider")}
    return total, [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]


def bleu(predictions: list[Tokens], references: list[list[Tokens]], order: int) -> float:
    """Corpus BLEU up to n-grams of `order`, without smoothing; the brevity penalty uses the closest reference length."""
    from sacrebleu.metrics import BLEU  # imported here because training and benchmarks run without sacrebleu

    most = max(len(texts) for texts in references)
    columns = [[" ".join(texts[i]) if i < len(texts) else None for texts in references] for i in range(most)]
    metric = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
    said = [" ".join(tokens) for tokens in predictions]
    return metric.corpus_score(said, columns).score / 100  # type: ignore[arg-type]  # sacrebleu accepts None for a missing reference


def rouge_l(tokens: Tokens, references: list[Tokens]) -> float:
    """F-measure of the longest common subsequence, from the best precision and the best recall over the references."""
    common = [_common_subsequence(tokens, reference) for reference in references]
    precision = max((c / len(tokens) for c in common), default=0.0) if tokens else 0.0
    recall = max((c / len(r) for c, r in zip(common, references, strict=True) if r), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    lengths = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if x == y else max(lengths[j], lengths[j - 1])
    return lengths[-1]


def cider(predictions: list[Tokens], references: list[list[Tokens]]) -> list[float]:
    """CIDEr-D of each item. Document frequencies are counted over the references of this set."""
    documents: Counter = Counter()
    for texts in references:
        documents.update(set().union(*(_ngrams(text) for text in texts)))
    all_items = math.log(len(references))

    def vectors(tokens: Tokens) -> tuple[list[dict], list[float], int]:
        counts = _ngrams(tokens)
        weights: list[dict] = [{} for _ in range(CIDER_ORDER)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (all_items - math.log(max(1.0, documents[gram])))
        norms = [math.sqrt(sum(w * w for w in part.values())) for part in weights]
        return weights, norms, max(len(tokens) - 1, 0)  # the toolkit measures length in bigrams

    def similarity(a: tuple, b: tuple) -> float:
        penalty = math.exp(-((a[2] - b[2]) ** 2) / (2 * CIDER_SIGMA**2))
        total = 0.0
        for mine, theirs, norm_a, norm_b in zip(a[0], b[0], a[1], b[1], strict=True):
            product = sum(min(w, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, w in mine.items())
            total += product / (norm_a * norm_b) if norm_a and norm_b else product
        return total * penalty / CIDER_ORDER

    scores = []
    for tokens, texts in zip(predictions, references, strict=True):
        mine = vectors(tokens)
        scores.append(10 * sum(similarity(mine, vectors(text)) for text in texts) / len(texts))
    return scores


def _ngrams(tokens: Tokens) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, CIDER_ORDER + 1) for i in range(len(tokens) - n + 1))


def meteor(predictions: list[Tokens], references: list[list[Tokens]]) -> tuple[float, list[float]]:
    """METEOR 1.5 of the set and of each item. An item uses its best reference; the set score uses the counts summed over items."""
    best = []
    for tokens, texts in zip(predictions, references, strict=True):
        counts = [np.array([*align(tokens, text), len(tokens), len(text)]) for text in texts]
        best.append(max(counts, key=lambda c: _meteor(*c)))
    return _meteor(*np.sum(best, axis=0)), [_meteor(*counts) for counts in best]


def _meteor(matches: int, chunks: int, said: int, right: int) -> float:
    if not matches:
        return 0.0
    precision, recall = matches / said, matches / right
    mean = 1 / ((1 - METEOR_ALPHA) / precision + METEOR_ALPHA / recall)
    return float(mean * (1 - METEOR_GAMMA * (chunks / matches) ** METEOR_BETA))


def align(said: Tokens, right: Tokens) -> tuple[int, int]:
    """(matches, chunks) of METEOR's alignment of equal tokens: most matches, then fewest chunks, then least crossing.

    A chunk is a run of matches that is contiguous in both texts; a perfect alignment counts 0 chunks. The beam search reproduces
    the toolkit's, including its misses: it moves along the reference and keeps the best `METEOR_BEAM` paths, it counts a chunk
    where the chunk ends, and it adds the crossing of a match to the paths grown after it instead of to its own path.
    """
    places: dict[str, list[int]] = {}
    for i, token in enumerate(said):
        places.setdefault(token, []).append(i)
    frequency = Counter(right)
    # (-matches, chunks, crossing, position in `said` after the last match or -1, positions used)
    paths: list[tuple[int, int, int, int, frozenset]] = [(0, 0, 0, -1, frozenset())]
    for j, token in enumerate(right):
        grown = []
        there = places.get(token, [])
        only = len(there) == 1 and frequency[token] == 1  # an unambiguous match is always taken
        for matches, chunks, crossing, after, used in paths[:METEOR_BEAM]:
            for i in there:
                if i in used:
                    continue
                own = crossing + abs(i - j) * only
                grown.append((matches - 1, chunks + (after not in (-1, i)), own, i + 1, used | {i}))
                crossing += abs(i - j)
            if not only:
                grown.append((matches, chunks + (after != -1), crossing, -1, used))
        paths = sorted(grown, key=lambda path: path[:3])
    ended = [(path[0], path[1] + (path[3] != -1), path[2]) for path in paths[:METEOR_BEAM]]
    matches, chunks, _ = min(ended)
    return -matches, 0 if -matches == len(said) == len(right) and chunks == 1 else chunks
