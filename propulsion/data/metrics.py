"""Metrics of predictions, computed by established libraries. Larger values are better for all of them."""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped
from scipy import stats
from sklearn import metrics as sklearn_metrics

from propulsion.errors import UserError

Values = Shaped[np.ndarray, "n"]


def _of_finite(metric: Callable[[Values, Values], float]) -> Callable[[Values, Values], float]:
    """Let a metric raise `UserError` if a prediction or a label is not finite."""

    @functools.wraps(metric)
    def checked(predictions: Values, labels: Values) -> float:
        for what, values in (("predictions", predictions), ("labels", labels)):
            if wrong := np.flatnonzero(~np.isfinite(values)).tolist():
                raise UserError(
                    f"{metric.__name__} needs finite {what}: {len(wrong)} of {len(values)} are not, the first at "
                    f"index {wrong[0]}"
                )
        return metric(predictions, labels)

    return checked


@_of_finite
def accuracy(predictions: Values, labels: Values) -> float:
    """Share of examples whose prediction equals the label."""
    return float(sklearn_metrics.accuracy_score(labels, predictions))


@_of_finite
def f1(predictions: Values, labels: Values) -> float:
    """F1 of label 1; 0 if it is neither predicted nor present."""
    return float(sklearn_metrics.f1_score(labels, predictions, zero_division=0))  # pyright: ignore[reportArgumentType]


@_of_finite
def matthews(predictions: Values, labels: Values) -> float:
    """Matthews correlation; 0 if one class is never predicted."""
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


@_of_finite
def pearson(predictions: Values, labels: Values) -> float:
    """Pearson correlation; not-a-number if either side is constant, where it is undefined."""
    return _correlation(stats.pearsonr, predictions, labels)


@_of_finite
def spearman(predictions: Values, labels: Values) -> float:
    """Spearman rank correlation; not-a-number if either side is constant, where it is undefined."""
    return _correlation(stats.spearmanr, predictions, labels)


def _correlation(function: Callable, predictions: Values, labels: Values) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return float(function(predictions, labels).statistic)


# A metric is one function (predictions, labels) -> float, larger is better.
METRICS: dict[str, Callable[[Values, Values], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)
}


def entity_scores(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, micro-averaged as in CoNLL's evaluation script (by seqeval).

    Args:
        predictions: Tags such as "B-PER", "I-PER", "O", by sentence and word.
        labels: The true tags, of the same lengths.
    """
    from seqeval import metrics as seqeval_metrics

    pair: list[Any] = [list(map(list, labels)), list(map(list, predictions))]
    functions: Any = (seqeval_metrics.f1_score, seqeval_metrics.precision_score, seqeval_metrics.recall_score)
    scores = (float(function(*pair, zero_division=0)) for function in functions)
    return dict(zip(("f1", "precision", "recall"), scores, strict=True))


def rouge_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) with stemming, computed by rouge-score.

    `rougeLsum` matches longest common subsequences sentence by sentence; each line counts as a sentence.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(list(names), use_stemmer=True)
    each = [scorer.score(target, prediction) for target, prediction in zip(labels, predictions, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in each])) for name in names}


def answer_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1 of words (Rajpurkar et al. 2016, 2018); the best of a question's answers counts.

    Texts are compared in lower case, without punctuation, articles and extra spaces. An empty list of answers means
    that the question has no answer; then only the empty prediction is right.

    Returns:
        "exact_match" and "f1", as shares; where some questions have no answer, also each over those that have one
        ("has_answer_...") and over the others ("no_answer_...").
    """
    exact, overlap = [], []
    for prediction, golds in zip(predictions, answers, strict=True):
        # As in the official script, a right answer that consists of articles counts as none.
        texts = [text for text in golds if _normalize(text)] or [""]
        exact.append(max(float(_normalize(prediction) == _normalize(text)) for text in texts))
        overlap.append(max(_word_f1(_normalize(prediction).split(), _normalize(text).split()) for text in texts))
    scores = {"f1": float(np.mean(overlap)), "exact_match": float(np.mean(exact))}
    answered = np.array([bool(golds) for golds in answers])
    if not answered.all() and answered.any():
        for name, chosen in (("has_answer", answered), ("no_answer", ~answered)):
            scores[f"{name}_f1"] = float(np.mean(np.array(overlap)[chosen]))
            scores[f"{name}_exact_match"] = float(np.mean(np.array(exact)[chosen]))
    return scores


def _normalize(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    common = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * common / (len(prediction) + len(gold))
