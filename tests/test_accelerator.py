"""Kernels, scale vectors, training and analyses give the same on a GPU as on a CPU; skipped without a GPU."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FAMILIES, batch_for, classifier, relative_error
from peft import get_peft_model
from safetensors.torch import load_file

import ntk
from analyses import kernel_distance, kernel_drift, linearized_prediction, peft_kernels, spectrum
from analyses.memory import Config as MemoryConfig
from analyses.memory import run as measure_memory
from analyses.subjects.training_run import RunConfig, training_run
from benchmarks.jobs import ADAPTERS
from propulsion import PropulsionConfig
from propulsion.data import load_task_data
from propulsion.methods import Method
from propulsion.train import TrainConfig
from propulsion.train import run as train_run
from propulsion.training import TrainingOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

EXACT = 1e-10
# Only the order of sums may differ: float32 matrix products must not be rounded to TF32.
FLOAT32 = 1e-4
# Tolerance for float64 models that compute their softmax, norms or rotary angles in float32.
ROUNDED = 1e-5
FLOAT64 = ("bert", "roberta", "gpt2", "distilbert", "electra", "albert", "deberta-v2", "bart")
"""Families that compute in float64 throughout."""
METHODS = ("full", "propulsion:positions=all", "lora", "ia3", "bitfit", "head")


def moved(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


# --- kernels ----------------------------------------------------------------------------------------------------------


def across(family):
    """The relative difference of two devices' results."""
    return EXACT if family in FLOAT64 else ROUNDED


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_of_every_family(family):
    model, inputs = classifier(family).eval(), batch_for(family)
    expected = ntk.empirical_ntk(model, inputs, method="jacobian")
    model = model.cuda()
    reference, fast = (ntk.empirical_ntk(model, moved(inputs), method=m) for m in ("jacobian", "structured"))
    assert fast.is_cuda
    assert relative_error(fast, reference) <= EXACT
    assert relative_error(reference.cpu(), expected) <= across(family)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_kernels_of_all_methods(family):
    model, inputs = classifier(family).eval(), batch_for(family)
    every = ADAPTERS if family == "bert" else {}
    methods = {**every, "LoRA": ntk.adapters.LoRA(rank=2), "DoRA": ntk.adapters.DoRA(rank=2, seed=1),
               "Propulsion, k = 15": ntk.adapters.Propulsion(degree=15), "BitFit": ntk.adapters.BitFit(),
               "subset": ntk.adapters.RandomSubset(count=16)}  # fmt: skip
    if family == "llama":  # This model has no biases.
        del methods["BitFit"]
    expected = ntk.adapter_kernels(model, inputs, methods)
    found = ntk.adapter_kernels(model.cuda(), moved(inputs), methods)
    for name in methods:
        assert relative_error(found[name].cpu(), expected[name]) <= across(family), name


def test_float32_is_not_rounded_further():
    model, inputs = classifier("bert").eval(), batch_for("bert")
    expected = ntk.empirical_ntk(model, inputs, method="jacobian")
    found = ntk.empirical_ntk(model.float().cuda(), moved(inputs), method="structured")
    assert found.dtype == torch.float32
    assert relative_error(found.cpu().double(), expected) <= FLOAT32


def test_inputs_left_on_the_processor_are_named():
    with pytest.raises(ValueError, match="expected inputs on the model's device, cuda:0; input_ids is on cpu"):
        ntk.empirical_ntk(classifier("bert").cuda(), batch_for("bert"))


