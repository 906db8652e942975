"""The linearised model, and measures of how far training departs from it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from ntk.checks import check_numbers, in_range, norm, real_and_finite
from ntk.functional import ParameterChoice, evaluating, select_parameters


def linearize(model: nn.Module, params: ParameterChoice = "all") -> "Linearized":
    """The first-order expansion of a model about its present parameters: see :class:`Linearized`.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> linear = linearize(model, "bias")
        >>> bool((linear(torch.ones(1, 2)) == model(torch.ones(1, 2))).all())
        True
    """
    return Linearized(model, params)


class Linearized(nn.Module):
    """The trainable first-order expansion of a model about its present parameters, f(x; theta_0) + J(x) delta.

    Attributes:
        names: of the chosen parameters.
        delta: one trainable parameter for each name, in their order; all start at 0.

    Cost: a forward pass, by ``torch.func.jvp``, costs two of the model. Training it by gradient descent follows
    its kernel exactly (Lee et al. 2019, eq. 5).
    """

    def __init__(self, model: nn.Module, params: ParameterChoice = "all"):
        """Expand about the model's present parameters; the model runs in evaluation mode and is not changed.

        Args:
            model: any module; this module takes the same arguments.
            params: which parameters move, as in :func:`ntk.empirical_ntk`.

        Raises:
            ValueError: as :func:`ntk.functional.select_parameters`; a chosen parameter is not finite.
        """
        super().__init__()
        chosen = select_parameters(model, params)
        for name, parameter in chosen.items():
            check_numbers(parameter, f"parameter {name}")
        self.names = list(chosen)
        self.delta = nn.ParameterList([torch.zeros_like(p) for p in chosen.values()])
        # In a list, so that the model is not a submodule and its parameters do not count as this module's.
        self._model = [model]
        self._start = {name: p.clone() for name, p in chosen.items()}

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """The linearised outputs, of the tensor that the model returns or of its ``logits``."""

        def outputs(chosen: dict[str, Tensor]) -> Tensor:
            # Clones, since a model may write into its inputs.
            own = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
            result = functional_call(self._model[0], chosen, *own)
            return result if isinstance(result, Tensor) else result.logits

        directions = dict(zip(self.names, self.delta, strict=True))
        # Only the plain formula of attention has forward-mode derivatives.
        with evaluating(self._model[0]), sdpa_kernel(SDPBackend.MATH):
            value, slope = jvp(outputs, (self._start,), (directions,))  # pyright: ignore[reportAssignmentType]
        return value + slope


def relative_drift(now: Float[Tensor, "..."], start: Float[Tensor, "..."]) -> float:
    """|A_t - A_0| / |A_0| (Frobenius) of kernels, Jacobians or parameters, which is small if training was lazy.

    Raises:
        ValueError: shapes differ, entries are complex or not finite, or the start is 0.
    """
    if now.shape != start.shape:
        raise ValueError(f"expected two tensors of one shape; got {tuple(now.shape)} and {tuple(start.shape)}")
    now, start = real_and_finite(now, "now"), real_and_finite(start, "start")
    if not start.any():
        raise ValueError("the tensor at the start is 0, and drift relative to 0 is not defined")
    return _ratio(now / 2 - start / 2, start / 2, "the relative drift")


def linearization_error(
    outputs: Float[Tensor, "n c"], linearized: Float[Tensor, "n c"], initial: Float[Tensor, "n c"]
) -> float:
    """|f_t - f_t^lin| / |f_t - f_0|, the error of the linearised outputs relative to the movement of the outputs.

    Raises:
        ValueError: shapes differ, entries are complex or not finite, or the outputs did not move.
    """
    if not outputs.shape == linearized.shape == initial.shape:
        shapes = ", ".join(str(tuple(f.shape)) for f in (outputs, linearized, initial))
        raise ValueError(f"expected three tensors of one shape; got {shapes}")
    outputs, linearized = real_and_finite(outputs, "outputs"), real_and_finite(linearized, "linearized")
    initial = real_and_finite(initial, "initial")
    moved = outputs / 2 - initial / 2  # a difference may overflow, that of the halves does not
    if not moved.any():
        raise ValueError("the outputs did not move, and an error relative to no movement is not defined")
    return _ratio(outputs / 2 - linearized / 2, moved, "the linearisation error")


def _ratio(a: Tensor, b: Tensor, what: str) -> float:
    """|a| / |b|."""
    (above, raised), (below, lowered) = norm(a), norm(b)
    return in_range(above / below, raised - lowered, what)
