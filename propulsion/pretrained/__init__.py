"""Pre-trained models and their tokenizers, loaded with the head that a task needs."""

from propulsion.pretrained.loading import (
    DEFAULT_MODEL_NAME,
    Pooling,
    check_pooling,
    default_model_folder,
    find_config,
    find_pooling,
    fingerprint,
    load_classifier,
    load_model,
    pooling_of,
)  # fmt: skip
from propulsion.pretrained.packaged import MODELS, PackagedModel
from propulsion.pretrained.pooled import PooledClassifier, PooledConfig

__all__ = [
    "DEFAULT_MODEL_NAME", "MODELS", "PackagedModel", "PooledClassifier", "PooledConfig", "Pooling", "check_pooling",
    "default_model_folder", "find_config", "find_pooling", "fingerprint", "load_classifier", "load_model", "pooling_of",
]  # fmt: skip
