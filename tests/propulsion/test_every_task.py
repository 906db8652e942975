"""Every task of the table, trained and evaluated on a tiny random model, from a few rows of its own format."""

import pytest
import torch
from task_rows import ROWS, write_rows
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from propulsion.data import load_task_data
from propulsion.errors import UserError
from propulsion.pretrained import load_model
from propulsion.task_kinds import Limits, kind_of
from propulsion.task_kinds.base import columns_of
from propulsion.tasks import TASKS, get_task
from propulsion.train import TrainConfig, run


def test_there_are_rows_of_every_task():
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_and_evaluated(task, tiny_models, tmp_path):
    kind = kind_of(get_task(task))
    config = TrainConfig(
        task=task, data_dir=write_rows(tmp_path, task), model=str(tiny_models[kind.task_type]), degree=3, max_steps=2,
        per_device_train_batch_size=2, output_dir=tmp_path / "run", use_cpu=True, max_target_length=6, save_steps=100,
        disable_tqdm=True,
    )  # fmt: skip
    result = run(config)
    assert result.steps == 2
    assert result.trained_parameters > 0
    assert set(get_task(task).metrics) <= result.metrics.keys()
    assert all(0 <= value <= 1 or task in ("cola", "stsb") for value in result.metrics.values())
    losses = [entry["train_loss"] for entry in result.history if "train_loss" in entry]
    assert len(losses) == 1
    assert losses[0] > 0


# What is right is scored as right: the predictions are the labels themselves.
RIGHT = {
    "sst2": [0, 1, 1, 0],
    "squad": ["hamburg!", "river Elbe", "the ships"],
    "squad_v2": ["Hamburg", "The river Elbe", "ships", ""],
    "xsum": ["Ships arrive in Hamburg."] * 3,
    "conll2003": [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-PER", "O"], ["B-ORG"]],
    "boolq": ["Yes.", "no", "I say yes, not no"],
    "siqa": ["answer2", "It is Answer3", " answer1 or answer2"],
    "gsm8k": ["0", "I count 1 and 1, so 2", "$4.00"],
    "svamp": ["0", "1.0", "2"],
    "arc_challenge": ["answer1", "answer2", "answer1"],
}


@pytest.mark.parametrize("task", RIGHT)
def test_the_right_predictions_score_one(task, tmp_path):
    data = load_task_data(task, data_dir=write_rows(tmp_path, task))
    found = kind_of(data.task).measure(data.task, RIGHT[task], columns_of(data.validation))
    assert found[data.task.metrics[0]] == pytest.approx(1)


def test_one_wrong_answer_of_three_scores_two_thirds(tmp_path):
    data = load_task_data("siqa", data_dir=write_rows(tmp_path, "siqa"))
    found = kind_of(data.task).measure(data.task, ["answer2", "none of them", "answer1"], columns_of(data.validation))
    assert found == {"accuracy": pytest.approx(2 / 3), "answered": pytest.approx(2 / 3)}


@pytest.fixture(scope="module")
def tagger(tiny_models):
    return load_model(tiny_models["TOKEN_CLS"], task_type="TOKEN_CLS", num_labels=9)


def test_a_tag_stands_at_its_words_first_token(tagger, tmp_path):
    rows = [{"tokens": ["Unbelievableness", "rules"], "ner_tags": [1, 0]}]
    data = load_task_data("conll2003", data_dir=write_rows(tmp_path, "conll2003", rows))
    kind = kind_of(data.task)
    encoded = kind.encode(columns_of(data.train), tagger[1], data.task, Limits())
    words = tagger[1](rows[0]["tokens"], is_split_into_words=True).word_ids()
    assert encoded["labels"] == [[-100 if w is None or words[i - 1] == w else [1, 0][w] for i, w in enumerate(words)]]
    assert encoded["labels"][0].count(-100) == len(words) - 2 > 2
    assert [len(tags) for tags in kind.predict(*tagger, data.task, columns_of(data.train), Limits())] == [2]


def test_words_that_were_cut_off_are_outside(tagger, tmp_path):
    rows = [{"tokens": ["word"] * 30, "ner_tags": [1] * 30}]
    data = load_task_data("conll2003", data_dir=write_rows(tmp_path, "conll2003", rows))
    (tags,) = kind_of(data.task).predict(*tagger, data.task, columns_of(data.train), Limits(max_length=12))
    assert len(tags) == 30
    assert set(tags[10:]) == {"O"}


def test_spans_are_the_answers_characters(tiny_models, tmp_path):
    _, tokenizer = load_model(tiny_models["QUESTION_ANS"], task_type="QUESTION_ANS")
    data = load_task_data("squad_v2", data_dir=write_rows(tmp_path, "squad_v2"))
    encoded = kind_of(data.task).encode(columns_of(data.train), tokenizer, data.task, Limits(max_length=16))
    assert len(encoded["input_ids"]) > len(data.train)  # Some contexts take two windows.
    spans = set()
    for ids, start, end in zip(encoded["input_ids"], encoded["start_positions"], encoded["end_positions"]):
        spans.add(tokenizer.decode(ids[start : end + 1]) if end else "")
    assert spans == {"", "hamburg", "the river elbe", "ships"}


def test_the_best_span_of_all_windows_is_the_answer(tiny_models, tmp_path):
    """A model that knows the answer: its logits are the labels."""
    model, tokenizer = load_model(tiny_models["QUESTION_ANS"], task_type="QUESTION_ANS")
    data = load_task_data("squad_v2", data_dir=write_rows(tmp_path, "squad_v2"))
    kind, rows, limits = kind_of(data.task), columns_of(data.train), Limits(max_length=16, batch_size=100)
    encoded = kind.encode(rows, tokenizer, data.task, limits)

    def forward(input_ids, **kwargs):
        outputs = {}
        for name in ("start", "end"):
            outputs[f"{name}_logits"] = torch.zeros(input_ids.shape)
            for row, place in enumerate(encoded[f"{name}_positions"]):
                outputs[f"{name}_logits"][row, place] = 9.0
        return type("Output", (), outputs)

    model.forward = forward
    assert kind.predict(model, tokenizer, data.task, rows, limits) == ["Hamburg", "The river Elbe", "ships", ""]


def test_no_answer_is_none_of_squad_1(tiny_models, tmp_path):
    """Where every question has an answer, the best span counts, however low."""
    model, tokenizer = load_model(tiny_models["QUESTION_ANS"], task_type="QUESTION_ANS")
    with torch.no_grad():
        model.qa_outputs.weight.zero_()  # Nothing scores higher than anything else.
    for task, empty in (("squad", False), ("squad_v2", True)):
        data = load_task_data(task, data_dir=write_rows(tmp_path, task, ROWS["squad"]))
        found = kind_of(data.task).predict(model, tokenizer, data.task, columns_of(data.train), Limits())
        assert [text == "" for text in found] == [empty] * 3


def test_only_the_answer_is_learnt(tiny_models, tmp_path):
    _, tokenizer = load_model(tiny_models["CAUSAL_LM"], task_type="CAUSAL_LM")
    data = load_task_data("piqa", data_dir=write_rows(tmp_path, "piqa"))
    encoded = kind_of(data.task).encode(columns_of(data.train), tokenizer, data.task, Limits())
    learnt = [[t for t in labels if t != -100] for labels in encoded["labels"]]
    texts = tokenizer.batch_decode(learnt, skip_special_tokens=True)
    assert [text.replace(" ", "") for text in texts] == ["answer1", "answer2", "answer1"]
    assert all(ids[-len(target) :] == target for ids, target in zip(encoded["input_ids"], learnt))


def test_generation_does_not_depend_on_the_batch(tiny_models, tmp_path):
    model, tokenizer = load_model(tiny_models["CAUSAL_LM"], task_type="CAUSAL_LM")
    rows = [*ROWS["boolq"], {"question": "so", "passage": "Short.", "answer": True}]
    data = load_task_data("boolq", data_dir=write_rows(tmp_path, "boolq", rows))
    kind, columns = kind_of(data.task), columns_of(data.train)
    each = [
        kind.predict(model.double(), tokenizer, data.task, columns, Limits(max_target_length=4, batch_size=n))
        for n in (1, 4)
    ]
    assert each[0] == each[1]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("squad", {"answers": {"text": ["Hamburg"], "answer_start": [3]}}, "row 1: the context does not hold"),
        ("squad", {"answers": {"text": [], "answer_start": []}}, "row 1 has no answer: that is what the task squad_v2"),
        ("squad", {"answers": "Hamburg"}, "row 1: answers is 'Hamburg'"),
        ("conll2003", {"ner_tags": [0]}, "row 1: expected 5 ner_tags, one a word"),
        ("conll2003", {"ner_tags": [9, 0, 0, 0, 0]}, "row 1: tag 9 is not one of O, B-PER"),
        ("conll2003", {"tokens": "Anna"}, "row 1: tokens is 'Anna', expected a list of words"),
        ("xsum", {"summary": None}, "row 1: summary is None, expected text"),
        ("siqa", {"label": "4"}, "row 1 is no row of task siqa: the right answer is number 4 of 3"),
        ("arc_easy", {"answerKey": "E"}, "row 1 is no row of task arc_easy: the answer 'E' is not one of A, B, C, D"),
        ("svamp", {"Answer": "many"}, "row 1 is no row of task svamp: the answer 'many' holds no number"),
    ],
)
def test_unusable_rows_are_named(tmp_path, task, change, message):
    rows = [ROWS[task][0] | change, *ROWS[task][1:]]
    with pytest.raises(UserError, match=message) as caught:
        load_task_data(task, data_dir=write_rows(tmp_path, task, rows))
    assert "\n" not in str(caught.value)


