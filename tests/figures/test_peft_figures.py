"""The figures of methods by their kernels, from planted results: values at the right places, no names overlap."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from analyses.peft_kernels.measures import classical_scaling
from analyses.records import Metric, Result
from figures.peft_kernels import draw, layers, map, write

FULL = "full fine-tuning"
METHODS = (
    FULL, "Propulsion", "Propulsion, attention_output", "Propulsion, query", "Propulsion, key", "Propulsion, embedding",
    "BitFit", "norm tuning", "(IA)³", "LoRA, rank 1", "LoRA, rank 8", "VeRA, rank 256", "384 weights a layer",
)  # fmt: skip
KINDS = ("query", "key", "value", "attention output", "MLP up", "MLP down")


def result(blocks: int = 3) -> Result:
    rng = np.random.default_rng(0)
    # As in real results, most methods are close together, two at one point, and one far away.
    vectors = 1 + 0.2 * rng.normal(size=(len(METHODS), 6))
    vectors[4] = vectors[3]
    vectors[9] = [3, -2, 1, 0, 0, 0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    S = vectors @ vectors.T
    nulls = ("Gaussian sketch of size 22,272", "last hidden states")
    values = dict(zip((*METHODS[1:], *nulls), (*S[0, 1:], 0.99, 0.5), strict=True))
    points, shares = classical_scaling(S)
    places = [("embedding", None), *itertools.product(KINDS, range(blocks)), ("pooler", None), ("biases", None)]
    rows = [
        {"kind": kind, "block": block, "cka": 0.9, "propulsion_cka": 0.5 + 0.01 * i, "full_cka": 0.7,
         "full_share": 1 / len(places), "propulsion_share": 0.02 * i / len(places)}
        for i, (kind, block) in enumerate(sorted(places, key=lambda p: (-1 if p[0] == "embedding" else 99)
                                                 if p[1] is None else p[1]))
    ]  # fmt: skip
    rows[-1] |= {"cka": None, "propulsion_cka": None, "propulsion_share": None}
    return Result(
        analysis="peft_kernels", config={}, seed=0,
        metrics=[Metric("cka", v, v - 0.02, v + 0.01, "", "initialisation", FULL, name) for name, v in values.items()],
        tables={
            "methods": [{"method": name} for name in METHODS],
            "nulls": [{"null": name} for name in nulls],
            "similarity": [{"left": a, "right": b, "cka": S[i, j]}
                           for (i, a), (j, b) in itertools.product(enumerate(METHODS), repeat=2)],
            "embedding": [{"method": name, "x": x, "y": y} for name, (x, y) in zip(METHODS, points, strict=True)],
            "embedding_axes": [{"axis": axis, "share": share} for axis, share in zip("xy", shares, strict=True)],
            "layers": rows,
        },
        arrays={}, model={}, dataset={}, environment={}, seconds={}, coverage={},
    )  # fmt: skip


def texts(figure: Figure) -> list[Text]:
    """All visible texts; labels of ticks outside of the axes are not visible."""
    FigureCanvasAgg(figure).draw()
    unseen = set()
    for axis, (low, high) in ((a, sorted(a.get_view_interval())) for x in figure.axes for a in (x.xaxis, x.yaxis)):
        unseen |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]
    return [t for t in found if t not in unseen]


def assert_apart_and_inside(figure: Figure) -> None:
    found = [(t.get_text(), t.get_window_extent()) for t in texts(figure)]
    page = figure.bbox
    for words, box in found:
        assert page.padded(1).contains(*box.min), words
        assert page.padded(1).contains(*box.max), words
    for (a, left), (b, right) in itertools.combinations(found, 2):
        width = min(left.x1, right.x1) - max(left.x0, right.x0)
        height = min(left.y1, right.y1) - max(left.y0, right.y0)
        # Boxes of text have room above and below the letters, so an overlap of a tenth of a line is invisible.
        assert width <= 0 or height <= 0.1 * min(left.height, right.height), (a, b)


def test_a_dot_a_method_at_its_value_and_the_nulls_after_them():
    drawn = [np.asarray(line.get_xdata())[0] for line in draw(result()).axes[0].get_lines()
             if str(line.get_marker()) in "os"]  # fmt: skip
    values = [metric.value for metric in result().metrics]
    assert drawn == pytest.approx([*sorted(values[:-2], reverse=True), *values[-2:]])


def test_the_matrix_is_the_table_in_the_order_of_full_fine_tuning():
    axes, points = map.draw(result()).axes
    matrix = np.asarray(axes.get_images()[0].get_array())
    assert matrix[0] == pytest.approx(sorted(matrix[0], reverse=True))
    np.testing.assert_allclose(matrix, matrix.T)
    names = {t.get_text() for t in points.texts}
    assert names == {name.replace("_", " ") for name in METHODS}


def test_the_map_says_how_often_it_is_wrong():
    """On a line, one pair of three is drawn in the wrong order; a method without a CKA and one tied are in no order."""
    points = {FULL: (0.0, 0.0), "a": (1.0, 0.0), "b": (0.0, 2.0), "c": (3.0, 0.0), "none": (9.0, 0.0)}
    assert map.inverted(points, {"a": 0.9, "b": 0.5, "c": 0.6, "none": None}, FULL) == (1, 3)
    assert map.inverted(points, {"a": 0.9, "b": 0.9 + 1e-15}, FULL) == (0, 1)
    shown = result()
    _, axes = map.draw(shown).axes
    assert "of 66 pairs of methods are in the wrong order from full fine-tuning" in axes.get_title()


def test_every_layer_has_its_value_once_and_nothing_where_there_is_none():
    shown = result()
    own, whole, *_ = layers.draw(shown).axes
    words = sorted(t.get_text() for t in whole.texts)
    values = [row["propulsion_cka"] for row in shown.tables["layers"] if row["propulsion_cka"] is not None]
    assert words == sorted(f"{value:.2f}" for value in values)
    rows = {label.get_text(): i for i, label in enumerate(own.get_yticklabels())}
    matrix = np.asarray(whole.get_images()[0].get_array())
    for row in shown.tables["layers"]:
        if row["block"] is not None:
            found = matrix[rows[f"block {row['block']}"], KINDS.index(row["kind"])]
            assert found == pytest.approx(row["propulsion_cka"])


@pytest.mark.parametrize("figure", [draw, map.draw, layers.draw])
def test_words_are_apart_and_on_the_page(figure):
    assert_apart_and_inside(figure(result()))


def test_many_blocks_stay_readable():
    """Numbers that would be too small give way to colours with a scale for each panel."""
    page = layers.draw(result(blocks=30))
    assert_apart_and_inside(page)
    panels = [axes for axes in page.axes if axes.get_title()]
    assert len(panels) == 4
    assert not any(axes.texts for axes in panels)
    assert len(page.axes) == 8
    assert all(text.get_fontsize() >= 7 for text in texts(page))


def test_three_figures_are_written(tmp_path):
    files = {path.name for path in write(result(), tmp_path)}
    names = ("peft_kernels", "peft_kernels_map", "peft_kernels_layers")
    assert files == {f"{name}.{end}" for name in names for end in ("png", "pdf")}
