"""How closely LoRA's kernel aligns with full fine-tuning's at a given rank, computed from the gradients and not fitted.

LoRA at B = 0 projects a layer's inputs on r random directions A, at any weights of the network. Let G_i be the gradient
of example i by the layer's weight, (c r', s) with the c outputs stacked, and the entries of A iid with mean 0 and
variance 1 / r. The kernel tr(G_i A^T A G_j^T) of the layer has

    mean        K_ij = tr(G_i G_j^T)
    covariance  (tr(M_ij M_kl^T) + tr(M_ij M_kl) + kappa sum_q (M_ij)_qq (M_kl)_qq) / r,    M_ij = G_i^T G_j

with kappa the excess kurtosis of the entries (0 for Gaussian, -6/5 for peft's uniform ones), by the entries' fourth
moments (Malladi et al. 2023, sec. 5, for the mean). Layers draw their A independently, so that both add up over layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.checks import normalised, not_overflown, power_of_two, real_and_finite, shifted
from ntk.layer_tokens import TokenGradients
from ntk.metrics import center, cka

UNIFORM = -6 / 5
"""The excess kurtosis of uniform variables, such as the entries of A in peft and :class:`ntk.adapters.LoRA`."""


@dataclass(frozen=True)
class LoRALaw:
    """CKA(r) = limit / sqrt(1 + constant / r), to leading order in 1 / r.

    Attributes:
        limit: the CKA of full fine-tuning's kernel with the mean R of LoRA's, 1 if R is a multiple of it.
        constant: c = sum_ij Var[E_ij] r / |R|^2 for E the part of the centred fluctuation that is orthogonal to R.
        size: the variance, times r, of the relative fluctuation along R. It changes the kernel's size and not its
            direction. Where size / r is not small, the neglected terms of order 1 / r^2 are not small either.
    """

    limit: float
    constant: float
    size: float

    def cka(self, rank: float) -> float:
        """The predicted mean over A of the CKA at this rank.

        Raises:
            ValueError: the rank is not above 0.
        """
        if not rank > 0:
            raise ValueError(f"expected a rank above 0; got {rank}")
        return self.limit / (1 + self.constant / rank) ** 0.5

    def rank(self, alignment: float) -> float:
        """The rank, not rounded, at which the predicted CKA is ``alignment``; infinite from ``limit`` on."""
        if not 0 < alignment < self.limit:
            return float("inf") if alignment > 0 else 0.0
        return self.constant / ((self.limit / alignment) ** 2 - 1)


def lora_law(
    gradients: Sequence[Float[Tensor, "n c _ _"] | TokenGradients],
    *,
    weights: Sequence[float] | None = None,
    added: Float[Tensor, "n n"] | None = None,
    excess_kurtosis: float = 0.0,
) -> LoRALaw:
    """The law for the CKA of LoRA's kernel, summed over outputs, with the kernel of the layers' weights.

    The scale of LoRA is no argument, since a CKA does not depend on it: rsLoRA (Kalajdzievski 2023), which differs from
    LoRA in the scale alone, has the same law. DoRA (Liu et al. 2024) adds the kernel of the rows' lengths, which does
    not depend on A: give it as ``added``, relative to ``weights``. It shrinks the fluctuation, and makes ``limit`` < 1.

    Args:
        gradients: of each layer, d f_a(x_i) / d W as ``(n, c, r', s)``, c outputs; or as sums over tokens
            (:func:`ntk.token_gradients`), for layers and batches whose gradients do not fit in memory.
        weights: the mean of LoRA's kernel of each layer, relative to that of full fine-tuning: scale^2 times rank times
            the variance of A's entries; 1 for all by default. That of peft's A is 1 / (3 s).
        added: a kernel, summed over outputs, that the method has beside LoRA's.
        excess_kurtosis: of the entries of A: 0 if Gaussian, `UNIFORM` if uniform.

    Raises:
        ValueError: gradients, weights, an added kernel or a kurtosis that are not finite; no layer; another number of
            weights than of layers.
        UndefinedMetricError: a centred kernel is 0.

    Cost: n^2 c r' s^2 of each layer, and the memory of n s^2 numbers; by tokens N^2 (c r' + s) for N tokens of all
    examples.

    Example:
        >>> G = torch.randn(30, 1, 8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> law = lora_law([G])
        >>> law.limit
        1.0
        >>> law.cka(1) < law.cka(16) < 1
        True
    """
    weights = [1.0] * len(gradients) if weights is None else list(weights)
    if not gradients or len(weights) != len(gradients):
        raise ValueError(f"expected a weight for each of one or more layers; got {len(weights)} and {len(gradients)}")
    if not all(map(math.isfinite, [*weights, excess_kurtosis])):
        raise ValueError(f"weights and kurtosis must be finite; got {weights} and {excess_kurtosis}")
    layers = [
        G if isinstance(G, TokenGradients) else _Formed(real_and_finite(G, "gradients").flatten(1, 2))
        for G in gradients
    ]
    # The law does not depend on the scale of the gradients, whose eighth powers would leave the range of float64.
    largest = max(layer.exponent for layer in layers)
    layers = [layer.shifted(-largest) for layer in layers]
    kernels = [layer.kernel() for layer in layers]
    full = torch.stack(kernels).sum(0)
    mean = sum((w * K for w, K in zip(weights, kernels, strict=True)), start=torch.zeros_like(full))
    if added is not None:
        mean = mean + shifted(real_and_finite(added, "the added kernel").to(mean), -2 * largest)
    mean, exponent = normalised(not_overflown(mean, "the mean of LoRA's kernel", "scale weights and added kernel"))
    weights = [math.ldexp(w, -exponent) for w in weights]
    limit = cka(full, mean)
    R = center(mean)
    variance = along = 0.0
    for w, layer in zip(weights, layers, strict=True):
        total, direction = layer.fluctuation(R, excess_kurtosis)
        variance += w**2 * total
        along += w**2 * direction
    square = float(R.square().sum())
    size = along / square**2
    return LoRALaw(limit, variance / square - size, size)


@dataclass(frozen=True)
class _Formed:
    """Gradients ``(n, p, s)`` as whole matrices, with the methods of :class:`ntk.layer_tokens.TokenGradients`."""

    G: Float[Tensor, "n p s"]

    @property
    def exponent(self) -> int:
        return power_of_two(self.G)

    def shifted(self, exponent: int) -> "_Formed":
        return _Formed(shifted(self.G, exponent))

    def kernel(self) -> Float[Tensor, "n n"]:
        return torch.einsum("ips,jps->ij", self.G, self.G)

    def fluctuation(self, R: Float[Tensor, "n n"], kurtosis: float) -> tuple[float, float]:
        """<R, k> is the quadratic form of A with the matrix B = sum_ij R_ij M_ij."""
        G = self.G - self.G.mean(dim=0)  # centring the examples on both sides of the kernel
        total = 0.0
        B = G.new_zeros(G.shape[2], G.shape[2])
        for first, row in zip(G, R, strict=True):
            M = first.T @ G  # (n, s, s), M_ij for all j
            total += float(M.square().sum() + (M * M.mT).sum())
            total += kurtosis * float(M.diagonal(dim1=1, dim2=2).square().sum())
            B += torch.einsum("j,jst->st", row, M)
        return total, float(B.square().sum() + (B * B.T).sum()) + kurtosis * float(B.diagonal().square().sum())
