"""The two ways to contract features to a Gram matrix, and how many multiplications each takes."""

from dataclasses import dataclass

from ntk.layout import Layout

# The number of rows from which a product by halves is faster than a whole one.
HALF = 128

FORMED, PAIRS = "formed features", "pairs of tokens"


@dataclass(frozen=True)
class Sizes:
    """The features of one parameter on all examples.

    Attributes:
        n: number of examples.
        c: number of outputs.
        tokens: N, of all examples and uses; 0 for features that are whole tensors.
        rows: r, the gradient's size at a token.
        columns: s, the input's size at a token; 0 for an embedding.
        elements: of the parameter.
    """

    n: int
    c: int
    tokens: float
    rows: int
    columns: int
    elements: int

    @property
    def forming(self) -> float:
        """Multiplications that form the features, n c tensors of the parameter's shape."""
        return self.tokens * self.c * self.rows * self.columns

    def formed(self, layout: Layout) -> float:
        """Multiplications of the products of formed features, without symmetry."""
        k, m, d = layout.factors(self.c)
        return k * (self.n * m) ** 2 * d * self.elements

    def multiplications(self, layout: Layout, way: str) -> float:
        """Multiplications of a way to contract, without symmetry."""
        if way == FORMED:
            return self.forming + self.formed(layout)
        k, m, d = layout.factors(self.c)
        return self.tokens**2 * (self.columns + k * m**2 * d * self.rows)

    def way(self, layout: Layout) -> str:
        """The faster of the two ways: multiplications, weighted by the share of the peak rate that each reaches."""
        if not self.tokens:
            return FORMED
        k, m, d = layout.factors(self.c)
        direct = 1.4 * self.forming + (1 if self.n * m < 2 * HALF else 0.75) * self.formed(layout)
        ghost = 0.65 * self.tokens**2 * (self.columns + k * m**2 * (d * self.rows + 20))
        return PAIRS if ghost < direct else FORMED
