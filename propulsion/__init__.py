"""Propulsion (Kowsher et al. 2024) as a `peft` method; importing this package registers it.

>>> from propulsion import PropulsionConfig
>>> PropulsionConfig(degree=15, positions="attn").peft_type
<PeftType.PROPULSION: 'PROPULSION'>
"""

from propulsion.config import PropulsionConfig
from propulsion.hotswap import hotswap_adapter
from propulsion.model import PropulsionModel
from propulsion.pretrained.pooled import PooledClassifier, PooledConfig
from propulsion.registration import register

__all__ = ["PooledClassifier", "PooledConfig", "PropulsionConfig", "PropulsionModel", "hotswap_adapter"]

register(PropulsionConfig, PropulsionModel)
