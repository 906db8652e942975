"""Every task in the table is trained and evaluated on a tiny random model, from a few rows in the task's format."""

import dataclasses
import json

import pytest
import torch
from task_rows import CONTEXT, ROWS, write_rows
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from propulsion.data import load_task_data
from propulsion.data.instructions import Exchange
from propulsion.data.kinds import Limits, kind_of
from propulsion.data.kinds.base import columns_of
from propulsion.data.tasks import TASKS, get_task
from propulsion.errors import UserError
from propulsion.pretrained import load_model
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


# Predictions that equal the labels have the best score.
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
    assert len(encoded["input_ids"]) > len(data.train)  # Some contexts need two windows.
    spans = set()
    for ids, start, end in zip(encoded["input_ids"], encoded["start_positions"], encoded["end_positions"]):
        spans.add(tokenizer.decode(ids[start : end + 1]) if end else "")
    assert spans == {"", "hamburg", "the river elbe", "ships"}


def test_the_best_span_of_all_windows_is_the_answer(tiny_models, tmp_path):
    """The logits of this model are the labels."""
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
    """If every question has an answer, the best span is predicted, however low its score."""
    model, tokenizer = load_model(tiny_models["QUESTION_ANS"], task_type="QUESTION_ANS")
    with torch.no_grad():
        model.qa_outputs.weight.zero_()  # All spans have the same score.
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
        (
            "squad",
            {"answers": {"text": [], "answer_start": []}},
            "row 1: there is no answer: that is what the task squad_v2",
        ),
        ("squad", {"answers": "Hamburg"}, "row 1: answers is 'Hamburg'"),
        ("conll2003", {"ner_tags": [0]}, "row 1: expected 5 ner_tags, one a word"),
        ("conll2003", {"ner_tags": [9, 0, 0, 0, 0]}, r"row 1: tag 9 is not one of 0 \(O\), 1 \(B-PER\)"),
        ("conll2003", {"tokens": "Anna"}, "row 1: tokens is 'Anna', expected a list of words"),
        ("xsum", {"summary": None}, "row 1: summary is None, expected text"),
        ("siqa", {"label": "4"}, "row 1: the right answer is number 4 of 3"),
        ("arc_easy", {"answerKey": "E"}, "row 1: the answer 'E' is not one of A, B, C, D"),
        ("svamp", {"Answer": "many"}, "row 1: the answer 'many' holds no number"),
    ],
)
def test_unusable_rows_are_named(tmp_path, task, change, message):
    rows = [ROWS[task][0] | change, *ROWS[task][1:]]
    with pytest.raises(UserError, match=message) as caught:
        load_task_data(task, data_dir=write_rows(tmp_path, task, rows))
    assert "\n" not in str(caught.value)


HAMBURG = CONTEXT.index("Hamburg")


@pytest.mark.parametrize(
    ("task", "change", "read"),
    [
        ("squad", {"text": "Hamburg", "answer_start": HAMBURG}, {"text": ["Hamburg"], "answer_start": [HAMBURG]}),
        ("squad", {"text": ["Hamburg"], "answer_start": HAMBURG}, {"text": ["Hamburg"], "answer_start": [HAMBURG]}),
        (
            "squad",
            {"text": "Hamburg", "answer_start": [f"{HAMBURG}"]},
            {"text": ["Hamburg"], "answer_start": [HAMBURG]},
        ),
        ("squad", [{"text": "Elbe", "answer_start": 10.0}] * 2, {"text": ["Elbe"] * 2, "answer_start": [10] * 2}),
        ("squad_v2", [], {"text": [], "answer_start": []}),
    ],
)
def test_answers_however_they_are_written(tmp_path, task, change, read):
    rows = [ROWS[task][0] | {"answers": change}, *ROWS[task][1:]]
    assert load_task_data(task, data_dir=write_rows(tmp_path, task, rows)).train["answers"][0] == read


