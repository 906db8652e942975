"""Tiny models of random weights under the names by which peft's test-suite loads them from the hub."""

import sys
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "vocab_size": 1000, "max_position_embeddings": 512, **SPECIAL}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "n_positions": 512, **SPECIAL}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 1000,
        "max_position_embeddings": 512, "decoder_start_token_id": 2, **SPECIAL}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 1000,
      "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)),
    "hf-internal-testing/tiny-random-gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES, num_key_value_heads=2)
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**SIZES, num_key_value_heads=2)
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=8, num_key_value_heads=2)
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5)
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**BART)
    ),
    "peft-internal-testing/tiny-random-BertModel": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: hf.DebertaModel(hf.DebertaConfig(**SIZES)),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**SIZES)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**SIZES)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**SIZES)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**SIZES)
    ),
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of words with the ids of <pad>, <s>, </s>, <unk>, then other words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(996))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def main(folder: Path) -> None:
    """Save all models."""
    words = tokenizer()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    (folder / "complete").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
