"""The choice of a method: rounds within a budget, predicted scores, predictors against slow truths, and the command."""

import copy
import math
import shlex

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from analyses import choose
from analyses.choose import halving
from analyses.choose.evidence import features_of, head_layer, kernel_rows, kernel_when_trained, kernels_of, probe
from analyses.choose.halving import Cost, Rung
from analyses.choose.predictors import (
    FOLDS,
    RIDGE,
    effective_dimension,
    kernel_gradient_norm,
    kernel_regression_score,
    log_evidence,
    logme,
    rank_correlation,
)
from analyses.choose.ranking import predicted_scores
from analyses.choose.tables import advice
from analyses.choose.trial import numbers
from analyses.subjects.training_run import RunConfig
from propulsion import train as train_command
from propulsion.data.tasks import OWN_TASKS
from propulsion.errors import UserError
from propulsion.methods import apply_method, parse_methods
from propulsion.pretrained import load_classifier
from propulsion.training import TrainingOptions

# --- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "expected"), [(1, [1]), (2, [2]), (3, [3, 2]), (7, [7, 3, 2]), (14, [14, 5, 2])]
)
def test_a_third_goes_on_until_two_are_left(candidates, expected):
    assert halving.sizes(candidates) == expected


def test_rounds_end_at_the_longest_run():
    assert halving.rungs(14, 10, 300) == [Rung(14, 10), Rung(5, 30), Rung(2, 90)]
    assert halving.rungs(14, 200, 300) == [Rung(14, 200), Rung(5, 300)]
    assert halving.rungs(14, 300, 300) == [Rung(14, 300)]


@pytest.mark.parametrize("seconds", [120.0, 300.0, 1000.0, 1e6])
@pytest.mark.parametrize("cost", [Cost(1.0, 0.1), Cost(3.0, 0.02), Cost(0.1, 0.5)])
def test_a_plan_fits_its_budget_and_the_next_longer_one_does_not(seconds, cost):
    budget = {"seconds": seconds, "spent": 7.0, "most": 300}
    count = halving.affordable(14, cost, **budget)
    plan = halving.plan(count, cost, **budget)
    room = seconds * (1 - halving.FOR_PREDICTORS) - 7.0
    assert halving.seconds_of(plan, cost) <= room
    if plan[0].steps < 300:
        assert halving.seconds_of(halving.rungs(count, plan[0].steps + 1, 300), cost) > room
    if count < 14:
        assert halving.seconds_of(halving.rungs(count + 1, halving.FEWEST_STEPS, 300), cost) > room


def test_a_budget_that_is_too_small_says_how_large_it_must_be():
    cost = Cost(20.0, 1.0)
    with pytest.raises(
        UserError, match=r"a budget of 1 minutes is too small: candidates need about (.*) for 2"
    ) as found:
        halving.affordable(5, cost, seconds=60.0, spent=0.0, most=300)
    two = float(str(found.value).split("about ")[1].split(" ")[0])
    everything = float(str(found.value).split("and ")[1].split(" ")[0])
    assert halving.affordable(5, cost, seconds=60 * two, spent=0.0, most=300) >= 2
    assert halving.affordable(5, cost, seconds=60 * everything, spent=0.0, most=300) == 5
    with pytest.raises(UserError):
        halving.affordable(5, cost, seconds=60 * (two - 0.2), spent=0.0, most=300)


def test_the_best_are_those_of_the_highest_score_and_then_of_the_lowest_loss():
    found = {"a": (0.9, 0.5), "b": (0.9, 0.4), "c": (math.nan, 0.1), "d": (0.95, math.nan), "e": (0.2, 0.1)}
    assert halving.best(found, 5) == ["d", "b", "a", "e", "c"]
    assert halving.best(found, 2) == ["d", "b"]


# --- predicted scores ------------------------------------------------------------------------------------------------


def of(right: np.ndarray):
    """The accuracy of a run by whether each row is right."""
    return lambda rows: float(right[rows].mean())


def test_those_that_left_are_predicted_to_gain_as_much_as_those_that_went_on():
    m = 200
    share = lambda count: np.arange(m) < count  # noqa: E731
    rounds = [
        {name: of(share(count)) for name, count in (("a", 100), ("b", 90), ("c", 80))},
        {"a": of(share(140)), "b": of(share(110))},
    ]
    found = predicted_scores(rounds, m, resamples=50)
    assert found["a"].value == 0.7
    assert found["b"].value == 0.55
    assert found["c"].value == pytest.approx(0.4 + (0.2 + 0.1) / 2)
    assert found["a"].near == 1.0
    assert all(p.low <= p.value <= p.high for p in found.values())


