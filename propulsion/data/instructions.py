"""Tasks as instructions to a language model: prompts made from rows, and answers extracted from generated text.

The answer to a question with choices is the tag of a choice ("answer2"); that to an arithmetic problem is a number. In
generated text, the first tag or the last number counts as the answer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from propulsion.data.row_values import label_number, parallel_lists, shown, text, texts, whole_number
from propulsion.errors import UserError


@dataclass(frozen=True)
class Exchange:
    """One instruction and its answer.

    Attributes:
        prompt: The text that the model continues.
        answer: The right continuation.
        choices: The possible answers; empty if the answer is a number.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        """Whether generated text holds the answer."""
        extracted, wanted = extract(text, self.choices), extract(self.answer, self.choices)
        if extracted is None or wanted is None:
            return False
        return extracted == wanted if self.choices else math.isclose(float(extracted), float(wanted), rel_tol=1e-6)


def extract(text: str, choices: Sequence[str] = ()) -> str | None:
    """The first choice in a text, in upper or lower case, or without choices the last number; None if there is none."""
    if not choices:
        return number(text)
    pattern = "|".join(rf"\b{re.escape(choice)}\b" for choice in sorted(choices, key=len, reverse=True))
    match = re.search(pattern, text, flags=re.IGNORECASE)
    return None if match is None else next(c for c in choices if c.lower() == match.group().lower())


def number(text: str) -> str | None:
    """The last number in a text, without thousands separators; None if there is none.

    >>> number("3 boxes of 1,200 make 3,600.")
    '3600'
    """
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return numbers[-1].replace(",", "").rstrip(".") if numbers else None


def boolq(row: Mapping[str, Any]) -> Exchange:
    """BoolQ (Clark et al. 2019): passage, question, answer (a boolean)."""
    asked = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}? Reply with yes or no."
    choices = ("no", "yes")
    return _exchange(asked, choices[label_number(row["answer"], choices, "answer")], choices[::-1])


def piqa(row: Mapping[str, Any]) -> Exchange:
    """PIQA (Bisk et al. 2020): goal, sol1, sol2, label 0 or 1."""
    options = (_option(row, "sol1"), _option(row, "sol2"))
    return _choose(f"How is this done? {_text(row, 'goal')}", options, whole_number(row["label"], "label"))


def siqa(row: Mapping[str, Any]) -> Exchange:
    """Social IQa (Sap et al. 2019): context, question, answerA to answerC, label 1 to 3."""
    options = tuple(_option(row, f"answer{letter}") for letter in "ABC")
    asked = f"{_text(row, 'context')}\n{_text(row, 'question')}"
    return _choose(asked, options, whole_number(row["label"], "label") - 1)


def hellaswag(row: Mapping[str, Any]) -> Exchange:
    """HellaSwag (Zellers et al. 2019): ctx, endings, label 0 to 3."""
    options = texts(row["endings"], "endings", "texts")
    return _choose(f"How does this go on? {_text(row, 'ctx')}", options, whole_number(row["label"], "label"))


def winogrande(row: Mapping[str, Any]) -> Exchange:
    """WinoGrande (Sakaguchi et al. 2020): sentence with a gap, option1, option2, answer 1 or 2."""
    options = (_option(row, "option1"), _option(row, "option2"))
    asked = f"What belongs in the gap? {_text(row, 'sentence')}"
    return _choose(asked, options, whole_number(row["answer"], "answer") - 1)


def arc(row: Mapping[str, Any]) -> Exchange:
    """ARC (Clark et al. 2018): question, choices (text and label), answerKey, one of the labels."""
    return _answer_key(row, "question")


def openbookqa(row: Mapping[str, Any]) -> Exchange:
    """OpenBookQA (Mihaylov et al. 2018): question_stem, choices, answerKey."""
    return _answer_key(row, "question_stem")


def arithmetic(row: Mapping[str, Any]) -> Exchange:
    """MultiArith, AddSub, SingleEq: question, and the number in the column final_ans or answer."""
    return _sum(_text(row, "question"), next(row[name] for name in ("final_ans", "answer") if name in row))


def gsm8k(row: Mapping[str, Any]) -> Exchange:
    """GSM8K (Cobbe et al. 2021): question, answer (its reasoning, then #### and the number).

    The model is trained on the reasoning too, without its calculator annotations.
    """
    answer = row["answer"]
    if isinstance(answer, str):
        answer = " ".join(re.sub(r"<<.*?>>", "", answer).replace("####", "The answer is").split())
    return _sum(_text(row, "question"), answer)


def svamp(row: Mapping[str, Any]) -> Exchange:
    """SVAMP (Patel et al. 2021): Body, Question, Answer."""
    return _sum(f"{_text(row, 'Body')} {_text(row, 'Question')}", row["Answer"])


def sentiment(row: Mapping[str, Any]) -> Exchange:
    """SST-2 (Socher et al. 2013): sentence, label 0 (negative) or 1."""
    names = ("negative", "positive")
    asked = f"Review: {_text(row, 'sentence').strip()}\nIs the review negative or positive?"
    return _exchange(asked, names[label_number(row["label"], names)], names)


def _exchange(asked: str, answer: str, choices: tuple[str, ...] = ()) -> Exchange:
    return Exchange(f"{asked}\nReply:", answer, choices)


def _choose(asked: str, options: Sequence[str], right: int) -> Exchange:
    if not 0 <= right < len(options):
        raise UserError(f"the right answer is number {right + 1} of {len(options)}")
    tags = tuple(f"answer{number}" for number in range(1, len(options) + 1))
    listed = "\n".join(f"{tag}: {option}" for tag, option in zip(tags, options))
    return _exchange(f"{asked}\n{listed}\nReply with one of {', '.join(tags)}.", tags[right], tags)


def _answer_key(row: Mapping[str, Any], question: str) -> Exchange:
    choices = parallel_lists(row["choices"], ("text", "label"), "choices")
    options, keys = texts(choices["text"], "text of choices", "texts"), [str(key) for key in choices["label"]]
    given = str(row["answerKey"]).strip()
    if given not in keys:
        raise UserError(f"the answer {shown(row['answerKey'])} is not one of {', '.join(keys)}")
    return _choose(_text(row, question), options, keys.index(given))


def _sum(asked: str, answer: Any) -> Exchange:
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or number(str(answer)) is None:
        raise UserError(f"the answer {shown(answer)} holds no number")
    return _exchange(f"{asked} Reply with a number.", str(answer))


def _text(row: Mapping[str, Any], column: str) -> str:
    return text(row[column], column)


def _option(row: Mapping[str, Any], column: str) -> str:
    return text(row[column], column, blank=True)
