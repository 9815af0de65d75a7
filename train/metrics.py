"""Scores of one generated answer against its reference, each between 0 and 1, and their mean over a task.

Every metric is a function `(prediction, reference, choices) -> float` of one row, so that the mean does not depend
on how the rows were spread over processes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str] | None], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE_WORD = re.compile(r"[a-z0-9]+")


def exact_match(prediction: str, reference: str, choices: Sequence[str] | None = None) -> float:
    """1 if both are the same text, apart from white space at the ends and the length of white space within."""
    return float(prediction.split() == reference.split())


def accuracy(prediction: str, reference: str, choices: Sequence[str] | None = None) -> float:
    """1 if the prediction's first choice is the reference's choice.

    A text's choice (`find_choice`) is the one that it equals; if none, the one that occurs first in it as whole words.
    Upper and lower case and the length of white space do not matter. A prediction without any choice scores 0.

    Args:
        prediction: the generated text.
        reference: the right answer, one of the choices or a text that contains it.
        choices: the possible answers; None means that the reference is the only one, so the prediction scores 1
            if it contains the reference.
    """
    options = list(choices) if choices is not None else [reference]
    expected = find_choice(reference, options)
    return float(expected is not None and find_choice(prediction, options) == expected)


def find_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that `text` names, or None; of two that start at the same place, the longer one."""
    text = _folded(text)
    best: tuple[int, int, int] | None = None
    for index, choice in enumerate(choices):
        wanted = _folded(choice)
        if not wanted:
            continue
        if text == wanted:
            return index
        match = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text)
        if match is not None:
            found = (match.start(), -len(wanted), index)
            best = found if best is None else min(best, found)
    return None if best is None else best[2]


def rouge_l(prediction: str, reference: str, choices: Sequence[str] | None = None) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words.

    Words are the runs of a-z and 0-9 in the lower-cased text, without stemming, as the `rouge-score` package does by
    default. Text in other alphabets has no words there and scores 0.
    """
    found = _ROUGE_WORD.findall(prediction.lower())
    wanted = _ROUGE_WORD.findall(reference.lower())
    common = common_subsequence_length(found, wanted)
    return 2.0 * common / (len(found) + len(wanted)) if common else 0.0


def common_subsequence_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one big-integer step for each word of `b` (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for index, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << index
    full = (1 << len(a)) - 1
    row = full  # a zero bit marks a word of `a` where the common subsequence grows by one
    for word in b:
        hits = row & positions.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def token_f1(prediction: str, reference: str, choices: Sequence[str] | None = None) -> float:
    """F1 of the words in common, as in SQuAD (Rajpurkar et al., arXiv 1606.05250, section 6.1).

    Both texts are lower-cased and lose punctuation, the articles a, an, the, and extra white space. If one has no
    word left, the score is 1 when neither has, else 0.
    """
    found, wanted = _squad_words(prediction), _squad_words(reference)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2.0 * common / (len(found) + len(wanted))


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "rouge_l": rouge_l,
    "token_f1": token_f1,
}


def compute_metric(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str],
    choices: Sequence[Sequence[str] | None] | None = None,
) -> float:
    """Mean of a metric over rows, in [0, 1].

    Args:
        name: a key of `METRICS`.
        predictions: generated texts.
        references: right answers, as many.
        choices: each row's possible answers, for `accuracy`.

    Raises:
        ValueError: unknown name, no rows, or lists of different lengths.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; valid metrics: {', '.join(METRICS)}")
    if not predictions:
        raise ValueError("a metric needs at least one row")
    options = choices if choices is not None else [None] * len(predictions)
    if not len(predictions) == len(references) == len(options):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references and {len(options)} choices: "
            "the numbers must be equal"
        )
    metric = METRICS[name]
    scores = [metric(*row) for row in zip(predictions, references, options, strict=True)]
    return sum(scores) / len(scores)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
