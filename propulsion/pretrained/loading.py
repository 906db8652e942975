"""Loading of pre-trained models with the head of a task: a new one for labels, tags and spans."""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging as transformers_logging

from propulsion.checksums import check_sums
from propulsion.errors import UserError, did_you_mean, explained, library_errors, listed
from propulsion.identity import weights_identity
from propulsion.pretrained.checkpoint_files import CheckpointWeights
from propulsion.pretrained.declared_pooling import Declaration, declared_pooling
from propulsion.pretrained.packaged import MODELS, packaged
from propulsion.pretrained.pooled import POOLED, PooledClassifier, PooledConfig, body_class
from propulsion.pretrained.untrained import untrained_layers
from propulsion.user_files import expanded, read_json

Pooling = Literal["auto", "mean", "first", "pooler"]
"""The hidden states that a classifier's head reads: see `load_model`."""

# The model of a call that names none: a demo needs no network.
DEFAULT_MODEL = MODELS["minilm"]
DEFAULT_MODEL_NAME = "MiniLM-L6 (packaged)"

_BYTE_LEVEL = ("roberta", "gpt2", "bart", "longformer", "deberta", "bloom")

# Files of a model that hold one object of JSON, and that libraries read without a check.
_OBJECTS = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
            "model.safetensors.index.json", "pytorch_model.bin.index.json")  # fmt: skip

# By peft's name of the task: the class that makes its models, and their name in messages.
_HEADS: dict[str, tuple[Any, str]] = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "sequence classifier"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "token classifier"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "question answerer"),
    "SEQ_2_SEQ_LM": (AutoModelForSeq2SeqLM, "encoder-decoder"),
    "CAUSAL_LM": (AutoModelForCausalLM, "language model"),
}
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")
_WITHOUT_NEW_HEAD = ("SEQ_2_SEQ_LM", "CAUSAL_LM")


