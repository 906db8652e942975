"""lora_law on a tiny model: the stored law and draws are those computed directly, and what is missed is named."""

from dataclasses import replace

import pytest
import torch

import ntk
from analyses.lora_law import ANALYSIS, Config, missed, run, summary
from analyses.subjects.batch import held_out
from analyses.subjects.readout import Readout
from ntk.adapters import LoRA
from ntk.low_rank_law import UNIFORM
from propulsion.data import load_task_data
from propulsion.pretrained import load_classifier


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    return Config(
        model=str(tiny_model), n_examples=6, ranks=(1, 16), draws=3, seeds=(3,), dtype="float64",
        readout=Readout(pooling="mean"), output_dir=tmp_path_factory.mktemp("lora_law") / "result",
    )  # fmt: skip


def test_every_number_is_that_of_the_kernels(config):
    result = run(config)
    model, tokenizer = load_classifier(config.model, num_labels=2, pooling="mean", seed=3, dtype=torch.float64)
    inputs, _ = held_out(load_task_data("demo"), tokenizer, 6, 3)
    layers = {k: p.full for k, p in ntk.decomposition(model, inputs).items() if p.full.any()}
    jacobians = {}
    for layer in layers:  # formed gradients, one example at a time
        module, rows = model.get_submodule(layer), []
        for i in range(6):
            logits = model(**{key: value[i : i + 1] for key, value in inputs.items()}).logits[0]
            rows.append(torch.stack([torch.autograd.grad(one, module.weight, retain_graph=True)[0] for one in logits]))
        jacobians[layer] = torch.stack(rows)
    law = ntk.lora_law(
        list(jacobians.values()), weights=[1 / J.shape[-1] for J in jacobians.values()], excess_kurtosis=UNIFORM
    )
    (stored,) = result.tables["laws"]
    assert [stored[field] for field in ("limit", "constant", "size")] == pytest.approx(
        [law.limit, law.constant, law.size], rel=1e-6
    )
    full = ntk.reduce_outputs(sum(layers.values()), "trace")
    for row in result.tables["ranks"]:
        drawn = ntk.adapter_kernels(
            model, inputs,
            {str(i): LoRA(rank=row["rank"], modules=frozenset(layers).__contains__, seed=i) for i in range(3)},
            reduce="trace",
        )  # fmt: skip
        values = [ntk.cka(full, kernel) for kernel in drawn.values()]
        assert row["low"] < row["measured"] < row["high"]
        assert min(values) <= row["measured"] <= max(values)
        assert row["predicted"] == pytest.approx(law.cka(row["rank"]))
        assert row["error"] == pytest.approx(row["predicted"] - row["measured"])
    assert f"{law.constant:.1f}"[:2] in summary(result)


def test_what_is_missed_is_named(config, tmp_path):
    assert missed([{"rank": 1, "error": -0.03}, {"rank": 2, "error": 0.019}, {"rank": 4, "error": 0.021}]) == [1, 4]
    result = run(replace(config, draws=1, output_dir=tmp_path / "result"))
    assert result.tables["ranks"][0]["low"] is None
    result.tables["ranks"][0]["error"], result.tables["ranks"][1]["error"] = 0.0, 0.01
    assert ANALYSIS.finding(result) == "The law is within 0.02 at every rank; the largest error is 0.010."
    result.tables["ranks"][0]["error"] = -0.5
    assert ANALYSIS.finding(result).startswith("The law is more than 0.02 off at rank 1; the largest error is 0.500")