def test_the_interval_is_that_of_a_proportion_and_equal_candidates_are_equally_near():
    m = 400
    right = np.random.default_rng(0).random(m) < 0.8
    found = predicted_scores([{"a": of(right), "b": of(right), "c": of(~right)}], m, resamples=2000)
    error = math.sqrt(right.mean() * (1 - right.mean()) / m)
    assert found["a"].high - found["a"].low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (found["a"].near, found["b"].near, found["c"].near) == (1.0, 1.0, 0.0)


def test_a_candidate_a_standard_error_below_is_near_about_half_of_the_time():
    """Independent candidates whose scores differ by one standard error: near if the difference is at most one more."""
    m, generator, shares = 2500, np.random.default_rng(1), []
    for _ in range(20):
        best = generator.permutation(np.arange(m) < 0.50 * m)
        other = generator.permutation(np.arange(m) < 0.49 * m)  # One standard error is 0.01.
        shares.append(predicted_scores([{"a": of(best), "b": of(other)}], m, resamples=400)["b"].near)
    # The difference has a standard error of sqrt(2) and mean 1, in units of one; near: difference at most 1.
    assert np.mean(shares) == pytest.approx(stats.norm.cdf(0.0), abs=0.05)


def test_undefined_scores_count_as_zero():
    found = predicted_scores([{"a": lambda rows: math.nan, "b": lambda rows: 0.5}], 10, resamples=5)
    assert (found["a"].value, found["b"].near, found["a"].near) == (0.0, 1.0, 0.0)


def ranked(*rows):
    return [
        {"candidate": name, "score": score, "low": score - 0.1, "high": score + 0.1, "near_best": near,
         "trained_parameters": count}
        for name, score, near, count in rows
    ]  # fmt: skip


def test_the_advice_names_the_cheapest_that_is_about_as_good():
    text = advice(ranked(("full", 0.9, 1.0, 900), ("lora", 0.89, 0.8, 90), ("head", 0.5, 0.0, 2)), "accuracy", 80, 300)
    assert text.startswith(
        "Train full: predicted accuracy 0.900 [0.800, 1.000] after 300 steps, on 80 held-out rows; 1 of"
    )
    assert "of which lora trains the fewest parameters (90)" in text
    assert "no other of the 2 candidates is within one standard error" in advice(
        ranked(("a", 0.9, 1.0, 9), ("b", 0.1, 0.0, 2)), "accuracy", 80, 300
    )
    assert "trains the fewest parameters of them" in advice(
        ranked(("a", 0.9, 1.0, 1), ("b", 0.9, 0.9, 2)), "accuracy", 80, 300
    )


# --- predictors ------------------------------------------------------------------------------------------------------


def direct_evidence(F, y, alpha, beta):
    """The logarithm of the density of y ~ N(0, I / beta + F F^T / alpha), over n."""
    n = len(y)
    return stats.multivariate_normal(np.zeros(n), np.eye(n) / beta + F @ F.T / alpha).logpdf(y) / n


@pytest.mark.parametrize(("n", "h"), [(30, 5), (12, 20), (25, 25)])
def test_the_evidence_is_the_largest_density_of_the_targets(n, h):
    generator = np.random.default_rng(n)
    F = generator.normal(size=(n, h))
    y = F[:, :3] @ np.ones(3) + 0.7 * generator.normal(size=n)
    value = log_evidence(F, y)
    best = max(
        -optimize.minimize(lambda p: -direct_evidence(F, y, *np.exp(p)), start, method="Nelder-Mead",
                           options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000}).fun
        for start in ((0.0, 0.0), (1.0, 1.0))
    )  # fmt: skip
    assert value == pytest.approx(best, abs=1e-5)


def test_logme_prefers_features_that_separate_the_classes():
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    good = np.eye(3)[labels] + 0.1 * generator.normal(size=(60, 3))
    bad = generator.normal(size=(60, 3))
    assert logme(good, labels, regression=False) > logme(bad, labels, regression=False)
    assert logme(good, labels * 1.5, regression=True) > logme(bad, labels * 1.5, regression=True)


def features_and_kernel(n, c, p, seed=0):
    """Tangent features (n, c, p) and their kernel (n, n, c, c)."""
    J = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, c, p)))
    return J, torch.einsum("iap,jbp->ijab", J, J)


