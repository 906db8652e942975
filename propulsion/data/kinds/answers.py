"""Question answering: the answer is a span of the context, or there is no answer (SQuAD 1.1 and 2.0).

A context that is longer than the input is split into overlapping windows. The predicted answer is the best span of all
windows of a question, or no answer if the first token, which stands for "no answer", has a higher score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from propulsion.data.kinds.base import Kind, Limits, input_limit, run_batches
from propulsion.data.metrics import answer_scores
from propulsion.data.row_values import parallel_lists, shown, text, value_of, whole_number
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import Unusable, UserError

DEFAULT_LENGTH = 384  # Tokens of a window, as in BERT's SQuAD script.
STRIDE_SHARE = 3  # Neighbouring windows share a third of their length.
BEST = 20  # How many of the best starts and of the best ends are combined.
LONGEST_ANSWER = 30  # Tokens.
_ANSWER = ("text", "answer_start")


def _features(task: Task) -> datasets.Features:
    texts, starts = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int32"))
    return datasets.Features({
        **{column: datasets.Value("string") for column in task.text_columns},
        task.label_column: {"text": texts, "answer_start": starts},
    })  # fmt: skip


def read(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """Read question, context and answers, and check that every answer is in the context at its stated position."""
    values = {column: text(value_of(row, column), column) for column in task.text_columns}
    column, context = task.label_column, values["context"]
    answers = parallel_lists(value_of(row, column), _ANSWER, column)
    if not answers["text"] and not task.unanswerable:
        raise UserError("there is no answer: that is what the task squad_v2 is for")
    starts = []
    for answer, start in zip(*answers.values()):
        text(answer, f"text of {column}")
        starts.append(whole_number(start, f"answer_start of {column}"))
        if starts[-1] < 0 or not context.startswith(answer, starts[-1]):
            position = context.find(answer)
            where = "it is nowhere in it" if position < 0 else f"it stands at {position}"
            raise UserError(f"the context does not hold the answer {shown(answer)} at character {starts[-1]}: {where}")
    return values | {column: {"text": answers["text"], "answer_start": starts}}


def inputs(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> tuple[Any, list[int]]:
    """The encoded windows of all questions, and for each window the index of its question.

    Raises:
        Unusable: A question leaves no room for its context.
        UserError: The tokenizer is not a fast one, or `max_length` is out of range.
    """
    if not tokenizer.is_fast:
        raise UserError("answers need a fast tokenizer, which says where in the text a token stands")
    limit = min(input_limit(tokenizer, limits, pair=True), limits.max_length or DEFAULT_LENGTH)
    lengths = [len(ids) for ids in tokenizer(list(columns["question"]), verbose=False)["input_ids"]]
    most = limit - tokenizer.num_special_tokens_to_add(pair=True) - 2
    if long := [question for question, length in enumerate(lengths) if length > most]:
        what = f"a question of {max(lengths)} tokens leaves no room for its context in {limit}"
        longest = limits.longest(tokenizer)
        more = f"raise max_length to {longest} at most, or " if limit < longest else ""
        raise Unusable(what, long, f"{more}shorten the question")
    room = most + 2 - max(lengths, default=0)
    batch = tokenizer(
        [question.strip() for question in columns["question"]], list(columns["context"]), truncation="only_second",
        max_length=limit, stride=room // STRIDE_SHARE, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    return batch, batch.pop("overflow_to_sample_mapping")


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """One row for each window, labelled by the first answer's first and last token; token 0 if it is not in it."""
    batch, questions = inputs(columns, tokenizer, task, limits)
    offsets = batch.pop("offset_mapping")
    encoded = dict(batch)
    if task.label_column not in columns:
        return encoded
    spans = [
        _span(columns[task.label_column][question], spans, batch.sequence_ids(window))
        for window, (question, spans) in enumerate(zip(questions, offsets))
    ]
    return encoded | {"start_positions": [start for start, _ in spans], "end_positions": [end for _, end in spans]}


def _span(
    answers: dict[str, list], spans: Sequence[tuple[int, int]], sequence_ids: Sequence[int | None]
) -> tuple[int, int]:
    if not answers["text"]:
        return 0, 0
    start, end = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
    context = [token for token, sequence in enumerate(sequence_ids) if sequence == 1]
    if not context or spans[context[0]][0] > start or spans[context[-1]][1] < end:
        return 0, 0
    first = max(token for token in context if spans[token][0] <= start)
    last = min(token for token in context if spans[token][1] >= end)
    return first, max(first, last)


def predict(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits) -> list[str]:
    """The answer to every question; empty where the model predicts that there is none."""
    batch, questions = inputs(columns, tokenizer, task, limits)
    offsets = batch.pop("offset_mapping")
    outputs = run_batches(
        model, tokenizer, dict(batch), limits.batch_size, ("start_logits", "end_logits"), by_token=True
    )
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    for window, (question, spans) in enumerate(zip(questions, offsets)):
        sequence_ids = batch.sequence_ids(window)
        starts, ends = (output.numpy() for output in outputs[window])
        shift = len(starts) - len(sequence_ids) if tokenizer.padding_side == "left" else 0
        starts, ends = starts[shift : shift + len(sequence_ids)], ends[shift : shift + len(sequence_ids)]
        null[question] = min(null.get(question, np.inf), float(starts[0] + ends[0]))
        inside = np.array([sequence == 1 for sequence in sequence_ids])
        score, first, last = _best_span(starts, ends, inside)
        if score > best.get(question, (-np.inf, ""))[0]:
            best[question] = (score, columns["context"][question][spans[first][0] : spans[last][1]])
    predictions = []
    for question in range(len(columns["question"])):
        score, text = best.get(question, (-np.inf, ""))
        predictions.append(text if not task.unanswerable or score > null.get(question, -np.inf) else "")
    return predictions


def _best_span(starts: np.ndarray, ends: np.ndarray, inside: np.ndarray) -> tuple[float, int, int]:
    """Score, first and last token of the best span within the context."""
    best = (-np.inf, 0, 0)
    firsts, lasts = (np.argsort(np.where(inside, scores, -np.inf))[::-1][:BEST] for scores in (starts, ends))
    for first in firsts:
        for last in lasts:
            if inside[first] and inside[last] and first <= last < first + LONGEST_ANSWER:
                score = float(starts[first] + ends[last])
                best = max(best, (score, int(first), int(last)))
    return best


def measure(task: Task, predictions: Sequence[str], columns: Columns) -> dict[str, float]:
    """Exact match and F1; the best of each question's answers counts."""
    return answer_scores(predictions, [answers["text"] for answers in columns[task.label_column]])


KIND = Kind("QUESTION_ANS", _features, read, encode, inputs, predict, measure)
