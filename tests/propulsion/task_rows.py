"""A few rows of every task, with the columns that the task has on the hub."""

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def labelled(columns: list[str], labels: list[Any], label: str = "label") -> Rows:
    return [
        {column: f"{column} number {row} is a {('poor', 'fine')[row % 2]} text" for column in columns} | {label: value}
        for row, value in enumerate(labels)
    ]


CONTEXT = "The river Elbe flows through Hamburg, where ships from all over the world arrive."


def question(text: str, answer: str | None) -> dict[str, Any]:
    answers = {"text": [answer] if answer else [], "answer_start": [CONTEXT.index(answer)] if answer else []}
    return {"id": text, "title": "Elbe", "context": CONTEXT, "question": text, "answers": answers}


ANSWERED = [question("Which city?", "Hamburg"), question("What flows?", "The river Elbe"), question("What?", "ships")]


def choices(row: int) -> dict[str, list[str]]:
    return {"text": [f"choice {letter} of {row}" for letter in "abcd"], "label": list("ABCD")}


def tagged(names: list[list[Any]]) -> Rows:
    words = ["Anna", "Smith", "visits", "Rome", "."]
    return [{"tokens": words[: len(tags)], "ner_tags": tags} for tags in names]


PAIR = ["sentence1", "sentence2"]
ROWS: dict[str, Rows] = {
    "demo": labelled(["sentence"], [0, 1, 1, 0]),
    "sst2": labelled(["sentence"], [0, 1, 1, 0]),
    "rte": labelled(PAIR, [0, 1, 1, 0]),
    "cola": labelled(["sentence"], [1, 0, 1, 1]),
    "stsb": labelled(PAIR, [0.0, 2.5, 5.0, 3.8]),
    "mrpc": labelled(PAIR, [1, 0, 1, 1]),
    "qqp": labelled(["question1", "question2"], [0, 1, 0, 1]),
    "mnli": labelled(["premise", "hypothesis"], [0, 1, 2, 1]),
    "qnli": labelled(["question", "sentence"], [0, 1, 0, 1]),
    "snli": labelled(["premise", "hypothesis"], [2, 1, 0, 1]),
    "squad": ANSWERED,
    "squad_v2": [*ANSWERED, question("Who paints?", None)],
    "xsum": [{"document": f"{CONTEXT} {CONTEXT}", "summary": "Ships arrive in Hamburg.", "id": "1"}] * 3,
    "cnn_dailymail": [{"article": f"{CONTEXT} {CONTEXT}", "highlights": "Ships arrive .\nIn Hamburg ."}] * 3,
    "conll2003": tagged([[1, 2, 0, 5, 0], [1, 0], [3]]),
    "ncbi_disease": tagged([[0, 0, 0, 0, 0], [1, 2], [1]]),
    "wikiann": tagged([[1, 2, 0, 5, 0], ["B-PER", "I-PER"], ["B-LOC"]]),
    "boolq": [{"question": "is it wet", "passage": CONTEXT, "answer": value} for value in (True, False, True)],
    "piqa": [{"goal": "open a jar", "sol1": "twist", "sol2": "sing", "label": value} for value in (0, 1, 0)],
    "siqa": [
        {"context": "Anna fell.", "question": "How does she feel?", "answerA": "glad", "answerB": "hurt",
         "answerC": "tall", "label": value}
        for value in "231"
    ],
    "hellaswag": [
        {"ctx": "A man sits down and", "endings": ["eats", "flies", "melts"], "label": value} for value in "021"
    ],
    "winogrande": [
        {"sentence": "The cup fell off the table as _ shook.", "option1": "it", "option2": "cup", "answer": value}
        for value in "121"
    ],
    "arc_easy": [{"question": "Which is hot?", "choices": choices(row), "answerKey": "ABD"[row]} for row in range(3)],
    "arc_challenge": [
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": key} for key in "121"
    ],
    "openbookqa": [{"question_stem": "Ice is", "choices": choices(row), "answerKey": "CBA"[row]} for row in range(3)],
    "multiarith": [{"question": f"What is 3 plus {n}?", "final_ans": str(3 + n)} for n in range(3)],
    "gsm8k": [
        {"question": f"What is 2 times {n}?", "answer": f"It is 2*{n}=<<2*{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
        for n in range(3)
    ],
    "addsub": [{"question": f"What is 9 minus {n}?", "answer": 9.0 - n} for n in range(3)],
    "singleeq": [{"question": f"What is {n} plus 1?", "answer": n + 1} for n in range(3)],
    "svamp": [{"Body": f"Anna has {n} cups.", "Question": "How many cups?", "Answer": float(n)} for n in range(3)],
    "sst2_instruction": labelled(["sentence"], [0, 1, 1]),
}  # fmt: skip


def write_rows(folder: Path, task: str, rows: Rows | None = None) -> Path:
    """Write rows, by default the task's own, as both splits."""
    text = "".join(f"{json.dumps(row)}\n" for row in (ROWS[task] if rows is None else rows))
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(text)
    return folder