def load_classifier(
    model: Path | str | None = None,
    *,
    num_labels: int,
    pooling: str = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    allow_unfitting_weights: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pre-trained model with a head of `num_labels` outputs, and its tokenizer: `load_model` for "SEQ_CLS"."""
    return load_model(
        model, task_type="SEQ_CLS", num_labels=num_labels, pooling=pooling, seed=seed, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code, allow_unfitting_weights=allow_unfitting_weights,
    )  # fmt: skip


def load_model(
    model: Path | str | None = None,
    *,
    task_type: str,
    num_labels: int = 2,
    pooling: str = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    allow_unfitting_weights: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pre-trained model with the head of a task, and its tokenizer.

    The head, and whatever else the checkpoint lacks, is drawn from `seed` alone; the global random state is left as it
    was. A classifier of one label is a regression, trained by mean squared error. The tokenizer's `model_max_length` is
    lowered to the longest input of the model, and decoders without a padding token pad with their end-of-text token.

    A classifier reads its body by the pooling that the checkpoint declares in the files of sentence-transformers, and
    without a declaration as transformers' own classifier of the architecture does. A warning names modules of
    the checkpoint that are left out, and weights that look untrained (`propulsion.pretrained.untrained`).

    Args:
        model: Local folder or GGUF file, which is dequantised; name of a packaged model (`propulsion.models` lists
            them) or of its GGUF file; or name on the Hugging Face hub. What exists as a path is taken first. By default
            the packaged MiniLM-L6.
        task_type: peft's name of the task: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, SEQ_2_SEQ_LM or CAUSAL_LM.
        num_labels: Number of outputs of a classifier.
        pooling: What a classifier reads: "auto", what the checkpoint declares; "mean" or "first" of the last hidden
            states of the real tokens, by a linear head (`PooledClassifier`); "pooler", what transformers' own
            classifier of the architecture reads, such as BERT's pooler.
        seed: Seed of the head.
        dtype: Precision of all weights. float64 weights are the float32 ones, widened.
        device: Where the model is put.
        trust_remote_code: Run Python code that comes with the model. Without it, a model of an architecture that
            transformers does not have is refused, and code beside one that it has is not run.
        allow_unfitting_weights: Warn of weights that do not fit, where they are refused otherwise: of the body, weights
            that the checkpoint lacks (they start at random), that have another shape (they too), or that the
            configuration has no place for; weights that are all the same number; and a tokenizer with more tokens than
            the model has embeddings. A new head or pooler is fine.

    Raises:
        UserError: If the model or its tokenizer cannot be found or read, if a file is not that of its checksum
            (`propulsion.checksums`), if its architecture has no such head, if it declares an unknown pooling, if its
            weights do not fit, or if a weight is not finite.
    """
    if task_type not in _HEADS:
        raise UserError(
            f"task_type is {task_type!r}{did_you_mean(task_type, _HEADS)}, expected one of {', '.join(_HEADS)}"
        )
    if num_labels < 1:
        raise UserError(f"num_labels is {num_labels}, expected at least 1")
    with library_errors(f"device {str(device)!r} cannot be used"):
        torch.device(device)
    if task_type == "SEQ_CLS":
        check_pooling(pooling)
    elif pooling != "auto":
        raise UserError(f"pooling {pooling} is for classifiers; leave it at auto for this task")
    source, options, declared = _located(model, task_type)
    check_sums(source)
    options |= {"trust_remote_code": trust_remote_code}
    config = _load_config(source, options, task_type, num_labels)
    chosen, pooling = pooling != "auto", _resolve_pooling(source, config, pooling, declared)
    tokenizer = _load_tokenizer(source, options, task_type, config)
    network, info = _load_weights(source, options, config, task_type, seed, dtype)
    if task_type == "SEQ_CLS" and not isinstance(network, PooledClassifier):
        name = DEFAULT_MODEL_NAME if model is None else str(model)
        _report_reading(network, info, source, options, name=name, pooling=pooling, chosen=chosen, declared=declared)
        if pooling in POOLED:
            network = _pooled(network, source, options, pooling, seed, dtype)
    if problems := [*_misfits(network, info, source, options, task_type), *_foreign_tokens(network, tokenizer)]:
        words = f"the weights of {source} do not fit its config.json: {'; '.join(problems)}"
        if not allow_unfitting_weights:
            raise UserError(
                f"{words}. Correct the checkpoint, or load it all the same with allow_unfitting_weights "
                "(--allow-unfitting-weights)"
            )
        warnings.warn(words, stacklevel=3)
    _report_new_weights(network, info, source)
    for weight, values in network.named_parameters():
        if not torch.isfinite(values).all():
            raise UserError(f"model {source!r} holds values that are not finite in {weight}: the checkpoint is damaged")
    _agree_on_padding(network, tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, _position_limit(network))
    return network.to(torch.device(device)).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def check_pooling(pooling: str) -> None:
    """Raise if no pooling has this name.

    Raises:
        UserError: There is no such pooling.
    """
    if pooling not in (names := get_args(Pooling)):
        raise UserError(f"pooling is {pooling!r}{did_you_mean(pooling, names)}, expected one of {', '.join(names)}")


def find_pooling(model: Path | str | None = None, pooling: str = "auto", *, trust_remote_code: bool = False) -> str:
    """The pooling of a classifier of a checkpoint, "mean", "first" or "pooler", without loading its weights.

    Raises:
        UserError: As `load_model`.
    """
    check_pooling(pooling)
    source, options, declared = _located(model, "SEQ_CLS")
    options |= {"trust_remote_code": trust_remote_code}
    return _resolve_pooling(source, _load_config(source, options, "SEQ_CLS", 2), pooling, declared)


def find_config(model: Path | str, task_type: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint for a task, without loading its weights.

    Raises:
        UserError: As `load_model`.
    """
    source, options, _ = _located(model, task_type)
    return _load_config(source, options | {"trust_remote_code": trust_remote_code}, task_type, num_labels=2)


def pooling_of(model: Any) -> str:
    """The pooling of a classifier, or of the classifier under an adapter: "mean", "first" or "pooler"."""
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    return network.pooling if isinstance(network, PooledClassifier) else "pooler"


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a model's pre-trained weights, without heads and adapters.

    The pooling of a classifier enters too, unless it is transformers' own. Reads every value once.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    pooling = pooling_of(model)
    weights = weights_identity(body.state_dict().items())
    return weights if pooling == "pooler" else hashlib.sha256(f"pooling {pooling}, {weights}".encode()).hexdigest()


def _located(model: Path | str | None, task_type: str) -> tuple[str, dict[str, Any], Declaration]:
    """A model's folder or hub name, the options of loading, and what its checkpoint declares if it is a classifier."""
    with explained(f"read model {model}"):
        source, options = _split_gguf(_path_or_name(model))
        declared = declared_pooling(source) if task_type == "SEQ_CLS" and not options else Declaration()
        if (folder := Path(source) / declared.transformer).is_dir() and not options:
            for name in _OBJECTS:
                if (folder / name).is_file():
                    read_json(folder / name)
    return source, options | ({"subfolder": declared.transformer} if declared.transformer else {}), declared


def _path_or_name(model: Path | str | None) -> str:
    """The path of a model that lies on this machine, unpacked if need be; any other name as it is."""
    if model is None:
        return str(default_model_folder())
    known = None if expanded(model).exists() else packaged(str(model))
    return str(model) if known is None else str(known.path())


def _split_gguf(source: str) -> tuple[str, dict[str, str]]:
    """The folder of a GGUF file, and the option that names the file; any other source as it is, without options."""
    path = expanded(source)
    if path.suffix != ".gguf":
        return source, {}
    if not path.is_file():
        raise UserError(f"model file {path} does not exist")
    return str(path.parent), {"gguf_file": path.name}


def default_model_folder() -> Path:
    """Return the folder of the packaged default model.

    Raises:
        UserError: It is not installed.
    """
    return DEFAULT_MODEL.path()


def _load_config(source: str, options: dict[str, Any], task_type: str, num_labels: int) -> PreTrainedConfig:
    labels: dict[str, Any] = {"num_labels": num_labels} if task_type in _LABELLED else {}
    with _loading(source, f"cannot load a model from folder {source}"):
        try:
            config = AutoConfig.from_pretrained(source, **options, **labels)
        except (OSError, ValueError) as error:
            if Path(source).is_dir() or _needs_code(error):
                raise
            raise UserError(
                f"cannot load model {source!r}{did_you_mean(source, MODELS)}: there is no such folder, and the Hugging "
                "Face hub has no such model or cannot be reached (python -m propulsion.models lists models that pip "
                "installs)"
            ) from error
    factory, words = _HEADS[task_type]
    own_code = options["trust_remote_code"] and factory.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in factory._model_mapping and not own_code:
        raise UserError(f"model {source!r} is of type {config.model_type!r}, for which transformers has no {words}")
    if task_type == "SEQ_CLS":
        config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
    return config


def _load_tokenizer(
    source: str, options: dict[str, Any], task_type: str, config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    # Byte-level tokenizers accept lists of words only with add_prefix_space.
    words = {"add_prefix_space": True} if task_type == "TOKEN_CLS" and config.model_type in _BYTE_LEVEL else {}
    with _loading(source, f"cannot load a tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **words)
    # Without the vocabulary files transformers makes a tokenizer that has the special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"cannot load a tokenizer of {source}: its vocabulary files are missing")
    return tokenizer


def _load_weights(
    source: str, options: dict[str, Any], config: PreTrainedConfig, task_type: str, seed: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict]:
    # Random numbers depend on the dtype that is drawn: float64 heads are drawn as float32, and so are the same.
    drawn_as = torch.float32 if dtype == torch.float64 else dtype
    with _loading(source, f"cannot load the weights of {source}"), _quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _HEADS[task_type][0].from_pretrained(
            source, config=config, dtype=drawn_as, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    if "gguf_file" in options:
        _forget_quantisation(model, source)
    return model.to(dtype), info


def _resolve_pooling(source: str, config: PreTrainedConfig, pooling: str, declared: Declaration) -> str:
    """The given pooling, or that of the checkpoint if it is "auto"."""
    if isinstance(config, PooledConfig):
        if pooling not in ("auto", config.pooling):
            raise UserError(
                f"{source} was trained and saved with pooling {config.pooling}; give that or auto, not {pooling}"
            )
        return config.pooling
    if pooling != "auto":
        return pooling
    if declared.unknown:
        warnings.warn(
            f"the Hugging Face hub cannot be reached, so that it is unknown whether {source} declares a pooling: it is "
            "read as by transformers' own classifier; give the pooling (mean, first or pooler) to be sure",
            stacklevel=4,
        )
    if not declared.mode:
        return "pooler"
    if declared.pooling is not None:
        return declared.pooling
    own = _HEADS["SEQ_CLS"][0]._model_mapping[type(config)]
    if declared.mode == "lasttoken" and issubclass(own, GenericForSequenceClassification):
        return "pooler"  # transformers' own classifiers of decoders read the last token.
    raise UserError(
        f"{source} declares the pooling {declared.mode}, which is not supported; choose another one: "
        "mean, first, or pooler, which is what transformers' own classifier reads"
    )


def _pooled(
    network: PreTrainedModel, source: str, options: dict[str, Any], pooling: str, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """A `PooledClassifier` on the same body."""
    config = network.config
    with _loading(source, f"{source} cannot be read by pooling {pooling}"):
        maker = body_class(config)
        body: Any = network.base_model
        if type(config) in maker._model_mapping and type(body) is not maker._model_mapping[type(config)]:
            # Such as the encoder of an encoder-decoder, or a body that shortens its sequences.
            with _quiet_loading():
                body = maker.from_pretrained(source, config=config, dtype=dtype, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pooled: Any = PooledClassifier(PooledConfig(body_config=config, pooling=pooling), body)
            return pooled.to(dtype)


def _report_reading(
    network: PreTrainedModel, info: dict, source: str, options: dict[str, Any], *, name: str, pooling: str,
    chosen: bool, declared: Declaration,
) -> None:  # fmt: skip
    """Warn, in one line, of weights of a checkpoint that are not read, and of weights that look untrained.

    `network` is transformers' own classifier of the architecture and `info` its loading info; `name` is the model's in
    messages, and `chosen` says whether the caller has chosen the pooling.
    """
    prefix, pooler = f"{network.base_model_prefix}.", getattr(network.base_model, "pooler", None)
    absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    in_pooler = {id(p) for p in pooler.parameters()} if isinstance(pooler, nn.Module) else set()
    weights = dict(network.named_parameters())
    head = {name: p for name, p in weights.items() if name not in absent and not name.startswith(prefix)}
    read = head | {name: p for name, p in weights.items() if name not in absent and id(p) in in_pooler}
    if pooling in POOLED:
        left_out = [declared.unused] if declared.unused else []
        left_out += [f"its own classifier ({', '.join(head)}), which pooling pooler reads"] if head else []
        if declared.mode:
            elsewhere = CheckpointWeights(source, set(info["unexpected_keys"]), **options)
            untrained = [*untrained_layers(read), *untrained_layers(elsewhere)]
            left_out += [f"what looks untrained: {', '.join(map(str, untrained))}"] if untrained else []
        if left_out:
            origin = "was chosen" if chosen else "it declares"
            warnings.warn(
                f"{name} is read by pooling {pooling}, as {origin}; left out: {'; '.join(left_out)}", stacklevel=4
            )
        return
    untrained = list(untrained_layers(read))
    # If the whole body looks untrained, the model is random on purpose.
    body = untrained_layers({name: p for name, p in weights.items() if name not in read})
    if untrained and (chosen or declared.mode or next(body, None) is None):
        warnings.warn(
            f"{name} is read through weights that look untrained: {', '.join(map(str, untrained))}; pooling mean or "
            "first does not use them",
            stacklevel=4,
        )


def _forget_quantisation(model: Any, source: str) -> None:
    """Make a model from a GGUF file an ordinary one, which can be trained and saved in full."""
    if packed := [name for name, weight in model.named_parameters() if not weight.is_floating_point()]:
        raise UserError(
            f"{source}: {packed[0]} is still in GGUF blocks; uninstall the package kernels to dequantise it"
        )
    # transformers keeps the quantiser that dequantised the file, and then refuses to train or save all weights.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Suppress transformers' progress bar, and its table of new weights, which lists the new head."""
    logger = logging.getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger.addFilter(_is_no_load_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_load_report)
        if bars:
            transformers_logging.enable_progress_bar()


def _needs_code(error: BaseException | None) -> bool:
    """Whether transformers refuses to load a model since the code that comes with it is not trusted."""
    return "trust_remote_code" in str(error)


@contextlib.contextmanager
def _loading(source: str, what: str) -> Iterator[None]:
    """Raise `UserError`, "WHAT: REASON", if transformers cannot load something of a model."""
    try:
        with library_errors(what):
            yield
    except UserError as error:
        if not _needs_code(error.__cause__):
            raise
        raise UserError(
            f"{source} cannot be loaded without Python code that comes with it, which may do anything on this computer "
            "and is therefore not run: read it, and pass trust_remote_code (--trust-remote-code) if you trust it"
        ) from error


def _report_new_weights(model: PreTrainedModel, info: dict, source: str) -> None:
    """Warn of new weights other than those of a head that the checkpoint lacks."""
    body, names = f"{model.base_model_prefix}.", set(model.state_dict())
    if absent := sorted(name for name in info["missing_keys"] if name in names and name.startswith(body)):
        warnings.warn(f"{source} lacks weights, which start at random: {', '.join(absent)}", stacklevel=4)
    if any(name in names and not name.startswith(body) for name, *_ in info["mismatched_keys"]):
        warnings.warn(f"the head of {source} has another size and was replaced by a new one", stacklevel=4)


def _misfits(
    network: PreTrainedModel, info: dict, source: str, options: dict[str, Any], task_type: str
) -> Iterator[str]:
    """What does not fit between a checkpoint and the body of the model that was loaded from it, in words."""
    prefix, state = f"{network.base_model_prefix}.", list(network.state_dict())
    different = {name for name, *_ in info["mismatched_keys"]}
    if task_type in _WITHOUT_NEW_HEAD:
        own = state
    elif isinstance(getattr(network, network.base_model_prefix, None), nn.Module):
        own = [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")]
    else:  # The body is then all modules that have a weight from the checkpoint.
        read = {name.partition(".")[0] for name in state if name not in {*info["missing_keys"], *different}}
        own = [name for name in state if name.partition(".")[0] in read]
    absent = [name for name in own if name in info["missing_keys"]]
    reshaped = [name for name in own if name in different]
    if not own or len(absent) + len(reshaped) == len(own):
        yield f"no weight of {type(network).__name__} is in it"
    elif absent:
        yield f"missing: {listed(absent)}"
    if reshaped:
        yield f"of another shape: {listed(reshaped)}"
    modules = {name for name, _ in network.base_model.named_children()} - {"pooler"}
    left = {name for name in info["unexpected_keys"] if name.removeprefix(prefix).partition(".")[0] in modules}
    if left and "gguf_file" not in options:
        stored = CheckpointWeights(source, left, **options)
        left -= {name for name, values in stored.items() if _is_mask(values)}
    if left:
        yield f"without a place in the model: {listed(sorted(left))}"
    matrices = [p for name, p in network.named_parameters() if p.ndim > 1 and name in own]
    if matrices and all(p.min() == p.max() for p in matrices):
        yield "its weights are all the same number"


def _is_mask(values: Tensor) -> bool:
    """Whether this is a constant that older versions of transformers stored with the weights, such as a causal mask."""
    return not values.is_floating_point() or values.numel() == 1 or values.shape[:2] == (1, 1)


def _foreign_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The tokens for which the model has no embedding, in words."""
    try:
        known = getattr(network.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # A few models have no table of embeddings.
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    if known is not None and largest >= known:
        yield f"the tokenizer has token ids up to {largest}, and the model has embeddings for ids below {known}"


def _agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # A decoder finds the last real token of a row by the padding token, which must be the tokenizer's.
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                "the model's tokenizer has neither a padding nor an end-of-text token: texts cannot be batched"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _position_limit(model: PreTrainedModel) -> int:
    """Return the longest input in tokens that the position embeddings allow."""
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    for name, module in model.named_modules():
        # RoBERTa's positions start after its padding index: 514 embeddings serve 512 tokens.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit -= module.padding_idx + 1
    return limit
