"""A command ends with one line and an exit code for a user's mistake, and with a traceback for a defect of ours."""

import pytest

from propulsion.errors import UserError, first_line, one_line, run_command


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
