"""The experiment on predictors: made tasks, scores against slow truths, fitted predictors, hypotheses, and settings."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analyses.core.cells import Cells, Grid
from analyses.foresight import analysis as foresight
from analyses.foresight import tasks
from analyses.foresight.docstrings import HELD_OUT, Sentence, distinct, held_out_sources, sentences
from analyses.foresight.fitted import RIDGE, combination, mean_ranks
from analyses.foresight.hypotheses import FAILS, HOLDS, UNDECIDED, UNTESTED, judge
from analyses.foresight.scores import Draws, ceiling, correlation, ranked, regret
from analyses.foresight.setting import Setting, SettingCells, final_score, searched_scores, steps_of
from analyses.foresight.values import (
    ALWAYS_LORA,
    BEFORE,
    ENTRIES,
    OTHER_TASKS,
    PARAMETERS,
    PROBED_HEAD,
    RANDOM_HEAD,
    command,
    early_loss,
    values_of,
)
from analyses.subjects.training_run import RunConfig
from propulsion.errors import UserError
from propulsion.methods import parse_methods
from propulsion.training import TrainingOptions

# --- made tasks ------------------------------------------------------------------------------------------------------


def test_similarities_are_cut_at_two_and_four():
    rows = {"sentence1": list("abcde"), "sentence2": list("abcde"), "label": [1.9, 2.0, 4.0, 4.1, 0.0]}
    assert tasks.similarity_classes(rows)["label"] == [0, 1, 1, 2, 0]


def test_swapped_sentences_differ_in_two_neighbouring_words():
    texts = [" ".join(f"w{i * j % 7}" for j in range(5)) for i in range(1, 60)] + ["one", "same same"]
    made = tasks.swapped_words({"sentence": texts})
    assert 15 < sum(made["label"]) < 45
    assert len(made["label"]) == sum(len(set(text.split())) > 1 for text in texts)
    kept = [text for text in texts if len(set(text.split())) > 1]
    for text, found, label in zip(kept, made["sentence"], made["label"], strict=True):
        places = [i for i, (a, b) in enumerate(zip(text.split(), found.split(), strict=True)) if a != b]
        assert len(places) == 2 * label
        assert not label or places[1] == places[0] + 1
        assert Counter(text.split()) == Counter(found.split())


def test_another_premise_has_as_many_words():
    premises = [f"p{i} " + "word " * (i % 3) for i in range(40)] + ["the only one of its many words"]
    rows = {"sentence1": premises, "sentence2": [f"h{i}" for i in range(41)], "label": [0] * 41}
    made = tasks.belonging_hypotheses(rows)
    assert len(made["label"]) == 40
    own = dict(zip(rows["sentence2"], premises, strict=True))
    for premise, hypothesis, label in zip(made["sentence1"], made["sentence2"], made["label"], strict=True):
        assert (premise != own[hypothesis]) == bool(label)
        assert len(premise.split()) == len(own[hypothesis].split())


def test_sentences_do_not_name_their_label(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "tests").mkdir()
    source = '"""Arrays of the Pkg package, for a pkg.array. More."""\ndef f():\n    """Too short."""\n'
    for folder in (tmp_path / "pkg", tmp_path / "pkg" / "tests"):
        (folder / "one.py").write_text(source)
    found = [*sentences(tmp_path / "pkg" / "one.py", tmp_path, 3, ("pkg",))]
    assert found == [Sentence("Arrays of the package, for a .array.", 3, "pkg/one.py")]
    assert not [*sentences(tmp_path / "pkg" / "tests" / "one.py", tmp_path, 3, ("pkg",))]


def test_rows_are_balanced_and_no_text_is_twice():
    rows = [Sentence(f"text {i}", i % 2, f"{i % 5}.py") for i in range(20)] + [Sentence("Text 1", 1, "x.py")]
    found = distinct([*rows, *(Sentence(f"more {i}", 0, "y.py") for i in range(30))])
    assert Counter(row.label for row in found) == {0: 9, 1: 9}  # "text 1" occurs twice.
    assert len({row.text.casefold() for row in found}) == len(found)


def test_whole_files_of_every_label_are_held_out():
    rows = [Sentence(f"text {i}", 0, f"a{min(i, 40) % 8}.py") for i in range(80)]  # One file has more than half.
    rows += [Sentence(f"more {i}", 1, f"b{i % 12}.py") for i in range(60)]
    apart = held_out_sources(rows)
    for label, count in ((0, 80), (1, 60)):
        share = sum(row.source in apart for row in rows if row.label == label) / count
        assert 0.15 < share <= HELD_OUT
    assert "a0.py" not in apart


def test_rows_of_a_made_task_are_drawn_by_the_seed(monkeypatch):
    rows = [Sentence(f"a text of number {i}", i % 5, f"{i}.py") for i in range(200)]
    monkeypatch.setitem(tasks.FROM_DOCSTRINGS, "module", (tasks.MADE["module"], lambda: rows))
    tasks._rows.cache_clear()
    first, again, other = (tasks.load(RunConfig(n_validation=20), "module", 30, seed) for seed in (0, 0, 1))
    tasks._rows.cache_clear()
    assert (len(first.train), len(first.validation)) == (30, 20)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not set(first.train["sentence"]) & set(first.validation["sentence"])


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_candidate_without_a_value_is_ranked_last():
    values, scores = [0.3, None, 0.5, None], [1.0, 2.0, 3.0, 0.0]
    expected: Any = stats.spearmanr([0.3, -9, 0.5, -9], scores)
    assert correlation(values, scores) == pytest.approx(expected.statistic)
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0
    assert math.isnan(correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 50), ([3.0, 2.0, 3.0], 25), ([None] * 3, 20)]
)
def test_regret_averages_ties(values, expected):
    assert regret(values, [0.4, 0.8, 0.9]) == pytest.approx(expected)


SETTINGS = [("a", 128, 0), ("a", 128, 1), ("a", 512, 0), ("b", 128, 0), ("c", 128, 0), ("c", 512, 1)]


def test_a_task_with_more_settings_does_not_count_more():
    values = np.array([1.0, 2.0, 3.0, 10.0, math.nan, 4.0])
    assert Draws(SETTINGS, 5).mean(values) == pytest.approx((2 + 10 + 4) / 3)


def test_a_resample_draws_tasks_and_then_seeds_with_their_settings():
    """Every resampled mean is one that some draw gives, and their variance is that of all draws."""
    values = np.array([0.0, 6.0, 3.0, 10.0, 1.0, 5.0])
    of_task = {"a": {0: [0.0, 3.0], 1: [6.0]}, "b": {0: [10.0]}, "c": {0: [1.0], 1: [5.0]}}

    def moments(seeds: dict[int, list[float]]) -> tuple[float, float]:
        found = [np.mean([v for s in drawn for v in seeds[s]]) for drawn in np.ndindex(*[len(seeds)] * len(seeds))]
        return float(np.mean(found)), float(np.mean(np.square(found)))

    first, second = np.mean([moments(seeds) for seeds in of_task.values()], axis=0)
    draws = Draws(SETTINGS, 20000).resampled(values)
    assert draws.mean() == pytest.approx(first, abs=0.05)
    assert draws.var() == pytest.approx((second - first**2) / 3, rel=0.05)


def test_intervals_need_two_tasks():
    one = Draws(SETTINGS[:3], 20)
    assert math.isnan(one.interval(np.ones(3)).low)
    assert math.isnan(one.p_value(np.ones(3)))
    assert Draws(SETTINGS, 99).p_value(np.ones(6)) == pytest.approx(0.02)


def test_the_ceiling_is_between_seeds_of_one_task_and_size():
    scores = {("a", 128, 0): [1, 2, 3], ("a", 128, 1): [1, 3, 2], ("a", 512, 0): [3, 2, 1], ("b", 128, 0): [1, 2, 3],
              ("b", 128, 1): [2, 4, 6]}  # fmt: skip
    assert ceiling(scores) == pytest.approx((0.75, 0.5, 1.0))
    assert math.isnan(ceiling({("a", 128, 0): [1, 2, 3]}).value)


# --- fitted on other tasks -------------------------------------------------------------------------------------------


def texts(task: str) -> str:
    return "a" if task == "c" else task


def test_the_mean_rank_leaves_out_the_task_and_those_of_its_texts():
    scores = np.array([[1, 2, 3], [3, 2, 1], [1, 2, 3], [1, 3, 2], [3, 1, 2], [3, 2, 1]], dtype=float)
    found = mean_ranks(SETTINGS, scores, texts)
    assert found is not None
    np.testing.assert_allclose(found[0], [-0.5, 0.5, 0])  # Of "a" only "b" is left.
    np.testing.assert_allclose(found[4], found[0])
    of_a = np.array([[-0.5, 0, 0.5], [0.5, 0, -0.5], [-0.5, 0, 0.5]]).mean(0)
    of_c = np.array([[0.5, -0.5, 0], [0.5, 0, -0.5]]).mean(0)
    np.testing.assert_allclose(found[3], (of_a + of_c) / 2)
    assert mean_ranks([("a", 1, 0), ("c", 1, 0)], scores[:2], texts) is None


def test_the_combination_is_a_ridge_regression_on_other_tasks():
    generator = np.random.default_rng(0)
    k, scores = 5, generator.normal(size=(6, 5))
    values = {name: generator.normal(size=(6, k)).tolist() for name in ("p", "q")}
    values["p"][3][2] = None
    found = combination(SETTINGS, values, scores, texts)
    assert found is not None
    centred = lambda row: (ranked(row) - 3) / 4  # noqa: E731
    rows, targets, weights = [], [], []
    for place in (0, 1, 2, 4, 5):  # For "b": "a" with three settings, "c" with two.
        for candidate in range(k):
            rows.append([centred(values[name][place])[candidate] for name in ("p", "q")])
            targets.append(centred(scores[place].tolist())[candidate])
            weights.append(1 / (k * (3 if place < 3 else 2)))
    A, y, w = np.array(rows), np.array(targets), np.array(weights)
    fit = np.linalg.lstsq(
        np.r_[A * np.sqrt(w)[:, None], np.sqrt(RIDGE) * np.eye(2)], np.r_[y * np.sqrt(w), 0, 0], rcond=None
    )[0]
    expected = np.array([[centred(values[name][3])[c] for name in ("p", "q")] for c in range(k)]) @ fit
    np.testing.assert_allclose(found[3], expected, atol=1e-12)
    changed = scores.copy()
    changed[[0, 1, 2, 4, 5]] = changed[[0, 1, 2, 4, 5]][:, ::-1]
    again = combination(SETTINGS, values, changed, texts)
    assert again is not None
    np.testing.assert_allclose(again[0], found[0])


# --- hypotheses ------------------------------------------------------------------------------------------------------

MANY = [(f"task{i}", 128, seed) for i in range(8) for seed in range(3)]


def judged(rho: dict[str, float], regrets: dict[str, float], rates=()) -> dict[str, str]:
    """Outcomes for predictors whose values differ by little between settings."""
    generator = np.random.default_rng(0)
    noise = lambda: 0.01 * generator.normal(size=len(MANY))  # noqa: E731
    table = {name: rho.get(name, 0.0) + noise() for name, entry in ENTRIES.items() if entry.ranks}
    lost = {name: regrets.get(name, 5.0) + noise() for name in ENTRIES}
    return {one.hypothesis: one.outcome for one in judge(Draws(MANY, 500), table, lost, rates)}


@pytest.mark.parametrize(
    ("name", "rho", "regrets", "expected"),
    [
        ("H1", {"CKA with full": 0.7, PARAMETERS: 0.3, OTHER_TASKS: 0.4}, {}, HOLDS),
        ("H1", {"CKA with full": 0.7, PARAMETERS: 0.6, OTHER_TASKS: 0.4}, {}, UNDECIDED),
        ("H1", {"CKA with full": 0.7, PARAMETERS: 0.3, OTHER_TASKS: 0.65}, {}, UNDECIDED),
        ("H1", {"CKA with full": 0.5}, {}, FAILS),
        ("H2", {"CKA with full": 0.5, early_loss(0.05): 0.3}, {}, HOLDS),
        ("H2", {"CKA with full": 0.5, early_loss(0.05): 0.6}, {}, FAILS),
        ("H2", {"CKA with full": 0.5, early_loss(0.05): 0.5}, {}, UNDECIDED),
        ("H3", {}, {command(0.05): 0.5, ALWAYS_LORA: 2.0, early_loss(0.05): 1.0}, HOLDS),
        ("H3", {}, {command(0.05): 1.5, ALWAYS_LORA: 2.0, early_loss(0.05): 2.0}, UNDECIDED),
        ("H3", {}, {command(0.05): 3.0, ALWAYS_LORA: 2.0}, FAILS),
        ("H4", {PROBED_HEAD: 0.3, RANDOM_HEAD: 0.1}, {}, HOLDS),
        ("H4", {PROBED_HEAD: 0.1, RANDOM_HEAD: 0.3}, {}, FAILS),
        ("H5", {"label alignment after 5 %": 0.3, "label alignment": 0.1}, {}, HOLDS),
    ],
)
def test_a_hypothesis_is_judged_by_its_thresholds(name, rho, regrets, expected):
    assert judged(rho, regrets)[name] == expected


@pytest.mark.parametrize(("good", "expected"), [(19, HOLDS), (17, UNDECIDED), (15, FAILS), (None, UNTESTED)])
def test_the_rule_for_rates_is_judged_by_the_share_of_pairs(good, expected):
    rates = [] if good is None else [True] * good + [False] * (20 - good)
    assert judged({}, {}, rates)["H6"] == expected


def test_one_task_tests_nothing():
    settings = MANY[:3]
    table = {name: np.zeros(3) for name in ENTRIES}
    assert {one.outcome for one in judge(Draws(settings, 9), table, table, [])} == {UNTESTED}


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_in_the_order_of_the_plan():
    config = foresight.Config(tasks=("demo", "sst2"), seeds=(0, 1, 2, 3), sizes=(128, 512, 2000))
    found = foresight.settings_of(config)
    assert len(found) == 2 * (4 + 4 + 3) == len(set(found))
    assert found[:3] == [Setting("demo", 128, 0), Setting("sst2", 128, 0), Setting("demo", 128, 1)]
    assert [one.rows for one in found[-6:]] == [2000] * 6
    assert {(one.seed, one.rows) for one in found[12:16]} == {(3, 128), (3, 512)}


def test_a_setting_has_every_predictor_and_the_grid(tiny_model, tmp_path):
    training = TrainingOptions(max_steps=40, per_device_train_batch_size=4, max_length=16)
    run = RunConfig(model=str(tiny_model), pooling="mean", n_validation=12, training=training)
    methods = parse_methods(("full", "head", "vera", "lora:r=8"))
    data = tasks.load(run, "demo", 24, seed=0)
    grid = Grid(tmp_path)
    measured = SettingCells(Cells(grid, {}), Setting("demo", 24, 0), run, data, methods).measured(4, (3.0,))
    assert measured is not None
    assert {steps_of(share, 40) for share in measured.early} == {1, 2, 4}
    values = values_of(measured)
    undefined = {name for name, each in values.items() if None in each.values()}
    assert not undefined - {command(0.05), command(0.15), "kernel regression", RANDOM_HEAD}, undefined
    assert not any(values[command(0.05)].values())  # 8 steps are too few to compare anything.
    assert values[PARAMETERS]["full"] == max(value or 0.0 for value in values[PARAMETERS].values())
    assert values["CKA with full"]["full"] == pytest.approx(1)
    before, after = values["label alignment"], values["label alignment after 5 %"]
    assert all(before[name] != after[name] for name in methods if name != "head")
    assert before["head"] == pytest.approx(after["head"], rel=1e-4)  # The head's features stay as they are.
    searched = searched_scores(measured)
    assert searched is not None
    for name in methods:
        assert searched[name] in {final_score(measured.factors[factor][name][0]) for factor in (1.0, 3.0)}
    assert grid.computed == 4 * 3 + 2 + 2 + 4 + 4 * 3


def test_the_command_is_successive_halving_within_its_steps(tiny_model, tmp_path, monkeypatch):
    """With 100 steps and four candidates, 15 % are 60 steps: the first rounds are those that `halving.plan` gives."""
    training = TrainingOptions(max_steps=100, per_device_train_batch_size=2, max_length=16)
    run = RunConfig(model=str(tiny_model), n_validation=12, training=training)
    methods = parse_methods(("full", "head", "vera", "bitfit"))
    data = tasks.load(run, "demo", 24, seed=0)
    own = SettingCells(Cells(Grid(tmp_path), {}), Setting("demo", 24, 0), run, data, methods)
    first = {name: {"failed": "", "learning_rates": {}, "steps": 5} for name in methods}
    asked = []

    def trial(self, part, name, steps, rates, kernel=0):
        asked.append((name, steps))
        score = {"full": 0.5, "head": 0.9, "vera": 0.7, "bitfit": 0.1}[name]
        return {"failed": "", "scores": {"accuracy": score}, "validation_loss": 0.0}

    monkeypatch.setattr(SettingCells, "_trial", trial)
    order = own._order(data, first, 0.15)
    assert asked == [(name, 25) for name in ("full", "head")]
    assert order == ["head", "full"]
    asked.clear()
    assert own._order(data, first, 0.5)[:2] == ["head", "vera"]
    assert [name for name, _ in asked[:4]] == list(methods)
    assert sum(steps for _, steps in asked) <= 0.5 * 400
    assert own._order(data, first, 0.01) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_tasks": ("sst2",)}, "grid_tasks names sst2, which is not among the tasks"),
        ({"factors": (1.0,)}, "factors must be other than 1"),
        ({"candidates": ("none",)}, "candidate none trains nothing"),
        ({"sizes": (8,)}, "sizes must be at least 16"),
        ({"sizes": ()}, "there must be a task and a number of training rows"),
        ({"tasks": ("moduel",)}, "unknown task 'moduel'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        foresight.run(foresight.Config(output_dir=Path(tmp_path) / "out", **options))


def test_the_before_step_predictors_are_those_of_the_plan():
    before = {name for name, entry in ENTRIES.items() if entry.kind == BEFORE}
    assert {"gradient norm", "decrement", "CKA with full", PROBED_HEAD, RANDOM_HEAD} <= before
    assert not {"LogME", "training loss", PARAMETERS} & before
