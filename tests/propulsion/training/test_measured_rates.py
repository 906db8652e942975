"""Automatic learning rates: a step changes the loss by the stated share for any method; measuring changes nothing."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from propulsion import train as train_module
from propulsion.data import load_task_data, tokenize
from propulsion.data.kinds import kind_of
from propulsion.errors import UserError
from propulsion.methods import Method, apply_method
from propulsion.pretrained import load_classifier
from propulsion.train import TrainConfig, run
from propulsion.training import measured_rates
from propulsion.training.learning_rates import Rates, RoleRate, model_degree, parameter_groups, parameter_roles
from propulsion.training.measured_rates import LOOK, SHARE, SHARES, choose_rows, measured, with_measured
from propulsion.training.run_folder import RATES

AUTO = Rates("auto", "auto")


@pytest.fixture(scope="module")
def data():
    return load_task_data("demo", n_train=48, n_validation=8)


def adapted(folder, text):
    model, tokenizer = load_classifier(folder, num_labels=2)
    model.get_parameter("classifier.weight").data.mul_(30)  # So that the backbone affects the loss.
    return apply_method(model, Method.parse(text), task_type="SEQ_CLS"), tokenizer


def inputs(model, tokenizer, data):
    examples = tokenize(data.train, tokenizer, data.task, None)
    return examples, kind_of(data.task).collator(tokenizer, model)


def rates_of(folder, text, data, seed=0, rates=AUTO):
    model, tokenizer = adapted(folder, text)
    return with_measured(model, rates, *inputs(model, tokenizer, data), batch_size=8, seed=seed)


class Small(nn.Module):
    """A classifier of two layers whose first is trained fully, by a scale z^k, or by a product that starts at zero."""

    base_model_prefix = "body"

    def __init__(self, method):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self._method = nn.Linear(6, 16), nn.Linear(16, 2), method
        self.body.z = nn.Parameter(torch.ones(16))
        self.body.a, self.body.b = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.zeros(16, 3))
        own = {"all": {"weight", "bias"}, "scale": {"z"}, "product": {"a", "b"}}[method]
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name in own)

    def forward(self, x, labels):
        z, a, b = (self.body.get_parameter(name) for name in "zab")
        hidden = torch.tanh(self.body(x) * z**20 + x @ a.T @ b.T)
        logits = self.head(hidden)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def rows(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"x": (x := torch.randn(size, 6, generator=generator)), "labels": (x[:, 0] * x[:, 1] > 0).long()}
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("method", ["all", "scale", "product"])
def test_kept_gradients_change_no_rate(method, monkeypatch):
    """The rates are those of gradients that are computed anew for every rate tried, to the same bits."""
    counts, found = [], []
    compute = measured_rates._Probe.gradients

    def gradients(self, parameters, batch):
        counts[-1] += 1
        return compute(self, parameters, batch)

    monkeypatch.setattr(measured_rates._Probe, "gradients", gradients)
    for size in (measured_rates._KEPT_BYTES, 0):
        monkeypatch.setattr(measured_rates, "_KEPT_BYTES", size)
        counts.append(0)
        found.append(measured(Small(method), AUTO, rows(4, 16), rows(8, 1, seed=1)))
    assert found[0] == found[1]
    assert counts[0] < counts[1]


@pytest.mark.parametrize("method", ["all", "scale", "product"])
def test_a_step_changes_the_loss_by_the_stated_share(method):
    model = Small(method)
    found = measured(model, AUTO, rows(4, 16), rows(8, 1, seed=1))
    assert found.keys() == {"weight", "head"}
    assert all("to first order" not in rate.reason for rate in found.values())
    (others,) = rows(1, 200, seed=2)
    for role, rate in found.items():
        trained = Small(method)
        chosen = (
            trained.head.parameters() if role == "head" else [p for p in trained.body.parameters() if p.requires_grad]
        )
        optimizer, changes = torch.optim.Adam(chosen, lr=rate.rate), []
        for batch in rows(1 + LOOK * ("past the first" in rate.reason), 16, seed=3):
            before = trained(**others).logits.detach()
            trained.zero_grad()
            trained(**batch).loss.backward()
            optimizer.step()
            moved = trained(**others).logits.detach() - before
            first, second = (nn.functional.cross_entropy(outputs, others["labels"], reduction="none")
                             for outputs in (before, before + moved - moved.mean(dim=0)))  # fmt: skip
            changes.append(float((second - first).abs().mean() / first.mean()))
        share = SHARES.get(role, SHARE)
        assert share / 3 < max(changes) < share * 3


@pytest.mark.parametrize(("text", "later"), [("lora:r=2", True), ("vera:r=4", True), ("ia3", False), ("full", False)])
def test_a_product_of_zero_is_known_by_its_gradients(tiny_models, data, text, later):
    found = rates_of(tiny_models["SEQ_CLS"], text, data).measured
    (body,) = (rate for role, rate in found.items() if role != "head")
    assert ("past the first" in body.reason) == later


class Product(nn.Module):
    """A method of no library: x (u v) with u = 0, and a bias that has no effect on the output."""

    def __init__(self, start):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.full((4, 3), start)), nn.Parameter(torch.ones(3, 1))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x, labels):
        return SimpleNamespace(loss=((x @ self.u @ self.v)[:, 0] - labels).square().mean())


@pytest.mark.parametrize(("start", "later"), [(0.0, True), (1e-7, True), (0.1, False)])
def test_a_product_of_zero_of_no_library(start, later):
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(n, 4, generator=generator), "labels": torch.randn(n, generator=generator)}
               for n in (8, 8, 8, 8, 1, 1, 1)]  # fmt: skip
    found = measured(Product(start), AUTO, batches[:4], batches[4:])
    assert ("past the first" in found["weight"].reason) == later


class Regression(nn.Module):
    """A regression with labels far from the outputs; a bias shifts all outputs, a weight spreads them."""

    def __init__(self, text):
        super().__init__()
        self.weight, self.bias, self._text = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.zeros(1)), text

    def forward(self, x, labels):
        logits = nn.functional.linear(x, self.weight, self.bias)
        found = {"loss": (logits[:, 0] - labels).square().mean()} | (
            {"logits": logits} if self._text == "logits" else {}
        )
        return SimpleNamespace(**found)


def test_a_shift_of_all_outputs_is_left_out():
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(n, 4, generator=generator), "labels": 100 + torch.randn(n, generator=generator)}
               for n in (8, 8, 8, 8, *[1] * 8)]  # fmt: skip
    rates = [measured(Regression(text), AUTO, batches[:4], batches[4:])["weight"].rate for text in ("logits", "")]
    assert rates[0] > rates[1]


def test_rates_follow_the_degree(tiny_models, data):
    rates = [rates_of(tiny_models["SEQ_CLS"], f"propulsion:degree={k}", data).measured["scale"].rate for k in (2, 20)]
    assert rates[0] / rates[1] == pytest.approx(10, rel=0.2)


def test_the_same_arguments_give_the_same_rates_and_leave_all_as_it_was(tiny_models, data):
    model, tokenizer = adapted(tiny_models["SEQ_CLS"], "lora:r=2")
    model.train()
    next(iter(model.modules())).training = False  # Each module's mode is restored.
    modes = [module.training for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    before, grads = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    examples, collator = inputs(model, tokenizer, data)
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state(legacy=False)  # noqa: NPY002
    found = [with_measured(model, AUTO, examples, collator, batch_size=8, seed=3) for _ in range(2)]
    assert found[0] == found[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(trained[0].grad, torch.ones_like(trained[0]))
    assert all(p.grad is None for p in trained[1:])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state(legacy=False)) == str(states[1])  # noqa: NPY002
    assert with_measured(model, AUTO, examples, collator, batch_size=8, seed=4) != found[0]


def test_a_number_wins_and_a_factor_multiplies_the_rest(tiny_models, data):
    model, tokenizer = adapted(tiny_models["SEQ_CLS"], "propulsion:degree=3")
    examples, collator = inputs(model, tokenizer, data)
    found = with_measured(model, Rates(0.5, "auto", 3.0), examples, collator, batch_size=8, seed=0)
    assert found.measured.keys() == {"head"}
    groups = {group["role"]: group["lr"] for group in parameter_groups(model, rates=found, weight_decay=0)}
    assert groups == {"scale": 0.5, "head": 3 * found.measured["head"].rate}
    assert found.of("head", model_degree(model)).reason.endswith("times 3")
    fixed = Rates(None, None)
    assert with_measured(model, fixed, examples, collator, batch_size=8, seed=0) is fixed
    with pytest.raises(ValueError, match="was not measured"):
        parameter_groups(model, rates=AUTO, weight_decay=0)


class Constant(nn.Module):
    """A model whose loss does not depend on its parameter, or is not finite."""

    def __init__(self, loss):
        super().__init__()
        self.weight, self._loss = nn.Parameter(torch.ones(2)), loss

    def forward(self, x):
        return SimpleNamespace(loss=(self.weight.sum() * 0 + x.sum()) * self._loss)


@pytest.mark.parametrize("loss", [1.0, float("nan"), 0.0])
def test_what_cannot_be_measured_has_the_fixed_rate_and_says_so(loss):
    (found,) = measured(Constant(loss), AUTO, [{"x": torch.ones(1)}], [{"x": torch.ones(1)}]).values()
    assert found.rate == 1e-4
    assert "zero or not finite" in found.reason


def test_prompts_are_no_head(tiny_models):
    for text in ("prompt_tuning", "prefix_tuning", "p_tuning"):
        model, _ = adapted(tiny_models["SEQ_CLS"], text)
        roles = parameter_roles(model)
        found = {name: roles[name] for name, p in model.named_parameters() if p.requires_grad}
        assert {role for name, role in found.items() if "classifier" in name} == {"head"}
        assert {role for name, role in found.items() if "classifier" not in name} == {"adapter"}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 40, 500])
def test_rows_of_their_own_as_far_as_there_are_rows(count):
    batches, fresh = choose_rows(count, 16, 0)
    assert fresh
    assert all(batches)
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    assert {*rows, *fresh} <= set(range(count))
    assert count == 1 or not set(rows) & set(fresh)
    assert all(len(batch) <= 16 for batch in batches)


@pytest.fixture
def config(tiny_models, tmp_path):
    return TrainConfig(
        model=str(tiny_models["SEQ_CLS"]), degree=3, max_steps=4, max_train_samples=16, max_eval_samples=10,
        save_steps=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, output_dir=tmp_path / "run",
    )  # fmt: skip


def test_a_resumed_run_reads_its_rates(config, monkeypatch, capsys):
    class Stopped(Exception):
        pass

    def stop(trainer):
        raise Stopped

    monkeypatch.setattr(
        train_module.TaskTrainer, "check_finite", lambda trainer: trainer.state.global_step < 4 or stop(trainer)
    )
    with pytest.raises(Stopped):
        run(config)
    monkeypatch.undo()
    assert "automatic: a step changes" in capsys.readouterr().out
    kept = (config.output_dir / RATES).read_text()

    def again(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(train_module, "with_measured", again)
    result = run(config)
    monkeypatch.undo()
    assert (config.output_dir / RATES).read_text() == kept
    whole = run(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))
    assert result.learning_rates == whole.learning_rates
    assert result.rate_reasons == whole.rate_reasons
    assert "automatic" in result.rate_reasons["head"]
    assert result.metrics == whole.metrics


def test_a_checkpoint_without_its_rates_is_refused(config):
    run(dataclasses.replace(config, max_steps=4))
    (config.output_dir / RATES).unlink()
    (config.output_dir / "result.json").unlink()
    with pytest.raises(UserError, match="not the learning rates it was trained at"):
        run(config)


def test_rates_round_trip():
    rate = RoleRate(0.1, "why")
    assert RoleRate(**dataclasses.asdict(rate)) == rate
