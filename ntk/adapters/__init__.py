"""Parameter-efficient methods, for the kernels of their parameters at initialisation.

A :class:`Method` computes the features of its parameters at one :class:`Layer`; the methods are in :mod:`.weights`,
:mod:`.scales` and :mod:`.low_rank`.
"""

from ntk.adapters.low_rank import DoRA, LoHa, LoRA, VeRA, kaiming_uniform
from ntk.adapters.method import Found, Layer, LayerMethod, Method, Modules, chosen, layer_of, layers_of, matrix_of
from ntk.adapters.scales import IA3, OutputMatrix, Propulsion, rotated_mean, rotation
from ntk.adapters.weights import Backbone, BitFit, Full, NormTuning, RandomSubset, subset

__all__ = ["Found", "Layer", "LayerMethod", "Method", "Modules", "chosen", "layer_of", "layers_of", "matrix_of"]
__all__ += ["Backbone", "BitFit", "Full", "NormTuning", "RandomSubset", "subset"]
__all__ += ["IA3", "OutputMatrix", "Propulsion", "rotated_mean", "rotation"]
__all__ += ["DoRA", "LoHa", "LoRA", "VeRA", "kaiming_uniform"]
