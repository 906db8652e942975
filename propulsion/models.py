"""List the models that `--model` takes by name: ``python -m propulsion.models``.

`propulsion.pretrained.packaged` has the table, and finds or unpacks a model.
"""

from collections.abc import Iterator

from propulsion.errors import run_command
from propulsion.pretrained.packaged import MODELS


def lines() -> Iterator[str]:
    """Yield the table: one row for each model, then what it is, and where it comes from or how it is installed."""
    yield "--model takes these names, folders, GGUF files, and names of the Hugging Face hub. Without it: minilm.\n"
    width = max(map(len, MODELS))
    yield f"{'name':{width}}  parameters  download  licence"
    for model in MODELS.values():
        yield f"{model.name:{width}}  {model.parameters:>10}  {model.megabytes:>5} MB  {model.licence}"
        yield f"{'':{width}}  {model.description}"
        yield f"{'':{width}}  on the hub: {model.hub}"
        yield f"{'':{width}}  {model.pip() if model.missing() else 'installed'}"


def main() -> None:
    """Print the table."""
    print("\n".join(lines()))


if __name__ == "__main__":
    run_command(main)
