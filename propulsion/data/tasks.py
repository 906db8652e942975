"""The table of tasks: kind, columns, labels, metrics, dataset on the hub, and the degree that the paper uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from propulsion.data import instructions
from propulsion.data.instructions import Exchange
from propulsion.data.row_values import as_number
from propulsion.errors import UserError, did_you_mean

KINDS = (
    "classification", "regression", "token_classification", "question_answering", "summarisation", "instruction",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task: the columns of its rows, its labels, its metrics, and where its data is.

    Attributes:
        name: Name on the command line.
        text_columns: Columns of text: one, or two for a pair; for an instruction, all columns that its prompt uses.
        label_names: Names of labels 0, 1, ..., or of tags; empty for tasks without them.
        metrics: Names of the metrics, the main one first.
        degree: Propulsion's degree for this task (Kowsher et al. 2024, Appendix E).
        label_range: Smallest and largest label of a regression; None for any other kind.
        hub_config: Configuration of `hub_path`, if it has several.
        validation_split: Name of the labelled held-out split.
        kind: One of `KINDS`; a regression if there is a label range.
        label_column: Column of the label, the tags, the answers, or the summary.
        hub_path: Name of the dataset on the hub; None if it is not there.
        hub_revision: Revision to read there, if not the main one.
        unanswerable: Whether some questions have no answer.
        exchange: For an instruction, the function that turns a row into its prompt and answer.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    degree: float
    label_range: tuple[float, float] | None = None
    hub_config: str | None = None
    validation_split: str = "validation"
    kind: str = "classification"
    label_column: str = "label"
    hub_path: str | None = None
    hub_revision: str | None = None
    unanswerable: bool = False
    exchange: Callable[[Mapping[str, Any]], Exchange] | None = None

    def __post_init__(self) -> None:
        self._check_names()

    def _check_names(self) -> None:
        for number, name in enumerate(self.label_names):
            if as_number(name) not in (None, number):
                raise ValueError(
                    f"label {number} of task {self.name} has the name {name!r}, which reads as another label"
                )

    @property
    def is_regression(self) -> bool:
        """Whether labels are real numbers."""
        return self.label_range is not None

    @property
    def num_labels(self) -> int:
        """Number of model outputs: the classes or tags, or 1 for a regression."""
        return len(self.label_names) or 1


@dataclass(frozen=True)
class OwnTask(Task):
    """A task made from the columns of a user's rows (`propulsion.data.own`).

    A label is read by its name alone, so that names may be numbers, such as the stars 1 to 5.
    """

    def _check_names(self) -> None:
        """Any names can be told apart, since numbers do not stand for labels."""


# `datasets` no longer runs scripts; of a dataset that is a script, the hub has this revision with Parquet files.
_PARQUET = "refs/convert/parquet"
_SENTIMENT = ("negative", "positive")
_ENTAILMENT = ("entailment", "not_entailment")
_DUPLICATE = ("not_equivalent", "equivalent")
_INFERENCE = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")


def _glue(name: str, columns: tuple[str, ...], labels: tuple[str, ...], metrics: tuple[str, ...], degree: float,
          **more: Any) -> Task:  # fmt: skip
    return Task(name, columns, labels, metrics, degree, hub_path="nyu-mll/glue", hub_config=name, **more)


def _tags(*entities: str) -> tuple[str, ...]:
    return ("O", *(f"{prefix}-{entity}" for entity in entities for prefix in "BI"))


def _entities(name: str, hub_path: str, tags: tuple[str, ...], hub_config: str | None = None,
              hub_revision: str | None = None) -> Task:  # fmt: skip
    # The paper gives no degree for these tasks; this is its degree for language models.
    return Task(name, ("tokens",), tags, ("f1", "precision", "recall"), 15, kind="token_classification",
                label_column="ner_tags", hub_path=hub_path, hub_config=hub_config,
                hub_revision=hub_revision)  # fmt: skip


def _squad(name: str, hub_path: str, **more: Any) -> Task:
    return Task(name, ("question", "context"), (), ("f1", "exact_match"), 35, kind="question_answering",
                label_column="answers", hub_path=hub_path, **more)  # fmt: skip


def _summaries(name: str, hub_path: str, document: str, summary: str, degree: float, **more: Any) -> Task:
    return Task(name, (document,), (), ("rougeL", "rouge1", "rouge2", "rougeLsum"), degree, kind="summarisation",
                label_column=summary, hub_path=hub_path, **more)  # fmt: skip


def _instruction(name: str, exchange: Callable[[Mapping[str, Any]], Exchange], columns: tuple[str, ...], label: str,
                 hub_path: str | None, **more: Any) -> Task:  # fmt: skip
    return Task(name, columns, (), ("accuracy",), 15, kind="instruction", label_column=label, hub_path=hub_path,
                exchange=exchange, **more)  # fmt: skip


_TASKS = (
    Task("demo", ("sentence",), _SENTIMENT, ("accuracy",), 15),
    # GLUE (Wang et al. 2018).
    _glue("sst2", ("sentence",), _SENTIMENT, ("accuracy",), 15),
    _glue("rte", _PAIR, _ENTAILMENT, ("accuracy",), 15),
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), 20),
    _glue("stsb", _PAIR, (), ("pearson", "spearman"), 20, label_range=(0.0, 5.0), kind="regression"),
    _glue("mrpc", _PAIR, _DUPLICATE, ("accuracy", "f1"), 55),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), 15),
    _glue("mnli", ("premise", "hypothesis"), _INFERENCE, ("accuracy",), 20, validation_split="validation_matched"),
    _glue("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), 55),
    Task("snli", ("premise", "hypothesis"), _INFERENCE, ("accuracy",), 15, hub_path="stanfordnlp/snli"),
    # Questions whose answer is a span of the text.
    _squad("squad", "rajpurkar/squad"),
    _squad("squad_v2", "rajpurkar/squad_v2", unanswerable=True),
    # Summaries.
    _summaries("xsum", "EdinburghNLP/xsum", "document", "summary", 35, hub_revision=_PARQUET),
    _summaries("cnn_dailymail", "abisee/cnn_dailymail", "article", "highlights", 25, hub_config="3.0.0"),
    # Named entities.
    _entities("conll2003", "eriktks/conll2003", _tags("PER", "ORG", "LOC", "MISC"), hub_revision=_PARQUET),
    _entities("ncbi_disease", "ncbi/ncbi_disease", _tags("Disease"), hub_revision=_PARQUET),
    _entities("wikiann", "unimelb-nlp/wikiann", _tags("PER", "ORG", "LOC"), "en"),
    # Commonsense, by instruction.
    _instruction("boolq", instructions.boolq, ("passage", "question"), "answer", "google/boolq"),
    _instruction(
        "piqa", instructions.piqa, ("goal", "sol1", "sol2"), "label", "ybisk/piqa", hub_revision=_PARQUET
    ),
    _instruction(
        "siqa", instructions.siqa, ("context", "question", "answerA", "answerB", "answerC"), "label",
        "allenai/social_i_qa", hub_revision=_PARQUET,
    ),
    _instruction("hellaswag", instructions.hellaswag, ("ctx", "endings"), "label", "Rowan/hellaswag"),
    _instruction(
        "winogrande", instructions.winogrande, ("sentence", "option1", "option2"), "answer", "allenai/winogrande",
        hub_config="winogrande_xl",
    ),
    _instruction(
        "arc_easy", instructions.arc, ("question", "choices"), "answerKey", "allenai/ai2_arc", hub_config="ARC-Easy",
        validation_split="test",
    ),
    _instruction(
        "arc_challenge", instructions.arc, ("question", "choices"), "answerKey", "allenai/ai2_arc",
        hub_config="ARC-Challenge", validation_split="test",
    ),
    _instruction(
        "openbookqa", instructions.openbookqa, ("question_stem", "choices"), "answerKey", "allenai/openbookqa",
        hub_config="main", validation_split="test",
    ),
    # Arithmetic, by instruction.
    _instruction(
        "multiarith", instructions.arithmetic, ("question",), "final_ans", "ChilleD/MultiArith", validation_split="test"
    ),
    _instruction(
        "gsm8k", instructions.gsm8k, ("question",), "answer", "openai/gsm8k", hub_config="main", validation_split="test"
    ),
    _instruction("addsub", instructions.arithmetic, ("question",), "answer", None),
    _instruction("singleeq", instructions.arithmetic, ("question",), "answer", None),
    _instruction("svamp", instructions.svamp, ("Body", "Question"), "Answer", "ChilleD/SVAMP", validation_split="test"),
    # A classification as an instruction, for language models.
    _instruction("sst2_instruction", instructions.sentiment, ("sentence",), "label", "nyu-mll/glue", hub_config="sst2"),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
OWN_TASKS: dict[str, OwnTask] = {}
"""The tasks made from users' rows in this process, by name; a later one of the same name replaces an earlier one."""


def get_labelled_task(name: str) -> Task:
    """Return a task by name, which must be a classification or a regression of whole texts.

    Raises:
        UserError: If there is no such task, or it is of another kind.
    """
    task = get_task(name)
    if task.kind not in ("classification", "regression"):
        one_label = ", ".join(t.name for t in _TASKS if t.kind in ("classification", "regression"))
        raise UserError(f"task {name} is of the kind {task.kind}; this takes tasks of one label: {one_label}")
    return task


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        UserError: If there is no such task; the message lists all tasks.
    """
    known = OWN_TASKS | TASKS
    if name not in known:
        raise UserError(
            f"unknown task {name!r}{did_you_mean(name, known)}: the tasks are {', '.join(known)}; "
            "propulsion.train and most analyses take rows of your own by --text-columns and --label-column"
        )
    return known[name]
