"""The analyses of training, each run completely on a tiny model and drawn, and their measures on known cases."""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from analyses import (
    ablation,
    complexity,
    convergence,
    delta_weights,
    instruction_tuning,
    memory,
    method_comparison,
    parameter_count,
    readme,
)
from analyses.core.analysis import runs_folder
from analyses.records import RecordError, load_result
from analyses.subjects.learning_rates import tuned_factors
from analyses.subjects.training_run import RunConfig, chance_score, mean_loss, training_run, tuning_split
from propulsion import PropulsionConfig
from propulsion.data import load_task_data
from propulsion.data.instructions import Exchange
from propulsion.data.tasks import get_task
from propulsion.errors import UserError
from propulsion.methods import Method
from propulsion.training import TrainingOptions
from propulsion.training.learning_rates import SCALE_RATE, WEIGHT_RATE


@pytest.fixture(scope="module")
def runs(tiny_model):
    return RunConfig(model=str(tiny_model), n_train=16, n_validation=12, degree=3,
                     training=TrainingOptions(max_steps=3, per_device_train_batch_size=4, max_length=32,
                                              learning_rate=None, head_learning_rate=None))  # fmt: skip


METHODS = ("full", "propulsion:positions=all", "lora:r=2", "head")


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    config = method_comparison.Config(
        methods=METHODS, seeds=(0, 1), run=runs, tuning_steps=2, rate_extensions=1,
        output_dir=tmp_path_factory.mktemp("compared") / "comparison",
    )  # fmt: skip
    while not (config.output_dir / "result.json").exists():
        method_comparison.ANALYSIS.publish(replace(config, max_runs=7))
    return config


def test_methods_are_compared_in_pieces(compared):
    result = load_result(compared.output_dir, analysis="method_comparison")
    rows = {row["method"]: row for row in result.tables["summary"]}
    assert tuple(rows) == METHODS
    assert all(row["seeds"] == 2 for row in rows.values())
    assert rows["head"]["trained_parameters"] == 66 < rows["propulsion:positions=all"]["trained_parameters"]
    for row in result.tables["runs"]:
        factor = rows[row["method"]]["rate_factor"]
        expected = {"full": WEIGHT_RATE, "propulsion:positions=all": SCALE_RATE / 3}.get(row["method"])
        if expected is not None:
            assert row["learning_rates"][{"full": "weight"}.get(row["method"], "scale")] == pytest.approx(
                factor * expected
            )
        predictions = result.arrays[f"predictions.demo.{row['method']}.{row['seed']}"]
        assert row["accuracy"] == np.mean(predictions == result.arrays["labels.demo"])
    tried = {(row["method"], row["factor"]): row["loss"] for row in result.tables["tuning"]}
    for method, row in rows.items():
        assert tried[method, row["rate_factor"]] == min(loss for (name, _), loss in tried.items() if name == method)
    # A second call computes nothing.
    before = sorted(compared.output_dir.with_name("comparison-runs").iterdir())
    assert method_comparison.run(replace(compared, max_runs=0)) is not None
    assert sorted(compared.output_dir.with_name("comparison-runs").iterdir()) == before
    assert (compared.output_dir / "method_comparison.png").exists()
    assert "| head  " in readme.tables(result)
    (chosen,) = (row for row in result.tables["summary"] if row["method"] == "full")
    (best,) = (t for t in result.tables["tuning"] if t["method"] == "full" and t["factor"] == chosen["rate_factor"])
    assert f"**{best['loss']:.3f}, {best['score']:.3f}**" in readme.tables(result, trials=True)


def test_learning_rates_of_an_earlier_result(compared, tmp_path):
    before = {row["method"]: row["rate_factor"] for row in load_result(compared.output_dir).tables["summary"]}
    other = replace(
        compared, rates_from=compared.output_dir, seeds=(5,), methods=METHODS[:2], output_dir=tmp_path / "o"
    )
    result = method_comparison.run(other)
    assert result is not None
    assert {row["method"]: row["rate_factor"] for row in result.tables["summary"]} == {
        m: before[m] for m in METHODS[:2]
    }
    assert result.tables["tuning"] == []
    with pytest.raises(RecordError, match="tried no learning rates"):
        readme.tables(result, trials=True)
    # The common factor of all rates of a comparison is included.
    training = replace(compared.run.training, rate_multiplier=0.5)
    halved = replace(other, run=replace(compared.run, training=training), output_dir=tmp_path / "halved")
    method_comparison.ANALYSIS.publish(halved)
    assert tuned_factors(halved.output_dir) == {m: before[m] / 2 for m in METHODS[:2]}
    assert f"{before['full'] / 2:.3g}" in method_comparison.summary(load_result(halved.output_dir))
    with pytest.raises(UserError, match="holds no learning rate of ia3"):
        method_comparison.run(replace(other, methods=("ia3",)))


