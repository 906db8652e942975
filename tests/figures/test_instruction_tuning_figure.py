"""The figure of instruction tuning draws the numbers of the result and marks the baselines."""

from analyses.records import Metric, Result
from figures.instruction_tuning import draw, write

ROWS = {
    "none": (0.52, 0.44, 0.59, 0.81),
    "propulsion:degree=15": (0.83, 0.77, 0.88, 1.0),
    "lora": (0.8, 0.74, 0.85, 1.0),
}
BASELINES = {"commonest answer": ("positive", 0.51), "chance": (None, 0.5)}


def planted(baselines=BASELINES) -> Result:
    metrics = [Metric("accuracy", v, low, high, "", "trained", m, "") for m, (v, low, high, _) in ROWS.items()]
    tables = {
        "methods": [{"method": m, "answered": answered} for m, (*_, answered) in ROWS.items()],
        "baselines": [{"baseline": b, "answer": word, "accuracy": a} for b, (word, a) in baselines.items()],
    }
    return Result("instruction_tuning", {}, 0, metrics, tables, {}, {}, {"name": "sst2_instruction"}, {}, {}, {})


def test_every_number_is_drawn():
    left, right = draw(planted()).axes
    drawn = [[float(x) for x in line.get_xdata()] for line in left.lines]
    for value, low, high, _ in ROWS.values():
        assert [value] in drawn
        assert [low, high] in drawn
    assert [0.51, 0.51] in drawn
    assert [0.5, 0.5] in drawn
    assert [bar.get_width() for bar in right.patches] == [0.81, 1.0, 1.0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["untuned", "propulsion degree=15", "lora"]


def test_an_arithmetic_task_has_no_chance(tmp_path):
    left, _ = draw(planted({"commonest answer": ("4", 0.1), "chance": (None, None)})).axes
    assert len(left.lines) == 2 * len(ROWS) + 1
    assert [path.name for path in write(planted(), tmp_path)] == ["instruction_tuning.png", "instruction_tuning.pdf"]