def answers(text, starts):
    return {"answers": {"text": text, "answer_start": starts}}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("squad", answers(["Hamburg", "Elbe"], [29]), r"answers differ in length \(2 in text, 1 in answer_start\)"),
        ("squad", answers(["Hamburg"], []), r"answers differ in length \(1 in text, 0 in answer_start\)"),
        ("squad", answers(["Hamburg"], None), "answer_start of answers is None, expected a whole number"),
        ("squad", answers(["Hamburg"], ["here"]), "answer_start of answers is 'here', expected a whole number"),
        ("squad", answers(["Hamburg"], [True]), "answer_start of answers is True, expected a whole number"),
        ("squad", answers(["Hamburg"], [HAMBURG + 0.5]), "expected a whole number"),
        ("squad", answers(["Hamburg"], [HAMBURG - len(CONTEXT)]), "at character -52: it stands at 29"),
        ("squad", answers(["Hamburg"], [10**30]), "it stands at 29"),
        ("squad", answers(["Berlin"], [HAMBURG]), "the answer 'Berlin' at character 29: it is nowhere in it"),
        ("squad", answers([None], [HAMBURG]), "text of answers is None, expected text"),
        ("squad", answers([""], [HAMBURG]), "text of answers is '', expected text with something in it"),
        ("squad", answers([["Hamburg"]], [HAMBURG]), r"text of answers is \['Hamburg'\], expected text"),
        ("squad_v2", {"answers": None}, "answers is None, expected the lists text and answer_start"),
        ("squad_v2", {"answers": {"text": []}}, "expected the lists text and answer_start"),
        ("squad", {"answers": "{'text': ['Elbe']}"}, "which .jsonl, .json and .parquet files can hold"),
        ("squad", {"context": None}, "context is None, expected text"),
        ("squad", {"question": " "}, "question is ' ', expected text with something in it"),
        ("xsum", {"document": ""}, "document is '', expected text with something in it"),
        ("conll2003", {"ner_tags": [True, 0, 0, 0, 0]}, "tag True could be any of"),
        ("conll2003", {"ner_tags": [0.5, 0, 0, 0, 0]}, "tag 0.5 is not one of"),
        ("conll2003", {"tokens": ["Anna", None, "a", "b", "c"]}, "item 2 of tokens is None, expected text"),
        ("conll2003", {"tokens": ["Anna", "", "a", "b", "c"]}, "item 2 of tokens is '', expected a word"),
        ("boolq", {"answer": None}, "answer None is not a number: expected 0 .no., 1 .yes."),
        ("boolq", {"passage": None}, "passage is None, expected text"),
        ("boolq", {"question": ["a"]}, "question is .'a'., expected text"),
        ("piqa", {"label": 1.7}, "label is 1.7, expected a whole number"),
        ("piqa", {"label": True}, "label is True, expected a whole number"),
        ("piqa", {"sol2": 3}, "sol2 is 3, expected text"),
        ("siqa", {"answerB": None}, "answerB is None, expected text"),
        ("hellaswag", {"endings": "['a', 'b']"}, "expected a list of texts, which .jsonl"),
        ("hellaswag", {"endings": ["a", None]}, "item 2 of endings is None, expected text"),
        ("winogrande", {"answer": ""}, "answer is '', expected a whole number"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "lists of choices differ in length"),
        ("arc_easy", {"choices": None}, "choices is None"),
        ("openbookqa", {"question_stem": None}, "question_stem is None, expected text"),
        ("multiarith", {"final_ans": [3]}, "the answer .3. holds no number"),
        ("addsub", {"answer": True}, "the answer True holds no number"),
        ("gsm8k", {"question": 5}, "question is 5, expected text"),
        ("svamp", {"Body": None}, "Body is None, expected text"),
        ("sst2_instruction", {"label": 2}, "label 2 is not one of 0 .negative., 1 .positive."),
    ],
)  # fmt: skip
def test_hand_made_rows_that_mean_nothing_are_named(tmp_path, task, change, message):
    rows = [ROWS[task][0] | change, *ROWS[task][1:]]
    with pytest.raises(UserError, match=f"train.jsonl, row 1: .*{message}") as caught:
        load_task_data(task, data_dir=write_rows(tmp_path, task, rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "change", "answer"),
    [
        ("boolq", {"answer": "TRUE"}, "yes"),
        ("boolq", {"answer": "no"}, "no"),
        ("boolq", {"answer": 0.0}, "no"),
        ("piqa", {"label": "1.0"}, "answer2"),
        ("siqa", {"label": 3}, "answer3"),
        ("arc_challenge", {"answerKey": 2}, "answer2"),
        (
            "arc_easy",
            {"choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}], "answerKey": "B"},
            "answer2",
        ),
        ("sst2_instruction", {"label": "Positive"}, "positive"),
        ("sst2_instruction", {"label": "False"}, "negative"),
    ],
)
def test_answers_of_instructions_however_they_are_written(tmp_path, task, change, answer):
    rows = [ROWS[task][0] | change, *ROWS[task][1:]]
    assert load_task_data(task, data_dir=write_rows(tmp_path, task, rows)).train["answer"][0] == answer


def test_a_template_is_never_filled_with_what_is_no_text(tmp_path, monkeypatch):
    """Values of columns that are not text are refused, whatever a custom template does with them."""
    task = dataclasses.replace(
        TASKS["sst2_instruction"], name="own", exchange=lambda row: Exchange(f"Review: {row['sentence']}", "yes")
    )
    monkeypatch.setitem(TASKS, "own", task)
    rows = [*ROWS["sst2_instruction"], {"sentence": None, "label": 1}]
    with pytest.raises(UserError, match=r"row 4: sentence is None, expected text"):
        load_task_data("own", data_dir=write_rows(tmp_path, "own", rows))


LONG = {
    "sst2": {"sentence": "word " * 80},
    "rte": {"sentence2": "word " * 80},
    "conll2003": {"tokens": ["word"] * 80, "ner_tags": [0] * 80},
    "squad": {"question": "word " * 80},
    "boolq": {"passage": "word " * 600},
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("task", LONG)
def test_rows_that_are_too_long_are_found_before_anything_is_written(task, split, tiny_models, tmp_path):
    """After following the message's advice, or correcting the row, the same command works."""
    data_dir = write_rows(tmp_path, task)
    (data_dir / f"{split}.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in [*ROWS[task], ROWS[task][0] | LONG[task]])
    )
    config = TrainConfig(
        task=task, data_dir=data_dir, model=str(tiny_models[kind_of(get_task(task)).task_type]), max_steps=1, degree=3,
        output_dir=tmp_path / "run", use_cpu=True, max_target_length=6, disable_tqdm=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=rf"{split}.jsonl: .*: row {len(ROWS[task]) + 1};") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not config.output_dir.exists()
    if task == "squad":  # Such a question fits into no length.
        write_rows(tmp_path, task)
    else:
        config = dataclasses.replace(config, max_length=60)
    assert run(config).steps == 1


def test_new_tokens_leave_room_for_the_prompt(tiny_models, tmp_path):
    """A prompt is not silently cut to its last token."""
    config = TrainConfig(
        task="boolq", data_dir=write_rows(tmp_path, "boolq"), model=str(tiny_models["CAUSAL_LM"]), max_steps=1,
        output_dir=tmp_path / "run", use_cpu=True, max_target_length=64, max_length=64, disable_tqdm=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="64 new tokens leave no room for a prompt in 64: lower max_target_length"):
        run(config)
    with pytest.raises(UserError, match=r"validation.jsonl: 3 of 3 examples are longer than the model's limit of 128"):
        run(dataclasses.replace(config, max_target_length=120, max_length=None))
    with pytest.raises(UserError, match="summaries of up to 65 tokens are longer than the model's limit of 64"):
        run(dataclasses.replace(config, task="xsum", data_dir=write_rows(tmp_path, "xsum"), max_target_length=65,
                                model=str(tiny_models["SEQ_2_SEQ_LM"])))  # fmt: skip
    assert not config.output_dir.exists()


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
    """Batched generation gives the same texts as the model gives for single documents."""
    folder = tiny_models["SEQ_2_SEQ_LM"]
    model, tokenizer = load_model(folder, task_type="SEQ_2_SEQ_LM")
    data = load_task_data("xsum", data_dir=write_rows(tmp_path, "xsum"))
    found = kind_of(data.task).predict(model, tokenizer, data.task, columns_of(data.train), limits)
    plain, text = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), data.train["document"][0]
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    lengths = {"max_new_tokens": 5 if limits.num_beams == 1 else 4}
    ids = plain.generate(tokens, **lengths, do_sample=False, num_beams=limits.num_beams)
    assert found == [tokenizer.decode(ids[0], skip_special_tokens=True).strip()] * 3