def test_only_the_named_methods_have_trial_runs(compared, tmp_path):
    config = replace(
        compared, output_dir=tmp_path / "some", runs_dir=runs_folder(compared, compared.output_dir), searched=("full",)
    )
    method_comparison.ANALYSIS.publish(config)
    some, whole = (load_result(one.output_dir, analysis="method_comparison") for one in (config, compared))
    assert {row["method"] for row in some.tables["tuning"]} == {"full"}
    factors = {row["method"]: row["rate_factor"] for row in some.tables["summary"]}
    assert factors == {text: 1.0 for text in METHODS} | {"full": factors["full"]}
    assert some.metric("accuracy", stage="demo", left="full") == whole.metric("accuracy", stage="demo", left="full")


def test_the_change_over_the_last_third(compared):
    """The final scores minus the earlier ones; and scoring in between does not change the run."""
    result = load_result(compared.output_dir, analysis="method_comparison")
    for text in METHODS:
        rows = [row for row in result.tables["runs"] if row["method"] == text]
        changes = [row["accuracy"] - row["earlier_score"] for row in rows]
        found = result.metric(method_comparison.CHANGE, stage=f"demo, {method_comparison.CHANGE}", left=text)
        assert found.value == pytest.approx(sum(changes) / len(rows))
    factor = next(row["rate_factor"] for row in result.tables["summary"] if row["method"] == "head")
    alone = training_run(compared.run, compared.run.load("demo"), Method("head"), seed=0, rate_multiplier=factor)
    assert tuple(result.arrays["losses.demo.head.0"]) == alone["losses"]


def test_a_factor_on_all_learning_rates_multiplies_each_methods_own(runs):
    config = replace(runs, training=replace(runs.training, rate_multiplier=0.5))
    found = training_run(config, runs.load("demo"), Method("full"), seed=0, rate_multiplier=3.0)
    assert found["learning_rates"]["weight"] == pytest.approx(1.5 * WEIGHT_RATE)


@pytest.mark.parametrize(("chosen_by", "best"), [("loss", 9.0), ("score", 27.0)])
def test_a_rate_that_diverges_is_not_chosen(chosen_by, best):
    trials = {1.0: (None, None), 3.0: (0.7, 0.5), 9.0: (0.69, 0.5), 27.0: (0.9, 0.6), 81.0: (0.6, float("nan")),
              243.0: (0.95, 0.6)}  # fmt: skip
    found = {factor: method_comparison.Trial(*trial) for factor, trial in trials.items()}
    if chosen_by == "loss":
        del found[81.0]
    assert method_comparison.best_factor(found, chosen_by) == best


def test_learning_rates_by_the_score_among_those_tried(compared, tmp_path):
    tried = load_result(compared.output_dir).tables["tuning"]
    config = replace(compared, rates_from=compared.output_dir, chosen_by="score", seeds=(0,), output_dir=tmp_path / "s")
    method_comparison.ANALYSIS.publish(config)
    result = load_result(config.output_dir)
    assert result.tables["tuning"] == tried
    for row in result.tables["summary"]:
        scores = {t["factor"]: t["score"] for t in tried if t["method"] == row["method"]}
        assert scores[row["rate_factor"]] == max(scores.values())
    by_loss = replace(compared, rates_from=compared.output_dir, seeds=(0,), output_dir=tmp_path / "l")
    method_comparison.ANALYSIS.publish(by_loss)
    with pytest.raises(UserError, match="tried no learning rates itself"):
        method_comparison.run(replace(config, rates_from=by_loss.output_dir))


def test_mean_loss_is_that_of_torch():
    rows = load_task_data("demo", n_validation=9)
    outputs = np.random.default_rng(0).normal(size=(9, 2))
    labels = torch.tensor(rows.validation["label"])
    expected = torch.nn.functional.cross_entropy(torch.tensor(outputs), labels).item()
    assert mean_loss(rows, outputs) == pytest.approx(expected, rel=1e-12)


def test_chance_is_the_commonest_class():
    rows = load_task_data("demo", n_validation=9)
    labels = np.array(rows.validation["label"])
    assert chance_score(rows) == max(np.mean(labels), 1 - np.mean(labels))
    assert chance_score(replace(rows, task=get_task("stsb"))) == 0


