"""Which claims of the paper hold? Run or load the analyses that test them, and write a ledger of verdicts.

    python -m analyses.claims --quick
    python -m analyses.claims --data-dir glue --output-dir results/claims
    python -m analyses.claims --load docs/results --output-dir docs/claims
    python -m analyses.claims --model mpnet-base --data-dir glue

The first command shows how the ledger works: it runs the demonstration task at small sizes, in a few minutes, without
data or network. The second runs all analyses, which takes hours; the same command resumes it and computes no complete
result again. The third judges existing results and runs nothing. The fourth runs the plan (docs/claims/plan.md) on
another model, into a folder of its name.

Results are found by their folders: ANALYSIS/TASK holds those of the default model, MiniLM-L6, and of random networks;
MODEL/ANALYSIS/TASK, as mpnet-base/kernel_distance/sst2, holds those of another model. Numbers of all models are judged
together, and the ledger counts them by model.

Every verdict follows from stored numbers by a threshold and a rule that the ledger states. The ledger is printed and
written as claims.md, ledger.json and report.html, one page that needs no other file. If a run failed, the exit code is
1, and the claims that need its result have no result yet.
"""

COST = "hours; with --quick, a few minutes"
