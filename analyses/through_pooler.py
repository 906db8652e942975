"""Which stored results are of a classifier that read the packaged encoder through its untrained pooler."""

from analyses.ledger.commands import stored_options
from analyses.records import Result

NOTE = (
    "Computed through BERT's pooler, which is untrained in the packaged MiniLM-L6: a Gaussian matrix beside a bias of "
    "zeros, through which all that is learnt must pass. The checkpoint's own configuration says mean pooling, which is "
    "the default now; these numbers are from before it, and wait to be computed anew. With --pooling pooler the same "
    "commands still give them."
)
"""What every document of such a result says of it."""


def through_pooler(result: Result) -> bool:
    """Whether a result is of the packaged encoder, read through its pooler."""
    options = stored_options(result)
    return options.get("pooling") == "pooler" and not options.get("model") and options.get("head") != "label_words"