def test_learning_rates_are_not_chosen_on_validation_rows():
    data = load_task_data("demo")
    part = tuning_split(data)
    texts = set(part.train["sentence"]), set(part.validation["sentence"])
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == set(data.train["sentence"])


def test_equal_predictions_differ_by_nothing():
    labels = np.array([0, 1, 1, 0, 1])
    cells = [{"predictions": [0, 1, 0, 0, 1]}, {"predictions": [0, 1, 1, 0, 1]}]
    found = method_comparison.Comparison("demo", labels, {}, {}, {"full": cells, "lora": cells})
    found, _ = method_comparison.comparison_metrics(found)
    metrics = {(m.left, m.right): m for m in found}
    assert metrics["lora", ""].value == pytest.approx(0.9)
    assert metrics["lora", ""].low < 0.9 < metrics["lora", ""].high < 1
    assert (metrics["lora", "full"].low, metrics["lora", "full"].value, metrics["lora", "full"].high) == (0, 0, 0)


def test_curves(runs, compared, tmp_path):
    config = convergence.Config(methods=METHODS[:2], seeds=(0, 1), every=2, run=runs, output_dir=tmp_path / "curves",
                                comparison=compared.output_dir)  # fmt: skip
    convergence.ANALYSIS.publish(config)
    result = load_result(config.output_dir, analysis="convergence")
    assert result.arrays["steps"].tolist() == [0, 2, 3]
    assert result.arrays["losses.full"].shape == (2, 3)
    assert (np.diff(result.arrays["seconds.full"], axis=1) > 0).all()
    factors = {row["method"]: row["rate_factor"] for row in load_result(compared.output_dir).tables["summary"]}
    assert all(row["rate_factor"] == factors[row["method"]] for row in result.tables["methods"])
    # Evaluations during training do not change the training.
    plain = method_comparison.run(replace(compared, max_runs=0))
    assert plain is not None
    last = {(row["method"], row["seed"]): row["accuracy"] for row in plain.tables["runs"]}
    assert result.arrays["scores.full"][:, -1].tolist() == [last["full", 0], last["full", 1]]


def test_when_a_share_of_the_gain_is_reached():
    scores = np.array([0.5, 0.6, 0.95, 1.0, 0.9])
    assert convergence.first_at(scores, 0.9) == 2
    assert convergence.first_at(scores, 0.95) == 3
    assert convergence.first_at(np.full(3, 0.5), 0.9) == 0


@pytest.mark.parametrize("factor", ["degree", "degree_fixed_rate", "positions", "init_value", "layers", "vectors"])
def test_ablations(runs, tmp_path, factor):
    config = ablation.Config(factor=factor, seeds=(0,), n_layers=1, output_dir=tmp_path / factor,
                             run=replace(runs, training=replace(runs.training, max_steps=1)))  # fmt: skip
    ablation.ANALYSIS.publish(config)
    result = load_result(config.output_dir, analysis="ablation")
    rows = {row["setting"]: row for row in result.tables["settings"]}
    assert list(rows) == [setting.label for setting in ablation.settings_of(config)]
    assert (config.output_dir / "ablation.png").exists()
    if factor == "vectors":
        assert rows["4 max"]["trained_parameters"] - 66 == 4 * (rows["1"]["trained_parameters"] - 66)


def test_one_rate_for_all_degrees_is_one_rate():
    settings = ablation.settings_of(ablation.Config(factor="degree_fixed_rate"))
    assert {setting.learning_rate for setting in settings} == {SCALE_RATE / 15}
    assert {setting.learning_rate for setting in ablation.settings_of(ablation.Config())} == {None}


@pytest.fixture
def bert():
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50,
                   max_position_embeddings=16)
    )  # fmt: skip
    return model, {name: weight.clone() for name, weight in model.base_model.state_dict().items()}


def test_a_lora_changes_weights_by_its_rank(bert):
    model, base = bert
    adapted = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, target_modules=["query"]))
    changed = delta_weights.delta_weights(adapted, base)
    assert list(changed) == ["encoder.layer.0.attention.self.query"]
    (measures,) = changed.values()
    assert measures["rank_share"] == 3 / 16
    assert 1 / 16 <= measures["effective_rank_share"] <= 3 / 16


