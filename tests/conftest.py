"""Shared by all tests: helpers on the path, one thread per worker, and no look at the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# Workers run side by side on few cores: threads of their own would only contend. It also fixes summation order.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a one-layer random BERT that takes 64 tokens, and the demo model's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from propulsion.pretrained import default_model_folder

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                   vocab_size=len(tokenizer), max_position_embeddings=64)
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder
