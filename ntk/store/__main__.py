"""The command line of kernel stores.

    python -m ntk.store PATH                                          what is there
    python -m ntk.store PATH --model my_kernel:model --inputs train=my_kernel:rows [--reduce trace]

The second line adds the examples, computes the tiles that are missing, and prints what is there. MODULE:FUNCTION names
a function without arguments that returns the model, a batch or the output function. Under `torchrun --nproc-per-node 4
-m ntk.store ...`, on one machine or several with a shared folder, the processes share the tiles.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, NoReturn

from ntk.layout import LAYOUTS
from ntk.store.kernel_store import BUDGET, check_examples, kernel_store, status_of


def main() -> None:
    """Run the command."""
    parser = _Parser("python -m ntk.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of the kernel")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="returns the model; without it nothing is computed")
    parser.add_argument("--inputs", metavar="KEY=MODULE:FUNCTION", nargs="*", default=[], help="returns a batch")
    parser.add_argument("--output", metavar="MODULE:FUNCTION", help="returns the output function (default: logits)")
    parser.add_argument("--params", default="all", help="parameters, as in ntk.empirical_ntk (default: all)")
    parser.add_argument("--reduce", choices=[name for name in LAYOUTS if name], help="what becomes of the outputs")
    parser.add_argument("--block", type=int, help="examples of a block (default: 512, or that of the folder)")
    parser.add_argument("--memory-budget-gb", type=float, default=BUDGET / 1e9, help="(default: %(default)s)")
    options = parser.parse_args()
    try:
        run(options)
    except (ValueError, TypeError, MemoryError, OSError, ImportError, AttributeError, SyntaxError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; complete tiles are kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def run(options: argparse.Namespace) -> None:
    """Add, compute, and print what is there."""
    if options.model is None:
        if options.inputs:
            raise ValueError("--inputs needs --model, whose kernel is computed")
        print(status_of(options.path))
        return
    pairs = [text.partition("=") for text in options.inputs]
    if wrong := [text for text, (_, sign, _) in zip(options.inputs, pairs) if not sign]:
        raise ValueError(f"expected KEY=MODULE:FUNCTION for --inputs; got {wrong[0]!r}")
    model, batches = called(options.model), [(key, called(name)) for key, _, name in pairs]
    settings: dict[str, Any] = {
        "params": options.params, "reduce": options.reduce,
        "output": None if options.output is None else called(options.output),
        "memory_budget": options.memory_budget_gb * 1e9,
    }  # fmt: skip
    for key, inputs in batches:  # Nothing is written if they cannot be used.
        check_examples(model, inputs, key, settings)
    store = kernel_store(options.path, model, block=options.block, **settings)
    for key, inputs in batches:
        store.add(inputs, key=key)
    store.compute(progress=True)
    print(store.status())


def called(name: str) -> Any:
    """What the function of a name returns.

    Raises:
        ValueError: the name is not of the form MODULE:FUNCTION, or is not that of a function.
        ImportError: there is no such module.
        AttributeError: the module has no such function.
    """
    module, sign, function = name.partition(":")
    if not (module and sign and function):
        raise ValueError(f"expected MODULE:FUNCTION, such as my_kernel:model; got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise ValueError(f"expected a function without arguments; {name} is {type(found).__name__}")
    return found()


if __name__ == "__main__":
    main()