def test_propulsion_changes_rows_by_its_scales(bert):
    model, base = bert
    adapted = get_peft_model(model, PropulsionConfig(degree=2, target_modules=["query"]))
    z = next(p for name, p in adapted.named_parameters() if "propulsion_z" in name)
    with torch.no_grad():
        z.copy_(torch.linspace(0.9, 1.1, 16).reshape(z.shape))
    expected = (torch.linspace(0.9, 1.1, 16) ** 2 - 1)[:, None] * base["encoder.layer.0.attention.self.query.weight"]
    moved = delta_weights.scales(adapted)
    assert moved["z"] == pytest.approx(np.linspace(0.9, 1.1, 16))
    assert moved["z^k"] == pytest.approx(np.linspace(0.9, 1.1, 16) ** 2)
    (measures,) = delta_weights.delta_weights(adapted, base).values()
    assert measures["rank_share"] == 1
    weight = base["encoder.layer.0.attention.self.query.weight"]
    assert measures["relative_size"] == pytest.approx(float(expected.norm() / weight.norm()), rel=1e-5)


def test_a_change_of_rank_one():
    u, v = torch.randn(5, generator=torch.Generator().manual_seed(0)), torch.arange(1.0, 5)
    found = delta_weights.singular_value_measures(torch.outer(u, v), torch.eye(5, 4))
    assert found["rank_share"] == 1 / 4
    assert found["effective_rank_share"] == pytest.approx(1 / 4)
    assert found["first_share"] == pytest.approx(1)


def test_changes_of_all_methods(runs, tmp_path):
    config = delta_weights.Config(run=replace(runs, degree=None), output_dir=tmp_path / "delta")
    delta_weights.ANALYSIS.publish(config)
    rows = {row["method"]: row for row in load_result(config.output_dir).tables["methods"]}
    assert rows["bitfit"]["changed_matrices"] == 0
    assert rows["full"]["changed_matrices"] == rows["propulsion:positions=all"]["changed_matrices"] == 7
    assert rows["lora"]["changed_matrices"] == 2
    assert "z q0.5" in rows["propulsion:positions=all"]
    assert "z q0.5" not in rows["lora"]


def test_memory_in_a_process_of_its_own(runs, tmp_path):
    config = memory.Config(methods=("head",), rounds=1, run=runs, output_dir=tmp_path / "memory")
    memory.ANALYSIS.publish(config)
    (row,) = load_result(config.output_dir, analysis="memory").tables["methods"]
    assert row["trained_parameters"] == 66
    assert row["peak_bytes"] > row["over_model_bytes"] >= 0
    assert row["peak_bytes"] > 50e6


