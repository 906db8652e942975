"""A check of where losses and metrics are to be reported."""

from collections.abc import Sequence

from transformers.integrations import integration_utils

from propulsion.errors import UserError


def check_reporting(report_to: Sequence[str]) -> None:
    """Make sure that every reporter is installed.

    Raises:
        UserError: One is not installed, or there is no such reporter.
    """
    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in report_to:
        if name in ("none", "all"):
            if len(report_to) > 1:
                raise UserError(f"report_to {name} stands alone: give it, or names of reporters")
        elif name not in known:
            raise UserError(f"cannot report to {name!r}: choose none, all, {', '.join(known)}")
        # Where transformers has no function of this name, the reporter's own callback raises.
        elif not getattr(integration_utils, f"is_{name}_available", lambda: True)():
            raise UserError(f"cannot report to {name}: it is not installed here (pip install {name})")