def test_a_task_without_a_home_asks_for_files():
    with pytest.raises(UserError, match=r"addsub has no home on the Hugging Face hub: give --data-dir"):
        load_task_data("addsub")


def test_an_encoder_cannot_summarise(tiny_models, tmp_path):
    config = TrainConfig(task="xsum", data_dir=write_rows(tmp_path, "xsum"), model=str(tiny_models["SEQ_CLS"]),
                         output_dir=tmp_path / "run")  # fmt: skip
    with pytest.raises(UserError, match="'bert', for which transformers has no encoder-decoder"):
        run(config)


@pytest.mark.parametrize(
    "limits", [Limits(max_target_length=5), Limits(max_target_length=9, generate_length=4, num_beams=3)]
)
def test_summaries_are_those_of_the_model(tiny_models, tmp_path, limits):
    """Generation through our batches gives what the model gives for one document alone."""
    folder = tiny_models["SEQ_2_SEQ_LM"]
    model, tokenizer = load_model(folder, task_type="SEQ_2_SEQ_LM")
    data = load_task_data("xsum", data_dir=write_rows(tmp_path, "xsum"))
    found = kind_of(data.task).predict(model, tokenizer, data.task, columns_of(data.train), limits)
    plain, text = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), data.train["document"][0]
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    lengths = {"max_new_tokens": 5 if limits.num_beams == 1 else 4}
    ids = plain.generate(tokens, **lengths, do_sample=False, num_beams=limits.num_beams)
    assert found == [tokenizer.decode(ids[0], skip_special_tokens=True).strip()] * 3
