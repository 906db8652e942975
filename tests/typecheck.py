"""The run-time type checker of the test run: beartype, with Python's own reading of float, which takes an int."""

from functools import partial

import beartype

checked = partial(beartype.beartype, conf=beartype.BeartypeConf(is_pep484_tower=True))
