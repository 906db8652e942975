"""Restore the state, other than parameters, that a model changes in its forward pass.

Modules keep caches, counters and copies of activations as attributes, exchange submodules, write into buffers, and set
values in their configuration (BigBird sets its kind of attention by the length of its input). Every pass starts from
the state of the caller's model, so that an example's outputs do not depend on the examples that ran before it. At the
end the model is in that state again.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Entries of a module's __dict__ that torch registers. Parameters, buffers and hooks are restored only at the end, since
# torch.func.functional_call exchanges them during a pass.
_HOOKS = {key for key in vars(nn.Module()) if "_hooks" in key}
_REGISTERED = {"_parameters", "_buffers", "_modules", "training"} | _HOOKS
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (list, dict, set, deque)


class OwnState:
    """Copies of a model's attributes, submodules, configuration and buffers, to restore them later.

    Attributes:
        changed: values before and after, by the name of each plain value that a pass has changed.

    Memory: a copy of the buffers. A restoration compares each attribute of each module.
    """

    def __init__(self, model: nn.Module):
        """Remember the state of a model."""
        self.changed: dict[str, tuple[Any, Any]] = {}
        self._early: list[tuple[str, dict, dict]] = []  # restored before each pass
        self._late: list[tuple[str, dict, dict]] = []  # restored at the end
        self._contents: list[tuple[bool, Any, Any]] = []  # late, a container, a copy of it
        self._classes: list[tuple[nn.Module, type]] = []
        self._tensors: dict[int, tuple[Tensor, Tensor, int]] = {}
        seen: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # holds its state outside of Python
                continue
            entries = module.__dict__
            own = {key: value for key, value in entries.items() if key not in _REGISTERED}
            self._classes.append((module, type(module)))
            self._early += [(name, entries, own), (name, entries["_modules"], dict(entries["_modules"]))]
            tables = {key: t for key, t in entries.items() if key in _REGISTERED and isinstance(t, dict)}
            self._late += [(f"{name}.{key}", table, dict(table)) for key, table in tables.items()]
            for t in [*entries["_buffers"].values(), *own.values()]:
                self._remember_tensor(t)
            for value in own.values():
                self._remember(value, name, seen)

    def restore(self, *, finally_: bool = False) -> None:
        """Restore attributes that differ; with ``finally_`` also parameters, hooks and the values of buffers."""
        for name, entries, before in self._early:
            self._put_back(name, entries, before)
        for late, container, before in self._contents:
            if (finally_ or not late) and not _same(container, before):
                container.clear()
                (container.update if isinstance(container, dict | set) else container.extend)(before)
        if not finally_:
            return
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for name, registry, before in self._late:
            self._put_back(name, registry, before)
            if list(registry) != list(before):  # an entry that was registered again has become the last
                registry.clear()
                registry.update(before)
        for t, copy, version in self._tensors.values():
            if t._version != version:
                with torch.no_grad():
                    t.copy_(copy)

    def _put_back(self, name: str, entries: dict, before: dict) -> None:
        for key in [key for key in entries if key not in before and key not in _REGISTERED]:
            del entries[key]
        for key, value in before.items():
            now = entries.get(key, _ABSENT)
            if now is not value:
                if isinstance(value, _PLAIN) and isinstance(now, _PLAIN) and value != now:
                    self.changed.setdefault(f"{name}.{key}" if name else key, (value, now))
                entries[key] = value

    def _remember(self, value: Any, name: str, seen: set[int]) -> None:
        """Remember containers, and configuration objects, which hold plain values, containers and such objects only."""
        if id(value) in seen:
            return
        if isinstance(value, _CONTAINERS):
            seen.add(id(value))
            inside = value.values() if isinstance(value, dict) else value
            self._contents.append((any(isinstance(t, nn.Parameter) for t in inside), value, value.copy()))
        elif _is_configuration(value):
            seen.add(id(value))
            self._early.append((name, vars(value), dict(vars(value))))
            for inner in vars(value).values():
                self._remember(inner, name, seen)

    def _remember_tensor(self, t: Any) -> None:
        if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and not t.is_inference() and t.grad_fn is None:
            self._tensors[id(t)] = (t, t.detach().clone(), t._version)


_ABSENT = object()


def _same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(a is b and container[a] is before[b] for a, b in zip(container, before, strict=True))
    if isinstance(container, set):
        return container == before
    return all(a is b for a, b in zip(container, before, strict=True))


def _is_configuration(value: Any, depth: int = 0) -> bool:
    simple = (*_PLAIN, *_CONTAINERS, tuple)
    if isinstance(value, (*simple, Tensor)) or callable(value) or depth > 3 or not hasattr(value, "__dict__"):
        return False
    return all(isinstance(v, simple) or _is_configuration(v, depth + 1) for v in vars(value).values())


def parameter_hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    """The tables of hooks on parameters' gradients; kernels clear them, since a hook may change a derivative."""
    for p in model.parameters():
        yield from filter(None, (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)))
