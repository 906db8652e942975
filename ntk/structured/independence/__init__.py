"""Proof that a batched forward pass gives every example what the example gives alone, operation by operation.

:mod:`.proof` follows the examples through the pass; :mod:`.rules` says of every operation along which axis its result
has them.
"""

from ntk.structured.independence.proof import Independence, follows_torch

__all__ = ["Independence", "follows_torch"]
