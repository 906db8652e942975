"""The paper on trial: run what its claims are judged by, or load it, and write the ledger of verdicts.

    python -m analyses.claims --quick
    python -m analyses.claims --data-dir glue --output-dir results/claims
    python -m analyses.claims --load docs/results --output-dir docs/claims

The first needs no data and no network and takes a few minutes: the demonstration task, at sizes that show how all of it
works. The second is the whole trial. It takes hours, and goes on where it was when it is called again: what is complete
is not computed twice. The third judges results that are there, and runs nothing.

Every verdict follows from stored numbers by a threshold and a rule that the ledger states. It is printed and written as
claims.md, ledger.json and report.html, a page that needs nothing beside it. The exit code is 1 if a run failed; the
claims that wait for it have no result yet.
"""

COST = "hours; with --quick, a few minutes"
