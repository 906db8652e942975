"""Tasks as instructions to a language model: from a row to what it is told and should say, and back from what it said.

A question with choices is answered by the choice's tag ("answer2"), a sum by its number. An answer is extracted from
generated text as the first tag, or the last number, in it: what the model says around it does not matter.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exchange:
    """One instruction and its answer.

    Attributes:
        prompt: What the model is told; the answer follows at its end.
        answer: What it should say.
        choices: The possible answers; empty if it is a number.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        """Whether generated text holds the answer."""
        found, wanted = extract(text, self.choices), extract(self.answer, self.choices)
        if found is None or wanted is None:
            return False
        return found == wanted if self.choices else math.isclose(float(found), float(wanted), rel_tol=1e-6)


def extract(text: str, choices: Sequence[str] = ()) -> str | None:
    """The first of the choices in a text, in any case, or without choices its last number; None if there is none."""
    if not choices:
        return number(text)
    pattern = "|".join(rf"\b{re.escape(choice)}\b" for choice in sorted(choices, key=len, reverse=True))
    found = re.search(pattern, text, flags=re.IGNORECASE)
    return None if found is None else next(c for c in choices if c.lower() == found.group().lower())


def number(text: str) -> str | None:
    """The last number in a text, without thousands separators; None if there is none.

    >>> number("3 boxes of 1,200 make 3,600.")
    '3600'
    """
    found = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def boolq(row: Mapping[str, Any]) -> Exchange:
    """BoolQ (Clark et al. 2019): passage, question, answer (a boolean)."""
    choices = ("yes", "no")
    asked = f"{row['passage']}\nQuestion: {row['question']}? Reply with yes or no."
    return _exchange(asked, choices[0] if _index(row["answer"], ("True", "False")) == 0 else choices[1], choices)


def piqa(row: Mapping[str, Any]) -> Exchange:
    """PIQA (Bisk et al. 2020): goal, sol1, sol2, label 0 or 1."""
    return _choose(f"How is this done? {row['goal']}", (row["sol1"], row["sol2"]), int(row["label"]))


def siqa(row: Mapping[str, Any]) -> Exchange:
    """Social IQa (Sap et al. 2019): context, question, answerA to answerC, label 1 to 3."""
    options = tuple(row[f"answer{letter}"] for letter in "ABC")
    return _choose(f"{row['context']}\n{row['question']}", options, int(row["label"]) - 1)


def hellaswag(row: Mapping[str, Any]) -> Exchange:
    """HellaSwag (Zellers et al. 2019): ctx, endings, label 0 to 3."""
    return _choose(f"How does this go on? {row['ctx']}", row["endings"], int(row["label"]))


def winogrande(row: Mapping[str, Any]) -> Exchange:
    """WinoGrande (Sakaguchi et al. 2020): sentence with a gap, option1, option2, answer 1 or 2."""
    options = (row["option1"], row["option2"])
    return _choose(f"What belongs in the gap? {row['sentence']}", options, int(row["answer"]) - 1)


def arc(row: Mapping[str, Any]) -> Exchange:
    """ARC (Clark et al. 2018): question, choices (text and label), answerKey, one of the labels."""
    choices = row["choices"]
    return _choose(row["question"], choices["text"], _index(row["answerKey"], choices["label"]))


def openbookqa(row: Mapping[str, Any]) -> Exchange:
    """OpenBookQA (Mihaylov et al. 2018): question_stem, choices, answerKey."""
    return arc({**row, "question": row["question_stem"]})


def arithmetic(row: Mapping[str, Any]) -> Exchange:
    """MultiArith, AddSub, SingleEq: question and its number, in whatever column the answer is."""
    return _sum(row["question"], next(row[name] for name in ("final_ans", "answer") if name in row))


def gsm8k(row: Mapping[str, Any]) -> Exchange:
    """GSM8K (Cobbe et al. 2021): question, answer (its reasoning, then #### and the number).

    The model is trained on the reasoning too, without the calculator's marks.
    """
    reasoning = re.sub(r"<<.*?>>", "", str(row["answer"])).replace("####", "The answer is")
    return _sum(row["question"], " ".join(reasoning.split()))


def svamp(row: Mapping[str, Any]) -> Exchange:
    """SVAMP (Patel et al. 2021): Body, Question, Answer."""
    return _sum(f"{row['Body']} {row['Question']}", row["Answer"])


def sentiment(row: Mapping[str, Any]) -> Exchange:
    """SST-2 (Socher et al. 2013): sentence, label 0 (negative) or 1."""
    names = ("negative", "positive")
    asked = f"Review: {str(row['sentence']).strip()}\nIs the review negative or positive?"
    return _exchange(asked, names[_index(row["label"], ("0", "1"))], names)


def _exchange(asked: str, answer: str, choices: tuple[str, ...] = ()) -> Exchange:
    return Exchange(f"{asked}\nReply:", answer, choices)


def _choose(asked: str, options: Sequence[str], right: int) -> Exchange:
    if not 0 <= right < len(options):
        raise ValueError(f"the right answer is number {right + 1} of {len(options)}")
    tags = tuple(f"answer{place}" for place in range(1, len(options) + 1))
    listed = "\n".join(f"{tag}: {option}" for tag, option in zip(tags, options))
    return _exchange(f"{asked}\n{listed}\nReply with one of {', '.join(tags)}.", tags[right], tags)


def _sum(asked: str, answer: Any) -> Exchange:
    if number(str(answer)) is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    return _exchange(f"{asked} Reply with a number.", str(answer))


def _index(value: Any, names: Sequence[Any]) -> int:
    texts = [str(name) for name in names]
    if str(value) not in texts:
        raise ValueError(f"the answer {value!r} is not one of {', '.join(texts)}")
    return texts.index(str(value))