def test_a_child_that_fails_is_one_line(runs, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, stderr="a warning\nerror: method lora cannot be used here\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    config = memory.Config(methods=("lora",), rounds=1, run=runs, output_dir=tmp_path / "memory")
    with pytest.raises(UserError, match=r"^method lora failed: method lora cannot be used here$"):
        memory.run(config)


def test_formulas_count_what_is_there(tmp_path):
    config = complexity.Config(n=24, m=16, tokens=8, rank=4, vectors=3, repeats=1, output_dir=tmp_path / "complexity")
    complexity.ANALYSIS.publish(config)
    rows = load_result(config.output_dir, analysis="complexity").tables["methods"]
    assert len(rows) == len(complexity.COSTS)
    assert all(row["parameters"] == row["counted"] for row in rows)
    assert all(row["seconds"] > 0 for row in rows)


# Expected counts: all Linear and Embedding with the head, Linear layers of blocks, query/key/value, whole model.
RECOUNTED = {
    "RoBERTa-base": (86_018, 82_944, 27_648, 124_647_170),
    "RoBERTa-large": (225_282, 221_184, 73_728, 355_361_794),
    "DeBERTaV3-base": (84_482, 82_944, 27_648, None),
    "BART-large": (325_721, 270_336, 110_592, None),
    "LLaMA-7B": (1_395_968, 1_359_872, 393_216, None),
    "LLaMA-13B": (2_167_040, 2_129_920, 614_400, None),
    "BLOOMz-7B1": (1_360_896, 1_105_920, 368_640, None),
    "GPT-J-6B": (1_086_688, 1_032_192, 344_064, None),
}


def test_the_papers_parameters_are_recounted(tmp_path):
    config = parameter_count.Config(output_dir=tmp_path / "count")
    parameter_count.ANALYSIS.publish(config)
    rows = {row["model"]: row for row in load_result(config.output_dir, analysis="parameter_count").tables["counts"]}
    found = {
        name: (row["everything"], row["blocks"], row["attn"], row["total"] if RECOUNTED[name][3] else None)
        for name, row in rows.items()
    }
    assert found == RECOUNTED
    # The head's two outputs are no scales. DeBERTa's relative embeddings, whose weight is read directly, have theirs.
    deberta = rows["DeBERTaV3-base"]
    assert deberta["everything"] - deberta["all"] == 2


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        (
            parameter_count,
            parameter_count.Config(models=("GPT-5",)),
            r"GPT-5 \(did you mean GPT-J-6B\?\); there are RoBERTa",
        ),
        (complexity, complexity.Config(tokens=0), "tokens must be at least 1"),
        (memory, memory.Config(rounds=0), "rounds must be at least 1"),
        (memory, memory.Config(methods=("lorra",)), "unknown method 'lorra'"),
        (convergence, convergence.Config(every=0), "every must be at least 1"),
        (ablation, ablation.Config(seeds=()), "seeds must be one or more"),
        (method_comparison, method_comparison.Config(tasks=()), "there must be a task"),
        (method_comparison, method_comparison.Config(searched=("ful",)), "searched names 'ful' .did you mean"),
        (convergence, convergence.Config(methods=()), "there must be a method"),
        (memory, memory.Config(methods=()), "there must be a method"),
        (method_comparison, method_comparison.Config(methods=("lora:r",)), "not of the form OPTION=VALUE"),
        (method_comparison, method_comparison.Config(tasks=("sst3",)), "unknown task 'sst3'"),
        (method_comparison, method_comparison.Config(tasks=("squad",)), "task squad is of the kind question_answering"),
    ],
)
def test_mistakes(module, config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        module.run(config)


def test_baselines_and_paired_differences_of_known_answers():
    rows = [Exchange("p", answer, ("yes", "no", "maybe")) for answer in ("yes", "no", "no")]
    majority, chance = instruction_tuning.baselines(rows)
    assert (majority["answer"], majority["accuracy"]) == ("no", 2 / 3)
    assert chance["accuracy"] == pytest.approx(1 / 3)
    sums = instruction_tuning.baselines([Exchange("p", "so 4"), Exchange("p", "4"), Exchange("p", "5")])
    assert [(row["answer"], row["accuracy"]) for row in sums] == [("4", 2 / 3), (None, None)]
    ones, zeros = np.ones(9, dtype=np.int8), np.zeros(9, dtype=np.int8)
    assert instruction_tuning.paired_interval(ones, zeros) == (1, 1, 1)
    mixed = np.array([1, 0, 0, 1, 1, 0, 0, 0, 1], dtype=np.int8)
    value, low, high = instruction_tuning.paired_interval(mixed, zeros)
    assert value == pytest.approx(4 / 9)
    assert low < value < high


def test_instructions_are_tuned_and_generated(tiny_decoder, tmp_path):
    rows = "".join(json.dumps({"sentence": f"text {i}", "label": i % 2}) + "\n" for i in range(8))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    config = instruction_tuning.Config(
        model=str(tiny_decoder), data_dir=tmp_path,
        methods=("none", "propulsion:degree=3", "lora:target_modules=q_proj+"),
        max_steps=2, max_train_samples=8, max_eval_samples=4, max_length=48, per_device_train_batch_size=4,
        output_dir=tmp_path / "result",
    )  # fmt: skip
    instruction_tuning.ANALYSIS.publish(config)
    rows = {row["method"]: row for row in load_result(config.output_dir).tables["methods"]}
    assert [row["steps"] for row in rows.values()] == [0, 2, 2]
    assert rows["none"]["trained_parameters"] == 0
    assert rows["lora:target_modules=q_proj+"]["trained_parameters"] == 8 * (16 + 16)
    result = load_result(config.output_dir)
    assert (config.output_dir / "instruction_tuning.png").exists()
    for name, row in rows.items():
        assert row["accuracy"] == result.arrays[f"right.{name}"].mean()
    said = result.tables["said"]
    assert len(said) == 4
    assert all(set(row["said"]) == set(rows) and row["answer"] in ("negative", "positive") for row in said)
    commonest = max(sum(row["answer"] == word for row in said) for word in ("negative", "positive")) / 4
    assert [row["accuracy"] for row in result.tables["baselines"]] == [commonest, 0.5]
    paired = result.metric("accuracy", stage="difference", left="propulsion:degree=3", right="none")
    assert paired.value == rows["propulsion:degree=3"]["accuracy"] - rows["none"]["accuracy"]
    with pytest.raises(UserError, match="task sst2 is not an instruction task"):
        instruction_tuning.run(replace(config, task="sst2"))
