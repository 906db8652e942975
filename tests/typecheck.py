"""The run-time type checker of the test run: beartype, where float also accepts an int, as in Python's typing."""

import inspect
from functools import partial, wraps

import beartype
import jaxtyping

checked = partial(beartype.beartype, conf=beartype.BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def _with_shapes(function, *, typechecker):
    """Like `jaxtyping.jaxtyped`, but of functions without shapes in their annotations only types are checked.

    This is faster, since jaxtyping binds the arguments of every call.
    """
    if not inspect.isfunction(function) or "jaxtyping." in repr(function.__annotations__):
        return _jaxtyped(typechecker=typechecker)(function)
    with_types = typechecker(function)

    @wraps(function)
    def call(*args, **kwargs):
        return (function if jaxtyping.config.jaxtyping_disable else with_types)(*args, **kwargs)

    return call


def check_shapes_where_there_are_any():
    """Install the checker before the packages are imported; the import hook finds the decorator by name."""
    jaxtyping.jaxtyped = lambda *, typechecker: partial(_with_shapes, typechecker=typechecker)
