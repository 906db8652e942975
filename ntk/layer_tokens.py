"""The gradients of a weight as tokens, G_i = sum_t g_t a_t^T, without forming them: sums over pairs of tokens instead.

:mod:`ntk.low_rank_law` needs, of each layer, the kernel K_ij = <G_i, G_j> and sums over the matrices M_ij = G_i^T G_j.
A layer of width 1,536 has two million numbers in each M_ij, but an example of twenty tokens gives it rank 20.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from ntk.adapters import Modules, chosen, layers_of
from ntk.checks import power_of_two, shifted
from ntk.features import Outer
from ntk.functional import Parameters, evaluation
from ntk.inputs import Inputs
from ntk.outputs import Output
from ntk.reference import at_least, gigabytes
from ntk.request import Request
from ntk.structured.memory import IN_PROGRESS
from ntk.structured.stages import Captured, Stage, gathered


@dataclass(frozen=True)
class TokenGradients:
    """G_i = sum_t g_it a_it^T, (p, s), of n examples; p counts the outputs of the network times those of the layer.

    Attributes:
        g: gradients of each example, ``(t_i, p)``.
        a: inputs of each example, ``(t_i, s)``.
    """

    g: tuple[Float[Tensor, "_ p"], ...]
    a: tuple[Float[Tensor, "_ s"], ...]

    @property
    def width(self) -> int:
        """s, the length of the layer's input."""
        return self.a[0].shape[1]

    @property
    def exponent(self) -> int:
        """The least e for which no product of entries of g and a exceeds 2^e."""
        return sum(max(map(power_of_two, each)) for each in (self.g, self.a))

    def shifted(self, exponent: int) -> "TokenGradients":
        """G 2^exponent, with g of order 1."""
        own = max(map(power_of_two, self.g))
        return TokenGradients(
            tuple(shifted(g, -own) for g in self.g), tuple(shifted(a, exponent + own) for a in self.a)
        )

    def kernel(self) -> Float[Tensor, "n n"]:
        """K_ij = sum_ts (g_it . g_js) (a_it . a_js), float64."""
        pairs = zip(_products(self.g), _products(self.a), strict=True)
        return torch.stack([(gradients * inputs).sum((1, 2), dtype=torch.float64) for gradients, inputs in pairs])

    def fluctuation(self, R: Float[Tensor, "n n"], kurtosis: float) -> tuple[float, float]:
        """r times sum_ij Var[k_ij], and r times Var[<R, k>], for LoRA's kernel k of this layer, centred over examples.

        With q(M) = |M|^2 + tr M^2 + kurtosis sum_d M_dd^2, a quadratic form, the first is the sum of q over the centred
        matrices M_ij - M_i. / n - M_.j / n + M_.. / n^2, a dot for the sum over an index:

            sum_ij q(M_ij) - 2/n sum_i q(M_i.) + q(M_..) / n^2

        The second is q(sum_ij R_ij M_ij) for an R that is centred already.

        Cost: N^2 (p + s) for N tokens of all examples.
        """
        n, A = len(self.a), pad_sequence(list(self.a), batch_first=True)
        total, whole, along = 0.0, A.new_zeros(self.width, self.width), A.new_zeros(self.width, self.width)
        for i, (a, gradients) in enumerate(zip(self.a, _products(self.g), strict=True)):
            Z = gradients @ A  # M_ij = a^T Z_j
            total += float(_quadratic(a, Z, kurtosis).sum())
            row = Z.sum(0)
            total -= 2 / n * float(_quadratic(a, row[None], kurtosis))
            whole += a.T @ row
            along += a.T @ torch.einsum("j,jts->ts", R[i].to(a), Z)
        return total + _form(whole, kurtosis) / n**2, _form(along, kurtosis)


def _products(values: tuple[Float[Tensor, "_ d"], ...]) -> Iterator[Float[Tensor, "n _ _"]]:
    """Yield v_it . v_js for each i, all tokens t of it, all j and their tokens s, padded with zeros along s."""
    whole, lengths = torch.cat(values), [len(each) for each in values]
    for each in values:
        products = (whole @ each.T).split(lengths)
        yield pad_sequence(list(products), batch_first=True).mT


