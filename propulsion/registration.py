"""The registration of Propulsion as a method of `peft`.

peft has tables of its methods, whose keys are the members of one enum, `PeftType`, and Python has no public way to add
a member to an enum. It is therefore added here as `enum` itself does it for a member in the class body, and the result
is checked: after an incompatible change of peft or `enum`, importing `propulsion` raises.

Enum members are pickled by value: a process that unpickles our ``PeftType`` must have imported `propulsion` before. A
pickled `PropulsionConfig` imports it.
"""

import enum
from typing import Any

import peft
from peft import mapping
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

METHOD = "propulsion"
PREFIX = f"{METHOD}_"


def _add_member(name: str) -> PeftType:
    """Return ``PeftType[name]``, added if peft does not have it (a second import finds it there).

    Raises:
        RuntimeError: `PeftType` is not as expected.
    """
    try:
        if name not in PeftType.__members__:
            member = str.__new__(PeftType, name)
            member._name_ = name
            member._value_ = name
            vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType._member_names_))
            PeftType._member_names_.append(name)
            PeftType._member_map_[name] = member
            PeftType._value2member_map_[name] = member
            # The metaclass refuses assignments to members, so `type` sets the attribute.
            type.__setattr__(PeftType, name, member)
        member = PeftType[name]
        works = (
            issubclass(PeftType, (str, enum.Enum))
            and PeftType(name) is member
            and getattr(PeftType, name) is member
            and member in list(PeftType)
            and member == name
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(_changed("the enum peft.utils.peft_types.PeftType", str(error))) from error
    if not works:
        raise RuntimeError(_changed("the enum peft.utils.peft_types.PeftType", f"{name} does not act as a member"))
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Add the method to peft's tables, or replace its classes if this package was imported again.

    Raises:
        RuntimeError: another package registered a method of this name, or peft's registry is not as expected.
    """
    try:
        tables = (
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
            mapping.PEFT_TYPE_TO_TUNER_MAPPING,
            mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        )
        wanted = (config_cls, model_cls, PREFIX)
        present = tuple(table.get(PROPULSION) for table in tables)
        if present == wanted:
            return
        if any(old is not None and _identity(old) != _identity(new) for old, new in zip(present, wanted, strict=True)):
            raise RuntimeError(
                f"peft already has a method {METHOD!r}, registered as {present[0]}; expected none or ours. "
                "Use only one of the two packages in a process."
            )
        for table in tables:
            table.pop(PROPULSION, None)  # our own classes from before a second import
        register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
        complete = tuple(table.get(PROPULSION) for table in tables) == wanted
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(_changed("the registry in peft.mapping", str(error))) from error
    if not complete:
        raise RuntimeError(_changed("the registry in peft.mapping", "an entry is missing after registration"))


def _identity(entry: Any) -> str:
    return f"{entry.__module__}.{entry.__qualname__}" if isinstance(entry, type) else str(entry)


def _changed(what: str, detail: str) -> str:
    return (
        f"peft {peft.__version__} does not let Propulsion register: {what} is not as expected ({detail}). "
        "Install the peft version in constraints.txt, or report this version."
    )


PROPULSION: PeftType = _add_member(METHOD.upper())
