"""The linearised model, and measures of how far training departs from it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from ntk.functional import ParameterChoice, evaluating, select_parameters


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
        """
        super().__init__()
        chosen = select_parameters(model, params)
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
        ValueError: shapes differ, or the start is 0.
    """
    if now.shape != start.shape:
        raise ValueError(f"expected two tensors of one shape; got {tuple(now.shape)} and {tuple(start.shape)}")
    size = float(start.double().norm())
    if not size:
        raise ValueError("the tensor at the start is 0, and drift relative to 0 is not defined")
    return float((now.double() - start.double()).norm()) / size


def linearization_error(
    outputs: Float[Tensor, "n c"], linearized: Float[Tensor, "n c"], initial: Float[Tensor, "n c"]
) -> float:
    """|f_t - f_t^lin| / |f_t - f_0|, the error of the linearised outputs relative to the movement of the outputs.

    Raises:
        ValueError: shapes differ, or the outputs did not move.
    """
    moved = float((outputs.double() - initial.double()).norm())
    if not moved:
        raise ValueError("the outputs did not move, and an error relative to no movement is not defined")
    return float((outputs.double() - linearized.double()).norm()) / moved