# --- scale vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_outputs_gradients_and_merging(family, lean):
    model = get_peft_model(classifier(family), PropulsionConfig(degree=3, lean=lean, init_value=1.1)).train(False)
    inputs, found = batch_for(family), []
    for on in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(on)
        logits = twin(**{name: value.to(on) for name, value in inputs.items()}).logits
        logits.square().sum().backward()
        gradients = [p.grad.cpu() for p in twin.parameters() if p.grad is not None]
        merged = twin.merge_and_unload()(**{name: value.to(on) for name, value in inputs.items()}).logits
        found.append([logits.cpu(), merged.cpu(), *gradients])
    rtol = 10 * across(family)  # This is the error of single entries, not of a norm.
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.1 * rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_float32_over_narrow_weights(dtype):
    model = get_peft_model(classifier("bert").to(dtype), PropulsionConfig(degree=15)).cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(**moved(batch_for("bert"))).logits.float().square().mean().backward()
        optimizer.step()
    scales = [p for name, p in model.named_parameters() if "propulsion_z" in name]
    assert {p.dtype for p in scales} == {torch.float32}
    assert all(p.isfinite().all() for p in scales)
    assert any((p != 1).any() for p in scales)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_on_a_processor(tiny_model, method, bf16):
    """A few steps from the same start; since dropout draws other numbers on a GPU, only the first loss is compared."""
    data = load_task_data("demo", n_train=16, n_validation=8)
    training = TrainingOptions(max_steps=6, per_device_train_batch_size=4, max_length=32, learning_rate=1e-3, bf16=bf16)
    runs = [
        training_run(RunConfig(model=str(tiny_model), training=training, device=device), data, Method.parse(method),
                     seed=0, keep_model=True)
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert runs[1]["model"].device.type == "cuda"
    assert runs[0]["trained_parameters"] == runs[1]["trained_parameters"]
    assert np.isfinite(runs[1]["losses"]).all()
    assert runs[1]["losses"][0] == pytest.approx(runs[0]["losses"][0], rel=0.2)
    assert runs[1]["peak_bytes"] > sum(p.nbytes for p in runs[1]["model"].parameters())


@pytest.fixture
def config(tiny_model, tmp_path):
    return TrainConfig(
        model=str(tiny_model), max_steps=12, max_train_samples=16, max_eval_samples=10, save_steps=4,
        per_device_train_batch_size=4, eval_strategy="steps", eval_steps=4, disable_tqdm=True, learning_rate=0.01,
        output_dir=tmp_path / "run",
    )  # fmt: skip


class Killed(BaseException):
    """An exception that no code catches."""


@pytest.mark.parametrize("bf16", [False, True])
def test_a_killed_run_goes_on_to_the_same_weights(config, bf16, monkeypatch):
    config = dataclasses.replace(config, bf16=bf16)
    whole = dataclasses.replace(config, output_dir=config.output_dir.with_name("whole"))
    train_run(whole)
    rename, calls = os.rename, []

    def kill(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # The second checkpoint is complete, but not renamed yet.
            raise Killed
        return rename(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill)
        with pytest.raises(Killed):
            train_run(config)
    assert (config.output_dir / "checkpoint-4").is_dir()
    train_run(config)
    found, expected = (load_file(c.output_dir / "model" / "adapter_model.safetensors") for c in (config, whole))
    for name, value in expected.items():  # Sums on a GPU may have another order each time.
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("option", ["--bf16", "--torch-compile"])
def test_the_command(config, option):
    words = ["--model", config.model, "--max-steps", "4", "--max-train-samples", "16", "--max-eval-samples", "10",
             "--output-dir", str(config.output_dir), "--disable-tqdm", option]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "propulsion.train", *words], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1], check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((config.output_dir / "result.json").read_text())["steps"] == 4


# --- analyses ---------------------------------------------------------------------------------------------------------


def numbers(result):
    return {(m.name, m.stage, m.left, m.right): m.value for m in result.metrics}


def compare(module, config, rel):
    """Run an analysis on both devices, and compare all results of its kernels."""
    results = [module.run(dataclasses.replace(config, device=device)) for device in ("cpu", "cuda")]
    expected, found = map(numbers, results)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if np.isfinite(value):
            assert found[key] == pytest.approx(value, rel=rel, abs=rel), key


def test_kernels_of_methods_before_training(tiny_model, tmp_path):
    compare(peft_kernels, peft_kernels.Config(
        model=str(tiny_model), n_examples=6, top=2, null_draws=2, resamples=5, seeds=(3,), dtype="float64",
        output_dir=tmp_path / "result",
    ), 1e-6)  # fmt: skip


def test_spectra(tiny_model, tmp_path):
    compare(spectrum, spectrum.Config(model=str(tiny_model), n_examples=6, dtype="float64",
                                      output_dir=tmp_path / "result"), 1e-6)  # fmt: skip


def test_analyses_that_train(tiny_model, tmp_path):
    training = TrainingOptions(max_steps=4, per_device_train_batch_size=4, max_length=32, learning_rate=0.01)
    runs = RunConfig(model=str(tiny_model), n_train=16, n_validation=12, training=training, device="cuda")
    distance = kernel_distance.run(kernel_distance.Config(
        model=str(tiny_model), n_examples=6, resamples=5, device="cuda", training=training,
        output_dir=tmp_path / "distance",
    ))  # fmt: skip
    drift = kernel_drift.run(kernel_drift.Config(
        seeds=(0,), n_examples=6, n_jacobians=3, width=8, resamples=10, checkpoints=(0.4,), run=runs,
        output_dir=tmp_path / "drift",
    ))  # fmt: skip
    predicted = linearized_prediction.run(linearized_prediction.Config(
        model=str(tiny_model), sizes=(8,), n_test=6, seeds=(0,), device="cuda", training=training,
        output_dir=tmp_path / "predicted",
    ))  # fmt: skip
    for result in (distance, drift, predicted):
        assert result is not None
        assert any(np.isfinite(metric.value) for metric in result.metrics)


def test_memory_is_the_accelerators(tiny_model):
    run = RunConfig(model=str(tiny_model), n_train=16, n_validation=8, device="cuda",
                    training=TrainingOptions(max_steps=6, per_device_train_batch_size=4, max_length=32))  # fmt: skip
    result = measure_memory(MemoryConfig(methods=("full", "bitfit"), rounds=1, run=run))
    full, bitfit = result.tables["methods"]
    assert full["over_model_bytes"] > bitfit["over_model_bytes"] > 0
    assert full["peak_bytes"] < 200e6  # The memory of the whole process would be larger.
