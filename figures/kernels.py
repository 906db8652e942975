"""Kernels in a notebook: heat maps, alignments and spectra of arrays or tensors, drawn into given or new axes.

    import figures

    figures.heatmap(K)
    figures.alignment_matrix({"full": K_full, "LoRA": K_lora})
    figures.spectra({"full": K_full, "LoRA": K_lora})

A kernel is an array or a tensor ``(n, n)``, or ``(n, n, c, c)`` as `ntk` returns it. Each function returns the axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from figures.style import COLUMN_WIDTH, DIVERGING, SEQUENTIAL, style

_PERCENTILE = 99.0  # The colour scale ends here, since a diagonal may be much larger than all other entries.
_VISIBLE = 1 / 256  # A negative entry of this size relative to the largest has a colour of its own.
_LOWEST = 1e-8  # Eigenvalues below this share of the largest are rounding errors in single precision.


def heatmap(K: Any, ax: Axes | None = None, *, labels: Sequence[Any] | None = None, title: str = "") -> Axes:
    """Draw the entries of a kernel, traced over its outputs, with a colour bar.

    The colours end at the 99th percentile of the absolute values, and are symmetric about zero if there are visibly
    negative entries.

    Args:
        K: The kernel, ``(n, n)`` or ``(n, n, c, c)``; one of two sets of examples need not be square.
        ax: Where to draw; new axes by default.
        labels: Labels of the n examples, by which rows and columns are ordered.
        title: Title of the axes.

    Raises:
        ValueError: It is no kernel, or there are not as many labels as examples.
    """
    values = _traced(K)
    if labels is not None:
        if values.shape != (len(labels), len(labels)):
            raise ValueError(f"expected one label for each example; got {len(labels)} for a kernel {values.shape}")
        order = np.argsort(np.asarray(labels), kind="stable")
        values = values[np.ix_(order, order)]
    top = float(np.percentile(np.abs(values), _PERCENTILE)) or float(np.abs(values).max()) or 1.0
    signed = values.min() < -_VISIBLE * top
    with style():
        ax = _axes(ax)
        image = ax.imshow(values, cmap=DIVERGING if signed else SEQUENTIAL, vmin=-top if signed else 0.0, vmax=top)
        ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03, extend="both" if signed else "max")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(title, loc="left")
    return ax


def alignment_matrix(kernels: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw the centred alignment (CKA) of every two kernels, with its value in each cell.

    Args:
        kernels: Kernels over the same examples by name.
        ax: Where to draw; new axes by default.

    Raises:
        ValueError: There is no kernel, they are of different sizes, or one is constant, of which CKA is undefined.
    """
    names, values = list(kernels), alignments(kernels)
    with style():
        ax = _axes(ax)
        ax.imshow(values, cmap=SEQUENTIAL, vmin=min(0.0, float(values.min())), vmax=1.0)
        for i, j in np.ndindex(values.shape):
            color = "black" if values[i, j] > 0.6 else "white"
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=color)
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_yticks(range(len(names)), names)
        ax.set_title("centred alignment (CKA)", loc="left")
    return ax


def spectra(kernels: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw the eigenvalues of kernels in descending order, relative to the largest of each, on logarithmic axes.

    Args:
        kernels: Square kernels by name; of ``(n, n, c, c)``, all n c eigenvalues.
        ax: Where to draw; new axes by default.

    Raises:
        ValueError: There is no kernel, or one is not square, or has no positive eigenvalue.
    """
    lines = {name: relative_spectrum(K) for name, K in _some(kernels).items()}
    with style():
        ax = _axes(ax)
        for name, values in lines.items():
            ax.plot(np.arange(1, len(values) + 1), values, label=name)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("eigenvalue, by size")
        ax.set_ylabel("relative to the largest")
        ax.legend()
    return ax


def alignments(kernels: Mapping[str, Any]) -> Float[np.ndarray, "m m"]:
    """The CKA of every two kernels, as `ntk.cka` computes it: examples are centred for each output (Cortes, Mohri and
    Rostamizadeh 2012, sec. 2.1).

    Raises:
        ValueError: As `alignment_matrix`.
    """
    flat = []
    for name, K in _some(kernels).items():
        values = _array(K)
        if values.shape[0] != values.shape[1]:
            raise ValueError(f"expected square kernels; {name} is {values.shape}")
        centred = values - values.mean(0, keepdims=True)
        centred = (centred - centred.mean(1, keepdims=True)).ravel()
        size = float(np.linalg.norm(centred))
        if size <= 1e-10 * float(np.linalg.norm(values)):
            raise ValueError(f"the kernel {name} is constant over the examples, so that its CKA is undefined")
        flat.append(centred / size)
    if len({len(row) for row in flat}) > 1:
        raise ValueError("expected kernels over the same examples and outputs; their sizes differ")
    rows = np.stack(flat)
    return rows @ rows.T


def relative_spectrum(K: Any) -> Float[np.ndarray, " r"]:
    """The eigenvalues of a kernel in descending order over the largest, without those that are rounding errors.

    Raises:
        ValueError: It is not square, or has no positive eigenvalue.
    """
    values = _array(K)
    if values.shape[0] != values.shape[1]:
        raise ValueError(f"expected a square kernel; got {values.shape}")
    if values.ndim == 4:
        n, _, c, _ = values.shape
        values = values.transpose(0, 2, 1, 3).reshape(n * c, n * c)
    eigenvalues = np.linalg.eigvalsh((values + values.T) / 2)[::-1]
    if eigenvalues[0] <= 0:
        raise ValueError("expected a kernel with a positive eigenvalue")
    return (eigenvalues / eigenvalues[0])[eigenvalues > _LOWEST * eigenvalues[0]]


def _some(kernels: Mapping[str, Any]) -> Mapping[str, Any]:
    if not kernels:
        raise ValueError("expected at least one kernel by its name")
    return kernels


def _array(K: Any) -> np.ndarray:
    """A kernel as an array of float64; tensors may be on any device and have gradients."""
    values = K.detach().cpu().double().numpy() if hasattr(K, "detach") else np.asarray(K, dtype=float)
    if values.ndim not in (2, 4) or 0 in values.shape or (values.ndim == 4 and values.shape[2] != values.shape[3]):
        raise ValueError(f"expected a kernel (n, n) or (n, n, c, c); got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("expected a kernel of finite numbers")
    return values


def _traced(K: Any) -> Float[np.ndarray, "n m"]:
    values = _array(K)
    return values if values.ndim == 2 else np.einsum("ijaa->ij", values)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot  # Only here: other figures are drawn without windows and global state.

    return pyplot.subplots(figsize=(COLUMN_WIDTH, COLUMN_WIDTH), layout="constrained")[1]
