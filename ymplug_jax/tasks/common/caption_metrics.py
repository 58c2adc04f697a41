"""BLEU, METEOR, ROUGE-L and CIDEr on single Chinese characters, equal to the COCO caption toolkit's, without its Java.

Every prediction is one string, every item has one or more references. Texts are normalised first, so
that a token is a character. BLEU comes from sacrebleu; no kept library computes the other three in COCO's form without a
Java runtime, so they stand here; stored outputs of the toolkit itself check all of them.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ROUGE_BETA = 1.2
CIDER_SIGMA, CIDER_ORDER = 6.0, 4
# METEOR 1.5 for English, which is what the toolkit runs: of its four matchers only the exact one applies to single
# Chinese characters, and none of them is on its list of function words.
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA = 0.85, 0.2, 0.6
METEOR_BEAM = 40

Tokens = list[str]


def normalise(text: str) -> Tokens:
    """The characters U+4E00..U+9FA5 of a text; letters, digits and punctuation vanish."""
    return re.findall(r"[\u4e00-\u9fa5]", text)


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Scores of a set of captions.

    Args:
      predictions: N texts.
      references: N lists of at least one text.

    Returns:
      {"bleu1", ..., "bleu4", "meteor", "rouge_l", "cider"} of the whole set, fractions (CIDEr: 0..10), and for each item
      {"meteor", "rouge_l", "cider"}.

    Raises:
      ValueError: nothing to score, an item without references, or a reference without a Chinese character.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} lists of references; each needs one or more"
        )
    said = [normalise(text) for text in predictions]
    right = [[normalise(text) for text in texts] for texts in references]
    for item, (texts, tokens) in enumerate(zip(references, right, strict=True)):
        if not all(tokens):
            raise ValueError(
                f"item {item}: the reference {texts[tokens.index([])]!r} has no Chinese character, and the metrics count "
                "those alone"
            )
    total: dict[str, float] = {f"bleu{n}": bleu(said, right, n) for n in range(1, 5)}
    total["meteor"], meteors = meteor(said, right)
    rouges = [rouge_l(tokens, texts) for tokens, texts in zip(said, right, strict=True)]
    ciders = cider(said, right)
    total |= {"rouge_l": float(np.mean(rouges)), "cider": float(np.mean(ciders))}
    each = [
        {"meteor": m, "rouge_l": r, "cider": c} for m, r, c in zip(meteors, rouges, ciders, strict=True)
    ]  # fmt: skip
    return total, each


def bleu(predictions: list[Tokens], references: list[list[Tokens]], order: int) -> float:
    """Corpus BLEU-`order`, no smoothing, the closest reference length for the brevity penalty."""
    from sacrebleu.metrics import BLEU  # here: training and benchmarks run without it

    most = max(len(texts) for texts in references)
    columns = [[" ".join(texts[i]) if i < len(texts) else None for texts in references] for i in range(most)]
    metric = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
    said = [" ".join(tokens) for tokens in predictions]
    return metric.corpus_score(said, columns).score / 100  # type: ignore[arg-type]  # it takes None for no reference


def rouge_l(tokens: Tokens, references: list[Tokens]) -> float:
    """F-measure of the longest common subsequence; precision and recall are each the best over the references."""
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
    """CIDEr-D of each item; rarity of an n-gram is counted over the references of this very set."""
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
    """METEOR 1.5 of the set and of each item: the best reference of an item counts, and the set is scored on summed counts."""
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

    A chunk is a run that is contiguous in both texts; an alignment that is perfect counts no chunk at all. The search is the
    toolkit's, with what it finds and what it misses: along the reference, the best `METEOR_BEAM` paths go on; a chunk is
    counted where it ends; the crossing of a match is charged to the paths that are grown after it, not to its own.
    """
    places: dict[str, list[int]] = {}
    for i, token in enumerate(said):
        places.setdefault(token, []).append(i)
    frequency = Counter(right)
    # (-matches, chunks, crossing, place in `said` after the last match or -1, places used)
    paths: list[tuple[int, int, int, int, frozenset]] = [(0, 0, 0, -1, frozenset())]
    for j, token in enumerate(right):
        grown = []
        there = places.get(token, [])
        only = len(there) == 1 and frequency[token] == 1  # then it is taken
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
