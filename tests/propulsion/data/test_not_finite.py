"""Outputs that are not finite are refused, and never scored as if they were predictions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from task_rows import write_rows
from torch import nn
from transformers import AutoTokenizer

from propulsion.data import load_task_data
from propulsion.data.kinds import Limits, kind_of
from propulsion.data.kinds.base import columns_of, run_batches
from propulsion.data.metrics import METRICS
from propulsion.errors import UserError
from propulsion.pretrained import load_model

MATRIX = {"bert": "encoder.layer.0.output.dense.bias", "bart": "encoder.layers.0.fc1.bias",
          "llama": "layers.0.mlp.up_proj.weight"}  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("task", ["rte", "stsb", "wikiann", "squad", "xsum", "boolq"])
def test_every_kind_of_task_refuses_them(task, value, tiny_models, tmp_path):
    data = load_task_data(task, data_dir=write_rows(tmp_path, task))
    kind = kind_of(data.task)
    model, tokenizer = load_model(
        tiny_models[kind.task_type], task_type=kind.task_type, num_labels=data.task.num_labels
    )
    name = next(name for name, _ in model.named_parameters() if name.endswith(MATRIX[model.config.model_type]))
    model.get_parameter(name).data.fill_(value)
    limits = Limits(max_length=60, max_target_length=4)
    with pytest.raises(UserError, match=f"outputs are not finite for .*; {name} holds values that are not finite"):
        kind.predict(model, tokenizer, data.task, columns_of(data.validation), limits)
    assert not model.training


class Outputs(nn.Module):
    """A model with given outputs."""

    device = torch.device("cpu")

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, **batch):
        return SimpleNamespace(logits=self.values)


def test_outputs_at_padding_may_have_any_value(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoded = {"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]]}
    padded = Outputs(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]))
    rows = run_batches(padded, tokenizer, encoded, 2, ("logits",), by_token=True)
    assert [row[0][0].item() for row in rows] == [1.0, 3.0]
    with pytest.raises(UserError, match=r"not finite for example 2, .* its activations overflow"):
        run_batches(padded, tokenizer, encoded, 2, ("logits",))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("wrong", ["predictions", "labels"])
def test_metrics_refuse_them(name, wrong):
    values = {"predictions": np.array([0.0, 1.0, 1.0]), "labels": np.array([0.0, 1.0, 0.0])}
    values[wrong][1] = np.nan
    with pytest.raises(UserError, match=f"{name} needs finite {wrong}: 1 of 3 are not, the first at index 1"):
        METRICS[name](**values)
