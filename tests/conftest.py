"""Shared by all tests: helpers on the import path, one thread for each worker, and no network."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from typecheck import check_shapes_where_there_are_any

check_shapes_where_there_are_any()

# Workers share few cores, so more threads would only slow them down. One thread also fixes the order of sums.
torch.set_num_threads(1)


def pytest_collection_finish():
    """Freeze imported objects: transformers collects garbage at every training, which would go through all of them."""
    gc.freeze()


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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenized rows are cached in a folder of the test run."""
    from datasets import config as datasets_config

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_models(tiny_model, tmp_path_factory):
    """Folders of tiny random models without a head and without dropout, by peft's name of the task."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    encoder = hf.BertModel(
        hf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                      max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    )  # fmt: skip
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    encoder_decoder = hf.BartForConditionalGeneration(
        hf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
                      dropout=0.0, decoder_start_token_id=tokenizer.sep_token_id, forced_eos_token_id=None,
                      **sizes, **ends)
    )  # fmt: skip
    decoder = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                       intermediate_size=32, max_position_embeddings=128, **sizes, **ends)
    )  # fmt: skip
    folders = {}
    for name, model in {"encoder": encoder, "encoder_decoder": encoder_decoder, "decoder": decoder}.items():
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.01)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        if name == "decoder":
            tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(folders[name])
    heads = dict.fromkeys(("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"), folders["encoder"])
    return {**heads, "SEQ_2_SEQ_LM": folders["encoder_decoder"], "CAUSAL_LM": folders["decoder"]}


@pytest.fixture(scope="session")
def tiny_decoder(tiny_models):
    """The folder of a tiny random Llama."""
    return tiny_models["CAUSAL_LM"]
