"""A command ends with one line and an exit code for a user's mistake, and with a traceback for a defect of ours."""

import errno
import os
import signal
import time

import pytest

from propulsion.errors import UserError, first_line, full_disk, one_line, run_command


def raises(error):
    def main():
        raise error

    return main


def test_a_users_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(raises(UserError("a\n  message\nof lines")))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: a message of lines\n")


def test_an_interrupt_ends_as_shells_report_it(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(raises(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_destructor_is_not_lost(capsys, number, code):
    """Python drops what is raised there."""

    class Dying:
        def __del__(self):
            signal.raise_signal(number)
            sum(range(10))

    def work():
        Dying()
        time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # It is ignored in the background of a shell.
    try:
        with pytest.raises(SystemExit) as caught:
            run_command(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (caught.value.code, capsys.readouterr().err.count("\n")) == (code, 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full"), "No space left on device"),
        (OSError(errno.EDQUOT, "full"), os.strerror(errno.EDQUOT)),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "PytorchStreamWriter failed writing file"),
        (RuntimeError("PytorchStreamReader failed reading file"), None),
        (OSError(errno.EACCES, "not allowed"), None),
        (ValueError("28"), None),
    ],
)
def test_a_full_disk_is_recognised_whoever_reports_it(error, words):
    later = UserError("later")
    later.__cause__ = error
    assert full_disk(error) == full_disk(later) == words


@pytest.mark.parametrize("error", [ValueError("defect"), RuntimeError("defect"), AssertionError()])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_command(raises(error))


def test_messages_without_text():
    assert one_line(ValueError()) == first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\n one \n two")) == "one"


def test_a_line_that_announces_causes_is_followed_by_one():
    error = RuntimeError(
        "Error(s) in loading state_dict for Model:\n\tsize mismatch for a.weight\n\tsize mismatch for b"
    )
    expected = "Error(s) in loading state_dict for Model: size mismatch for a.weight (and 1 more)"
    assert first_line(error) == expected
    assert first_line(ValueError("what follows:\n\n  this")) == "what follows: this"
    assert first_line(ValueError("nothing follows:")) == "nothing follows:"
