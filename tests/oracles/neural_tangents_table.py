"""Writes neural_tangents.json: NNGP and NTK kernels of infinitely wide MLPs by the library neural-tangents.

This is not a test, and no test runs it, since the library needs an old jax. Run it in a separate environment:

    pip install neural-tangents==0.6.5 jax==0.4.38 jaxlib==0.4.38 tf2jax==0.3.6
    python tests/oracles/neural_tangents_table.py

The network is that of ntk/infinite/mlp.py: NTK parametrisation, ``depth`` hidden layers and a readout, all biased.
"""

import json
from pathlib import Path

import jax
import neural_tangents
import numpy as np
from neural_tangents import stax

jax.config.update("jax_enable_x64", True)

INPUTS = [[1.0, -0.5, 0.25], [0.5, 1.5, -1.0], [-2.0, 0.75, 0.5], [0.02, 0.01, 0.03], [4.0, -2.5, 3.0]]
ACTIVATIONS = {
    "linear": stax.Identity(),
    "relu": stax.Relu(),
    "leaky_relu": stax.LeakyRelu(0.01),
    "leaky_relu(0.3)": stax.LeakyRelu(0.3),
    "leaky_relu(-1)": stax.Abs(),
    "erf": stax.Erf(),
    "gelu": stax.Gelu(approximate=False),
    "sin": stax.Sin(),
}
# depth, sigma_w, sigma_b
NETWORKS = [(0, 1.3, 0.2), (1, 1.0, 0.0), (2, 1.7, 0.0), (3, 1.4, 0.3), (8, 1.2, 0.1), (50, 1.05, 0.05)]


def kernels(activation: tuple, depth: int, sigma_w: float, sigma_b: float) -> dict[str, list[float]]:
    """The upper triangles of both kernels, row by row."""
    dense = stax.Dense(1, W_std=sigma_w, b_std=sigma_b, parameterization="ntk")
    _, _, kernel_fn = stax.serial(*[dense, activation] * depth, dense)
    found = kernel_fn(np.array(INPUTS), None, ("nngp", "ntk"))
    upper = np.triu_indices(len(INPUTS))
    return {name: np.asarray(getattr(found, name))[upper].tolist() for name in ("nngp", "ntk")}


def main() -> None:
    """Write the table beside this file."""
    rows = [
        {"activation": name, "depth": depth, "sigma_w": sigma_w, "sigma_b": sigma_b}
        | kernels(activation, depth, sigma_w, sigma_b)
        for name, activation in ACTIVATIONS.items()
        for depth, sigma_w, sigma_b in NETWORKS
    ]
    versions = f"neural-tangents {neural_tangents.__version__}, jax {jax.__version__}, float64"
    lines = ",\n".join(json.dumps(row) for row in rows)
    table = f'{{"made_by": "{versions}",\n"inputs": {json.dumps(INPUTS)},\n"rows": [\n{lines}\n]}}\n'
    Path(__file__).with_name("neural_tangents.json").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