@pytest.mark.parametrize("c", [1, 2, 4])
def test_kernel_regression_is_ridge_regression_on_the_features(c):
    n, p = 20, 7
    J, K = features_and_kernel(n, c, p)
    generator = np.random.default_rng(3)
    outputs = generator.normal(size=(n, c))
    labels = generator.normal(size=n) if c == 1 else generator.integers(0, c, n)
    y = labels[:, None] if c == 1 else np.eye(c)[labels]
    f = outputs if c == 1 else np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    ridge = RIDGE * float(torch.einsum("iiaa->", K)) / (n * c)
    predictions, order = f.copy(), np.argsort(labels, kind="stable")
    for k in range(FOLDS):
        left = order[k::FOLDS]
        kept = np.setdiff1d(np.arange(n), left)
        A = J[kept].reshape(-1, p).numpy()
        w = np.linalg.solve(A.T @ A + ridge * np.eye(p), A.T @ (y - f)[kept].ravel())
        predictions[left] += J[left].numpy() @ w
    expected = (
        1 - ((predictions[:, 0] - labels) ** 2).mean() / labels.var() if c == 1
        else (predictions.argmax(1) == labels).mean()
    )  # fmt: skip
    assert kernel_regression_score(K, outputs, labels) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("c", [1, 3])
def test_the_gradient_norm_of_a_kernel_is_that_of_autograd(c):
    torch.manual_seed(0)
    x, w = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, c, dtype=torch.float64, requires_grad=True)
    labels = torch.randn(6, dtype=torch.float64) if c == 1 else torch.randint(0, c, (6,))
    f = x @ w
    loss = ((f[:, 0] - labels) ** 2).mean() / 2 if c == 1 else nn.functional.cross_entropy(f, labels)
    expected = torch.autograd.grad(loss, w)[0].norm()
    K = torch.einsum("ip,jp,ab->ijab", x, x, torch.eye(c, dtype=torch.float64))
    assert kernel_gradient_norm(K, f.detach().numpy(), labels.numpy()) == pytest.approx(float(expected), rel=1e-9)


def test_the_effective_dimension_is_a_trace():
    _, K = features_and_kernel(8, 2, 5)
    matrix = K.transpose(1, 2).reshape(16, 16)
    ridge = float(matrix.trace()) / 16
    expected = float((matrix @ torch.linalg.inv(matrix + ridge * torch.eye(16, dtype=torch.float64))).trace())
    assert effective_dimension(K) == pytest.approx(expected, rel=1e-9)


def test_rank_correlation_needs_three_different_candidates():
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 5.0, 9.0])) == pytest.approx(1.0)
    assert math.isnan(rank_correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])))
    assert math.isnan(rank_correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])))


@pytest.mark.parametrize("classes", [2, 4])
def test_a_probed_head_has_the_probabilities_of_the_logistic_regression(classes):
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(40, 6)), np.arange(40) % classes
    layer = nn.Linear(6, classes).double()
    probe(features, labels, layer, regression=False)
    found = layer(torch.from_numpy(features)).softmax(dim=1).detach().numpy()
    expected = LogisticRegression(max_iter=1000).fit(features, labels).predict_proba(features)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_kernels_are_those_of_the_whole_method_at_the_probed_head(tiny_model):
    """The kernel of the head alone is that of its features, with one for the bias; CKA of full with itself is 1."""
    run = RunConfig(model=str(tiny_model), n_train=20, n_validation=8, training=TrainingOptions(max_length=32))
    data = run.load("demo")
    methods = parse_methods(("full", "head", "lora:r=2", "vera"))
    found = kernels_of(run, data, methods, 5, seed=0)
    assert {name for name in found if name.startswith("kernel.")} == {f"kernel.{name}" for name in methods}
    model, tokenizer = load_classifier(str(tiny_model), num_labels=2, seed=0)
    seen = features_of(model, tokenizer, data, data.train, 32)
    assert seen is not None
    x = np.c_[seen[0][:5], np.ones(5)]
    expected = np.einsum("ip,jp,ab->ijab", x, x, np.eye(2))
    np.testing.assert_allclose(found["kernel.head"], expected, rtol=1e-4, atol=1e-5)
    layer = head_layer(model, 2)
    assert layer is not None
    probe(seen[0][5:], np.asarray(data.train["label"])[5:], layer, regression=False)  # On the other rows.
    np.testing.assert_allclose(found["outputs"], features_of(model, tokenizer, data, data.train, 32)[1][:5], atol=1e-5)


