"""The kernel-distance figure draws the result's arrays: ordered by label, scaled, with one colour scale a row."""

import dataclasses
import os
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from analyses.records import STAGES, Metric, RecordError, Result, write_result
from figures.kernel_distance import color_limits, draw, write
from figures.style import PAGE_WIDTH, save

SCALE = 40.0
PAIR = ("full_backbone", "propulsion_z")


def planted(*, n=12, label_names=("negative", "positive"), signed=False, stages=STAGES, pair=PAIR) -> Result:
    """A result in which each entry encodes its kernel, stage and examples."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n) if label_names else rng.uniform(0, 5, n)
    arrays, metrics = {"labels": labels}, []
    for stage in stages:
        for kernel, size in zip(pair, (1.0, 1 / SCALE)):
            features = rng.normal(0.0 if signed else 3.0, 1.0, (n, n))
            arrays[f"{stage}.{kernel}"] = size * (features @ features.T + 50 * np.eye(n))
            arrays[f"spectrum.{stage}.{kernel}"] = np.linalg.eigvalsh(arrays[f"{stage}.{kernel}"])[::-1]
        metrics += [
            Metric("best_scale", SCALE, None, None, "", stage, *pair),
            Metric("relative_frobenius", 0.97531, 0.96, 0.99, "", stage, *pair),
            Metric("relative_frobenius_scaled", 0.312, 0.28, 0.35, "", stage, *pair),
            Metric("cka", 0.943, 0.92, 0.96, "", stage, *pair),
            Metric("max_absolute", 1.0, None, None, "squared logit", stage, *pair),
        ]
    dataset = {"name": "SST-2", "label_names": list(label_names) if label_names else None}
    return Result(
        "kernel_distance", {}, 0, metrics, {}, arrays, {"name": "tiny"}, dataset, {}, {}, {"full_backbone": "all"}
    )


def panels(figure: Figure):
    """The axes of each row: three maps, the spectra and the colour bar."""
    for row in figure.subfigs:
        yield row.axes[:3], row.axes[3], row.axes[4]


def image(ax) -> np.ndarray:
    (drawn,) = ax.get_images()
    return np.asarray(drawn.get_array())


@pytest.mark.parametrize("label_names", [("negative", "positive"), None])
@pytest.mark.parametrize("signed", [False, True])
def test_the_maps_are_the_arrays_ordered_by_label_and_scaled(label_names, signed):
    result = planted(label_names=label_names, signed=signed)
    order = np.argsort(result.arrays["labels"], kind="stable")
    for stage, (maps, _, _) in zip(STAGES, panels(draw(result)), strict=True):
        full = result.arrays[f"{stage}.{PAIR[0]}"][order][:, order]
        scaled = SCALE * result.arrays[f"{stage}.{PAIR[1]}"][order][:, order]
        for ax, expected in zip(maps, (full, scaled, abs(full - scaled)), strict=True):
            np.testing.assert_allclose(image(ax), expected, rtol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
def test_a_row_shares_one_scale_and_one_map(signed):
    result = planted(signed=signed)
    for maps, _, _ in panels(draw(result)):
        images = [ax.get_images()[0] for ax in maps]
        assert len({drawn.get_clim() for drawn in images}) == 1
        assert {drawn.get_cmap().name for drawn in images} == {"RdBu_r" if signed else "viridis"}
        low, high = images[0].get_clim()
        assert low == (-high if signed else 0.0)


def test_small_negative_entries_are_seen_on_a_map_with_white_at_zero():
    """A share of 1 % of the largest entry is below zero; a colour map from zero would clip it to its first colour."""
    kernel = np.full((20, 20), 100.0)
    kernel[0, 1] = kernel[1, 0] = -1.0
    assert color_limits(kernel, kernel) == (-100.0, 100.0)
    # Rounding is no value below zero.
    kernel[0, 1] = kernel[1, 0] = -1e-6
    assert color_limits(kernel, kernel) == (0.0, 100.0)


def test_the_diagonal_does_not_set_the_scale():
    rng = np.random.default_rng(0)
    kernel = rng.uniform(0.5, 1.0, (100, 100))
    np.fill_diagonal(kernel, 1000.0)
    low, high = color_limits(kernel, kernel)
    assert low == 0.0
    assert 0.98 < high < 1.0


def test_a_diagonal_kernel_is_still_visible():
    assert color_limits(2.0 * np.eye(4), np.eye(4)) == (0.0, 2.0)
    assert color_limits(np.zeros((1, 1)), np.zeros((1, 1))) == (0.0, 1.0)


def test_the_color_bar_says_its_unit_and_where_colors_end():
    for maps, _, bar in panels(draw(planted())):
        assert image(maps[0]).max() > maps[0].get_images()[0].get_clim()[1]
        assert bar.get_xlabel() == "kernel entry [squared logit]; colours end at the 99th percentile off the diagonal"


def test_the_spectra_are_drawn_scaled_and_without_rounding_noise():
    result = planted()
    noisy = {**result.arrays, "spectrum.trained.full_backbone": np.array([5.0, 2.0, 1e-16, -1e-17])}
    _, trained = panels(draw(dataclasses.replace(result, arrays=noisy)))
    full, scaled = trained[1].get_lines()
    np.testing.assert_array_equal(full.get_xydata(), [[1, 5.0], [2, 2.0]])
    np.testing.assert_allclose(scaled.get_ydata(), SCALE * result.arrays["spectrum.trained.propulsion_z"], rtol=1e-12)


def test_each_row_states_distance_and_alignment_with_intervals():
    for row, opening in zip(draw(planted()).subfigs, ("At initialisation", "After training"), strict=True):
        heading = row.get_suptitle()
        assert heading.startswith(opening)
        assert "best scale s = 40.0" in heading
        assert "relative Frobenius distance 0.975 [0.960, 0.990]" in heading
        assert "0.312 [0.280, 0.350] at best scale" in heading
        assert "CKA 0.943 [0.920, 0.960]" in heading


@pytest.mark.parametrize(
    ("seeds", "words"),
    [((), "seed 0"), ((4,), "seed 0"), ((0, 1), "maps, spectra and s of seed 0; other numbers are means over 2 seeds")],
)
def test_the_subject_says_what_is_of_one_seed(seeds, words):
    assert draw(dataclasses.replace(planted(), config={"seeds": list(seeds)})).get_suptitle().endswith(f", {words}")


def test_of_several_seeds_the_kernels_drawn_are_scaled_by_their_own_best_scale():
    values = [
        {"stage": stage, "seed": seed, "metric": "best_scale", "left": PAIR[0], "right": PAIR[1], "value": 2.0 + seed}
        for stage in STAGES
        for seed in (1, 0)
    ]
    result = dataclasses.replace(planted(n=2), config={"seeds": [0, 1]}, tables={"seed_values": values})
    for row, stage in zip(draw(result).subfigs, STAGES, strict=True):
        drawn = np.sort(image(row.axes[1]).ravel())
        np.testing.assert_array_equal(drawn, np.sort(2.0 * result.arrays[f"{stage}.{PAIR[1]}"].ravel()))
        assert "best scale s = 2.00" in row.get_suptitle()


def test_classes_are_named_at_the_middle_of_their_block_and_parted():
    result = planted()
    ones = int(result.arrays["labels"].sum())
    (first, second, _), _, _ = next(iter(panels(draw(result))))
    zeros = 12 - ones
    assert [text.get_text() for text in first.get_yticklabels()] == ["negative", "positive"]
    np.testing.assert_allclose(first.get_yticks(), [(zeros - 1) / 2, zeros + (ones - 1) / 2])
    assert {float(line.get_ydata()[0]) for line in second.get_lines()[:1]} == {zeros - 0.5}


def test_regression_labels_are_shown_as_values():
    result = planted(label_names=None)
    (first, _, _), _, _ = next(iter(panels(draw(result))))
    ordered = np.sort(result.arrays["labels"])
    texts = [text.get_text() for text in first.get_yticklabels()]
    assert texts == [f"{ordered[int(place)]:.1f}" for place in first.get_yticks()]
    assert first.get_ylabel() == "label"


def test_many_classes_are_named_only_where_there_is_room():
    result = planted(n=60, label_names=[f"class {i}" for i in range(30)])
    result.arrays["labels"][:] = np.arange(60) // 2
    (first, _, _), _, _ = next(iter(panels(draw(result))))
    assert np.diff(first.get_yticks()).min() >= 0.08 * 60
    assert first.get_yticklabels()[0].get_text() == "class 0"


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("label_names", [("negative", "positive"), None])
def test_small_and_one_stage_results_are_drawn(n, label_names):
    figure = draw(planted(n=n, label_names=label_names, stages=("initialisation",)))
    assert len(figure.subfigs) == 1
    assert figure.get_size_inches()[0] == PAGE_WIDTH


def test_nothing_overlaps_the_edge_and_all_type_is_readable():
    figure = draw(planted(label_names=("acceptable", "not_entailment")))
    width, height = figure.get_size_inches()
    drawn = figure.get_tightbbox()
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= width
    assert drawn.y1 <= height
    assert all(text.get_fontsize() >= 7 for text in figure.findobj(mpl.text.Text) if text.get_text())


def test_png_and_pdf_are_written_the_same_twice_with_embedded_truetype(tmp_path):
    paths = write(planted(), tmp_path / "one")
    assert [path.name for path in paths] == ["kernel_distance.png", "kernel_distance.pdf"]
    again = write(planted(), tmp_path / "two")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    pdf = paths[1].read_bytes()
    assert b"/Type3" not in pdf
    assert b"/FontFile2" in pdf
    assert b"CreationDate" not in pdf


def test_another_pair_gets_its_own_files(tmp_path):
    pair = ("full_all", "lora_r8")
    paths = write(planted(pair=pair), tmp_path, full=pair[0], adapter=pair[1])
    assert [path.stem for path in paths] == ["kernel_distance.full_all.lora_r8"] * 2
    assert {path.suffix for path in paths} == {".png", ".pdf"}


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    with mpl.rc_context({"font.size": 23.0}):
        draw(planted(stages=("trained",)))
        assert mpl.rcParams["font.size"] == 23.0


# --- errors --------------------------------------------------------------------------------------------------------


def without(result: Result, *arrays: str) -> Result:
    return dataclasses.replace(result, arrays={k: v for k, v in result.arrays.items() if k not in arrays})


def test_an_unknown_kernel_lists_those_there_are():
    with pytest.raises(RecordError, match=r"'lora'.*kernels in it: full_backbone, propulsion_z"):
        draw(planted(), adapter="lora")


def test_a_missing_array_or_scale_is_named():
    with pytest.raises(RecordError, match="'labels'"):
        draw(without(planted(), "labels"))
    with pytest.raises(RecordError, match=r"spectrum\.trained\.propulsion_z"):
        draw(without(planted(), "spectrum.trained.propulsion_z"))
    with pytest.raises(RecordError, match="no metric 'best_scale'"):
        draw(dataclasses.replace(planted(), metrics=[]))


def test_values_that_cannot_be_drawn_are_refused():
    result = planted()
    result.arrays["trained.propulsion_z"][0, 1] = np.nan
    with pytest.raises(RecordError, match=r"'trained\.propulsion_z'.*not finite"):
        draw(result)
    result = planted()
    result.arrays["labels"] = result.arrays["labels"][:-1]
    with pytest.raises(RecordError, match="11 labels"):
        draw(result)
    result = planted()
    result.arrays["labels"][0] = -1
    with pytest.raises(RecordError, match="labels outside 0 to 1"):
        draw(result)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write the figure to"):
        save(Figure(), tmp_path / "file", "stem")


# --- command -------------------------------------------------------------------------------------------------------


def command(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "figures.kernel_distance", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})


def test_the_command_draws_beside_the_result(tmp_path):
    folder = write_result(planted(), tmp_path / "run")
    done = command(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "kernel_distance.png"), str(folder / "kernel_distance.pdf")]
    assert command(folder, "--output-dir", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "kernel_distance.pdf").exists()


def test_the_command_fails_in_one_line(tmp_path):
    failed = command(tmp_path / "nowhere")
    assert failed.returncode == 2
    assert failed.stderr.strip() == f"error: {tmp_path / 'nowhere'} is not a result folder: there is no such folder"
