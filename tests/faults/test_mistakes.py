"""Every mistake of the two tables ends in one line that names it, and nothing is written."""

import errno

import pytest

from propulsion import atomic
from propulsion.command_line import parsed
from propulsion.errors import UserError
from propulsion.train import TrainConfig
from tests.faults import inputs, mistakes, options, strangers


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with mistakes.quiet():
        yield


def check(mistake, folder):
    """Check that a mistake ends in one line, unless the tests' check of types refuses it before our code sees it."""
    problem = mistakes.outcome(mistake, folder)
    if "Type-check error" in problem or "BeartypeCall" in problem:
        pytest.skip("the tests' check of types comes first: see python -m tests.faults")
    assert problem == ""


@pytest.mark.parametrize("mistake", [pytest.param(each, id=each.id) for each in options.mistakes()])
def test_a_wrong_option(mistake, tmp_path):
    check(mistake, tmp_path)


@pytest.mark.parametrize("mistake", [pytest.param(each, id=each.id) for each in inputs.mistakes()])
def test_a_malformed_input(mistake, tmp_path):
    check(mistake, tmp_path)


@pytest.mark.parametrize("mistake", [pytest.param(each, id=each.id) for each in strangers.mistakes()])
def test_a_mistake_of_a_first_time_user(mistake, tmp_path):
    check(mistake, tmp_path)


def test_a_file_of_predictions_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(written, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "publish", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(tmp_path / "out.csv", "row,prediction\n")
    assert list(tmp_path.iterdir()) == []


def test_there_are_two_hundred_of_each():
    for table in (options, inputs):
        assert len(list(table.mistakes())) >= 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pooling", "meen"], r"invalid choice 'meen' for argument '--pooling'.*\(did you mean mean\?\); p --help"),
        (["--schedule", "linaer"], r"^lr_scheduler_type is 'linaer' \(did you mean linear\?\)"),
        (["--sed", "3"], r"Unrecognized options: --sed, 3 \(did you mean --seed\?\)"),
        (["--learning-rate", "fast"], r"Error parsing --learning-rate: no type matching .* from \['fast'\]; p --help"),
    ],
)
def test_messages_about_options_are_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        parsed(TrainConfig, prog="p", description=None, args=words)
    assert "\n" not in str(caught.value)