def _quadratic(a: Float[Tensor, "t s"], Z: Float[Tensor, "n t s"], kurtosis: float) -> Float[Tensor, "n"]:
    """q(M_j) of M_j = a^T Z_j, in float64."""
    inner, cross = a @ a.T, Z @ a.T  # |M|^2 = <a a^T, Z Z^T>, tr M^2 = tr (Z a^T)^2
    values = (inner * (Z @ Z.mT)).sum((1, 2), dtype=torch.float64) + (cross * cross.mT).sum((1, 2), dtype=torch.float64)
    return values + kurtosis * (a * Z).sum(1).square().sum(1, dtype=torch.float64)


def _form(M: Float[Tensor, "s s"], kurtosis: float) -> float:
    M = M.double()
    return float(M.square().sum() + (M * M.T).sum() + kurtosis * M.diagonal().square().sum())


def token_gradients(
    model: nn.Module,
    inputs: Inputs,
    *,
    modules: Modules = None,
    output: Output | None = None,
    memory_budget: int | float | None = None,
) -> dict[str, TokenGradients]:
    """The gradients of the weights of linear layers at the tokens of each example, by the name of the module.

    Args:
        model: as in :func:`ntk.empirical_ntk`, whose checks are made here too.
        inputs: n examples.
        modules: the linear layers of the model's body, as a method's ``modules``; None for all on which outputs depend.
        output: as in :func:`ntk.empirical_ntk`.
        memory_budget: bytes for all tokens' inputs and gradients; None for half of the free memory.

    Raises:
        ValueError: as :func:`ntk.empirical_ntk`; no linear layer is chosen.
        NotImplementedError: a chosen layer shares its weight, or the model uses the weight otherwise than by
            multiplying tokens, so that its gradients are not sums over tokens.
        MemoryError: ``memory_budget`` is too small.
    """
    layers = {k: m for k, m in layers_of(model).items() if not isinstance(m, nn.Embedding) and chosen(modules, k)}
    if not layers:
        raise ValueError(f"no linear layer of the model's body is chosen by modules={modules!r}")
    weights = {f"{name}.weight" if name else "weight": layer for name, layer in layers.items()}
    params: Parameters = {name: layer.get_parameter("weight") for name, layer in weights.items()}
    held = [id(p) for _, module in model.named_modules() for p in module.parameters(recurse=False)]
    if shared := [name for name, p in params.items() if held.count(id(p)) > 1]:
        raise NotImplementedError(f"{shared[0]} is shared by several modules: leave its layer out of modules")
    request = Request(model, inputs, None, output, None, memory_budget, False)
    found: dict[str, dict[int, tuple[list[Tensor], list[Tensor]]]] = {name: {} for name in params}

    def gather(stage: Stage) -> None:
        if not isinstance(stage, Captured):
            raise NotImplementedError(
                f"the gradients of {next(iter(stage.params))} are not sums over tokens: leave its layer out of modules"
            )
        budget = request.budget(next(iter(params.values())).device)
        if stage.held + stage.least() / IN_PROGRESS > budget:
            raise MemoryError(
                f"the tokens' inputs and gradients need at least {at_least(stage.held + stage.least() / IN_PROGRESS)} "
                f"but memory_budget is {gigabytes(budget)}: take fewer examples or layers, or raise memory_budget"
            )
        with closing(stage.batches(IN_PROGRESS * (budget - stage.held), check=True)) as batches:
            for batch in batches:
                for name, features in batch.features.items():
                    is_conv1d = isinstance(weights[name], Conv1D)
                    for index, g, a in _tokens(name, features, batch.index.tolist(), transposed=is_conv1d):
                        sides = found[name].setdefault(index, ([], []))
                        sides[0].append(g)
                        sides[1].append(a)

    with evaluation(model, inputs):
        gathered(request, params, gather)
    result = {}
    for name, by_example in found.items():
        if by_example:
            sides = [by_example[i] for i in sorted(by_example)]
            g, a = (tuple(torch.cat(pair[side]) for pair in sides) for side in (0, 1))
            result[name.removesuffix("weight").removesuffix(".")] = TokenGradients(g, a)
    return result


def _tokens(
    name: str, features: list, examples: list[int], *, transposed: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each example's gradients ``(t, c r)`` and inputs ``(t, s)``, one use of the weight after another."""
    for feature in features:
        if not isinstance(feature, Outer) or feature.transposed != transposed:
            raise NotImplementedError(
                f"the model uses {name} otherwise than by multiplying tokens: leave its layer out"
            )
        g = feature.g.permute(1, 0, 2).flatten(1)
        for place, index in enumerate(examples):
            mine = feature.tokens.owner == place
            yield index, g[mine], feature.x[mine].to(g.dtype)
