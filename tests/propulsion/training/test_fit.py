"""Training: reproducible bit for bit, changes only the trained parameters, stops at the first infinite loss."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from propulsion.data import load_task_data
from propulsion.errors import UserError
from propulsion.methods import Method, apply_method
from propulsion.pretrained import load_classifier
from propulsion.training import TrainingOptions, apply_propulsion, evaluate, predict, train
from propulsion.training.learning_rates import HEAD_RATE, SCALE_RATE

CONFIG = TrainingOptions(
    max_steps=4, per_device_train_batch_size=4, seed=1, learning_rate=None, head_learning_rate=None
)


@pytest.fixture(scope="module")
def data():
    return load_task_data("demo", n_train=12, n_validation=10)


def load(folder, *, propulsion=True, num_labels=2):
    model, tokenizer = load_classifier(folder, num_labels=num_labels)
    return (apply_propulsion(model, degree=3) if propulsion else model), tokenizer


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("propulsion", [True, False])
def test_the_same_seed_gives_bit_equal_weights(tiny_model, data, propulsion):
    runs = []
    for disturb in (0, 1):
        model, tokenizer = load(tiny_model, propulsion=propulsion)
        torch.manual_seed(disturb)
        losses = train(model, tokenizer, data, CONFIG, progress=False).losses
        runs.append((losses, snapshot(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, runs[1][1][name]) for name, p in runs[0][1].items())


def test_another_seed_gives_other_weights(tiny_model, data):
    weights = []
    for seed in (1, 2):
        model, tokenizer = load(tiny_model)
        train(model, tokenizer, data, replace(CONFIG, max_steps=2, seed=seed), progress=False)
        weights.append(snapshot(model))
    assert any(not torch.equal(p, weights[1][name]) for name, p in weights[0].items())


@pytest.mark.parametrize("method", ["p_tuning", "prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_leave_less_room_for_texts(tiny_model, data, method):
    def prompted(count):
        model, tokenizer = load_classifier(tiny_model, num_labels=2)
        chosen = Method(method, {"num_virtual_tokens": count})
        return apply_method(model, chosen, task_type="SEQ_CLS"), tokenizer

    model, tokenizer = prompted(1)
    texts = [*data.train["sentence"], *data.validation["sentence"]]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    room = tokenizer.model_max_length - longest
    model, tokenizer = prompted(room)
    assert len(train(model, tokenizer, data, CONFIG, progress=False).losses) == 4
    assert len(predict(model, tokenizer, data)) == 10
    model, tokenizer = prompted(room + 1)
    with pytest.raises(UserError, match=f"longer than the model's limit of {longest - 1} tokens"):
        train(model, tokenizer, data, CONFIG, progress=False)
    shorter = replace(CONFIG, max_length=longest - 1)
    assert len(train(model, tokenizer, data, shorter, progress=False).losses) == 4
    model, tokenizer = prompted(tokenizer.model_max_length)
    with pytest.raises(UserError, match="virtual tokens leave no room for texts"):
        train(model, tokenizer, data, CONFIG, progress=False)


def test_only_scales_and_head_move(tiny_model, data):
    model, tokenizer = load(tiny_model)
    before = snapshot(model)
    result = train(model, tokenizer, data, CONFIG, progress=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trainable
    assert all("propulsion_z" in name or "classifier" in name for name in moved)
    assert result.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result.learning_rates == {"scale": SCALE_RATE / 3, "head": HEAD_RATE}
    assert len(result.losses) == CONFIG.max_steps
    assert all(p.grad is None for p in model.parameters())


def test_loss_falls(tiny_model, data):
    model, tokenizer = load(tiny_model, propulsion=False)
    options = TrainingOptions(max_steps=40, per_device_train_batch_size=12, learning_rate=1e-2)
    result = train(model, tokenizer, data, options, progress=False)
    assert np.mean(result.losses[-5:]) < 0.5 * np.mean(result.losses[:5])


class Watch(TrainerCallback):
    """Calls the model after every step, as analyses do that measure during training."""

    def __init__(self, model):
        self.model, self.dtypes = model, set()

    def on_step_end(self, *args, **kwargs):
        inner = []
        layer = next(m for name, m in self.model.named_modules() if name.endswith("query"))
        hook = layer.register_forward_hook(lambda _module, _inputs, output: inner.append(output.dtype))
        with torch.no_grad():
            self.model(input_ids=torch.ones(1, 3, dtype=torch.long))
        hook.remove()
        self.dtypes |= set(inner)


@pytest.mark.parametrize("propulsion", [True, False])
def test_mixed_precision_trains_in_bfloat16_and_leaves_nothing_of_it(tiny_model, data, propulsion):
    outcomes = {}
    for run, bf16 in (("before", False), ("mixed", True), ("after", False)):
        model, tokenizer = load(tiny_model, propulsion=propulsion)
        watch = Watch(model)
        result = train(model, tokenizer, data, replace(CONFIG, bf16=bf16), progress=False, callbacks=[watch])
        outcomes[run] = (result.losses, snapshot(model), predict(model, tokenizer, data))
        assert watch.dtypes == {torch.float32}
    mixed, (losses, weights, _) = outcomes["mixed"], outcomes["before"]
    assert mixed[0] != losses
    # An operation in bfloat16 has a relative rounding error of 2**-9; this allows 32 of them in one direction.
    np.testing.assert_allclose(mixed[0], losses, rtol=2**-4)
    assert all(p.dtype == torch.float32 for p in mixed[1].values())
    # Later training and every later use of the model are in full precision.
    assert outcomes["after"][0] == losses
    assert all(torch.equal(p, weights[name]) for name, p in outcomes["after"][1].items())
    fresh, tokenizer = load(tiny_model, propulsion=propulsion)
    fresh.load_state_dict(mixed[1], strict=False)
    assert torch.equal(predict(fresh, tokenizer, data), mixed[2])


def test_regression(tiny_model, tmp_path):
    rows = "".join(f'{{"sentence1": "{w}", "sentence2": "a", "label": {i}}}\n' for i, w in enumerate("abcdef"))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    pairs = load_task_data("stsb", data_dir=tmp_path)
    with pytest.warns(UserWarning, match="has another size"):
        model, tokenizer = load(tiny_model, num_labels=1)
    result = train(model, tokenizer, pairs, CONFIG, progress=False)
    outputs = predict(model, tokenizer, pairs)
    assert outputs.shape == (6, 1)
    assert evaluate(model, tokenizer, pairs).keys() == {"pearson", "spearman"}
    # The first loss is the mean square of one batch of the labels 0 to 5 against outputs near 0.
    assert 0.5 < result.losses[0] < 25


def test_divergence_is_one_line(tiny_model, data):
    model, tokenizer = load(tiny_model)
    config = TrainingOptions(max_steps=6, per_device_train_batch_size=4, learning_rate=1e30, warmup_steps=0.0)
    with pytest.raises(UserError, match=r"training diverged: .*lower the learning rate") as caught:
        train(model, tokenizer, data, config, progress=False)
    assert "\n" not in str(caught.value)


def test_nothing_to_train(tiny_model, data):
    model, tokenizer = load(tiny_model, propulsion=False)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        train(model, tokenizer, data, CONFIG, progress=False)


@pytest.mark.parametrize("mode", [True, False])
def test_random_states_mode_and_folder_are_left_as_they_were(tiny_model, data, tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load(tiny_model)
    model.train(mode)

    # Python's own generator is not compared, since the type checker of the test run draws from it.
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = states()
    train(model, tokenizer, data, CONFIG, progress=False)
    predict(model, tokenizer, data)
    assert states() == before
    assert model.training == mode
    assert os.listdir() == []


def test_predictions_do_not_depend_on_the_batch(tiny_model, data):
    model, tokenizer = load(tiny_model)
    whole = predict(model, tokenizer, data)
    assert whole.shape == (10, 2)
    for size in (1, 3):
        torch.testing.assert_close(predict(model, tokenizer, data, batch_size=size), whole, rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_the_predictions(tiny_model, data):
    model, tokenizer = load(tiny_model)
    guesses = predict(model, tokenizer, data).argmax(dim=1).numpy()
    assert evaluate(model, tokenizer, data) == {"accuracy": np.mean(guesses == np.array(data.validation["label"]))}


@pytest.mark.parametrize(
    "mistake",
    [
        {"max_steps": 0},
        {"per_device_train_batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"head_learning_rate": -1.0},
        {"warmup_steps": -0.1},
        {"lr_scheduler_type": "straight"},
        {"rate_multiplier": 0.0},
        {"weight_decay": -0.1},
        {"max_grad_norm": -1.0},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_configurations_out_of_range(mistake):
    (name,) = mistake
    with pytest.raises(UserError, match=f"{name} is .*, expected"):
        TrainingOptions(**mistake)


@pytest.mark.parametrize(
    ("degree", "positions", "message"),
    [(0, ("all",), "degree"), (float("nan"), ("all",), "degree"), (1, ("nowhere",), "nowhere")],
)
def test_propulsion_that_cannot_be_applied(tiny_model, degree, positions, message):
    model, _ = load_classifier(tiny_model, num_labels=2)
    with pytest.raises(UserError, match=message) as caught:
        apply_propulsion(model, degree=degree, positions=positions)
    assert "\n" not in str(caught.value)