ADAPTERS = (
    "vera",
    "lora:r=2,use_dora=true",
    "ln_tuning",
    "loha:r=2",
    "oft",
    "lora:r=2",
    "propulsion",
    "bitfit",
    "full",
)


@pytest.mark.parametrize("text", ADAPTERS)
@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "moved"])
def test_the_kernel_of_an_adapted_model_is_that_of_its_gradients(text, moved, tiny_model):
    """In float64, beside one backward pass for each row and output over all that is trained."""
    model, tokenizer = load_classifier(str(tiny_model), num_labels=3, seed=0, dtype=torch.float64)
    adapted = apply_method(model, parse_methods((text,))[text], task_type="SEQ_CLS", seed=0).eval()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in trained:
                p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    inputs = tokenizer(["a good one", "bad", "no words like these at all"], padding=True, return_tensors="pt")
    kernel = kernel_when_trained(adapted, dict(inputs))
    assert kernel is not None
    outputs = adapted(**inputs).logits.flatten()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f, trained, retain_graph=True, allow_unused=True,
                                                            materialize_grads=True)])
        for f in outputs
    ]  # fmt: skip
    J = torch.stack(rows)
    expected = (J @ J.T).reshape(3, 3, 3, 3).transpose(1, 2)
    torch.testing.assert_close(kernel, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_an_own_pass_gives_the_kernel_of_the_shared_stream(tiny_model):
    run = RunConfig(model=str(tiny_model), n_train=20, n_validation=8, training=TrainingOptions(max_length=32))
    data = run.load("demo")
    for probed in (True, False):
        found = kernels_of(run, data, parse_methods(("ia3", "lora:r=2", "vera")), 5, seed=3, probed=probed)
        model, tokenizer = run.start(data, seed=3)
        if probed:
            seen, layer = features_of(model, tokenizer, data, data.train.select(range(5, 20)), 32), head_layer(model, 2)
            assert seen is not None
            assert layer is not None
            probe(seen[0], np.asarray(data.train["label"])[5:], layer, regression=False)
        for text in ("ia3", "lora:r=2", "vera"):
            adapted = apply_method(copy.deepcopy(model), parse_methods((text,))[text], task_type="SEQ_CLS", seed=3)
            own = kernel_when_trained(adapted, kernel_rows(run, data, tokenizer, 5))
            assert own is not None
            np.testing.assert_allclose(found[f"kernel.{text}"], own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


def test_virtual_tokens_have_no_kernel(tiny_model):
    run = RunConfig(model=str(tiny_model), n_train=20, n_validation=8, training=TrainingOptions(max_length=32))
    methods = parse_methods(("head", "prompt_tuning:num_virtual_tokens=2"))
    found = kernels_of(run, run.load("demo"), methods, 5, seed=0)
    assert {name for name in found if name.startswith("kernel.")} == {"kernel.head", "kernel.full"}


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_rows(tmp_path):
    path = tmp_path / "topics.csv"
    rows = [f"a sentence of number {i} about {['art', 'food', 'sport'][i % 3]},{i % 3 + 1}" for i in range(60)]
    path.write_text("text,topic\n" + "\n".join(rows) + "\n", encoding="utf-8")
    yield path
    OWN_TASKS.clear()


def config_of(tmp_path, own_rows, tiny_model, **options):
    training = TrainingOptions(max_steps=4, per_device_train_batch_size=8, max_length=32, learning_rate=0.01,
                               head_learning_rate=0.01)  # fmt: skip
    run = RunConfig(data_dir=own_rows, text_columns=("text",), label_column="topic", model=str(tiny_model),
                    training=training)  # fmt: skip
    defaults = {"candidates": ("full", "head", "propulsion:positions=query+value"), "n_examples": 4, "resamples": 20}
    return choose.Config(output_dir=tmp_path / "out", run=run, **(defaults | options))


def test_the_printed_command_trains_the_first_choice(tmp_path, own_rows, tiny_model, capsys, monkeypatch):
    result = choose.run(config_of(tmp_path, own_rows, tiny_model))
    assert result is not None
    ranking = result.tables["ranking"]
    assert [row["rank"] for row in ranking] == [1, 2, 3]
    assert {row["candidate"]: row["trains"] for row in ranking} == {
        "full": "all weights", "head": "the head alone", "propulsion:positions=query+value": "query, value",
    }  # fmt: skip
    assert all(0 <= row["near_best"] <= 1 and row["low"] <= row["score"] <= row["high"] for row in ranking)
    assert ranking[0]["score"] == max(row["score"] for row in ranking)
    assert len(result.arrays["labels"]) == 12  # A quarter of the 48 training rows.
    assert {row["predictor"] for row in result.tables["predictors"]} == set(choose.analysis.PREDICTORS)
    assert all(row["candidates"] == 3 for row in result.tables["predictors"] if row["predictor"] != "CKA with full")
    words = shlex.split(result.tables["advice"][0]["command"])
    assert words[:3] == ["python", "-m", "propulsion.train"]
    monkeypatch.chdir(tmp_path)
    trained = train_command.run(train_command.parse([*words[3:], "--disable-tqdm"]))
    assert trained.trained_parameters == ranking[0]["trained_parameters"]
    assert trained.steps == 4


def test_a_call_goes_on_where_another_one_stopped(tmp_path, own_rows, tiny_model):
    assert choose.run(config_of(tmp_path, own_rows, tiny_model, max_runs=2)) is None
    cells = sorted(path.name for path in (tmp_path / "out-runs").glob("*.json"))
    assert len(cells) == 2
    first = choose.run(config_of(tmp_path, own_rows, tiny_model))
    # More candidates, another budget and more resamples use the same cells.
    more = config_of(tmp_path, own_rows, tiny_model, candidates=("full", "head"), budget_minutes=30.0, resamples=30,
                     max_runs=0, n_examples=0)  # fmt: skip
    again = choose.run(more)
    assert first is not None
    assert again is not None
    scores = [{m.left: m.value for m in result.metrics} for result in (first, again)]
    assert all(scores[0][name] == value for name, value in scores[1].items())


def test_rounds_go_on_with_the_best_at_the_same_rates(tmp_path, own_rows, tiny_model, monkeypatch):
    monkeypatch.setattr(halving, "FEWEST_STEPS", 1)
    monkeypatch.setattr("analyses.choose.analysis.halving.plan", lambda *_, **__: [Rung(3, 1), Rung(2, 3)])
    result = choose.run(config_of(tmp_path, own_rows, tiny_model, n_examples=0))
    assert result is not None
    rounds = result.tables["rounds"]
    assert [row["steps"] for row in rounds] == [1, 1, 1, 3, 3]
    first = {row["candidate"]: (row["score"], row["loss"]) for row in rounds[:3]}
    assert [row["candidate"] for row in rounds[3:]] == halving.best(first, 2)
    assert {row["candidate"]: row["steps"] for row in result.tables["ranking"][:2]}.keys() == {
        row["candidate"] for row in rounds[3:]
    }
    assert "after 3 steps" in result.tables["advice"][0]["sentence"]


def test_a_method_that_does_not_go_with_the_model_is_left_out(tmp_path, own_rows, tiny_model):
    config = config_of(tmp_path, own_rows, tiny_model, candidates=("head", "full", "lora:target_modules=nothing+"),
                       n_examples=0)  # fmt: skip
    result = choose.run(config)
    assert result is not None
    assert [row["candidate"] for row in result.tables["left_out"]] == ["lora:target_modules=nothing+"]
    assert len(result.tables["ranking"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ("lorra",)}, r"unknown method 'lorra' \(did you mean lora"),
        ({"candidates": ("none",)}, "candidate none trains nothing"),
        ({"candidates": ()}, "there must be a method"),
        ({"candidates": ("lora:rr=2",)}, "has no option rr"),
        ({"budget_minutes": 0.0}, "budget_minutes must be above 0"),
        ({"budget_minutes": 1e-4}, "a budget of 0.0001 minutes is too small: candidates need about"),
    ],
)
def test_mistakes_are_one_line(tmp_path, own_rows, tiny_model, options, message):
    with pytest.raises(UserError, match=message) as caught:
        choose.run(config_of(tmp_path, own_rows, tiny_model, **options))
    assert "\n" not in str(caught.value)


def test_few_rows_are_refused(tmp_path, own_rows, tiny_model):
    lines = own_rows.read_text().splitlines()
    own_rows.write_text("\n".join(lines[:16]) + "\n")
    with pytest.raises(UserError, match="12 training rows are too few to choose by: give at least 16"):
        choose.run(config_of(tmp_path, own_rows, tiny_model))


def test_rates_are_given_by_role():
    assert numbers({"scale": 0.1, "head": 0.2}) == {"learning_rate": 0.1, "head_learning_rate": 0.2}
    assert numbers({"head": 0.2}) == {"learning_rate": 0.2, "head_learning_rate": 0.2}
    assert numbers({"adapter": 0.1}) == {"learning_rate": 0.1}
