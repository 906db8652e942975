"""Which parameters should you train on your rows, at which learning rate? Tried within a budget of minutes.

Every candidate method trains for a few steps at its automatic learning rate (`propulsion.training.measured_rates`), on
three quarters of the training rows, and is scored on the other quarter. The best third trains again three times as
long, and so on until two are left: successive halving (Jamieson and Talwalkar 2016). The validation rows are not used
for this choice, so that the score of the printed `propulsion.train` command is not optimistic.

    python -m analyses.choose --data-dir my_rows --text-columns text --label-column topic --budget-minutes 10

The table ranks the candidates by the score that a run of the longest tried length is predicted to have. The interval is
a bootstrap over the held-out rows. A candidate that left early is predicted to gain as much by longer training as those
that went on gained on average; that is an assumption. "within 1 SE" is the share of resamples in which a candidate's
score is at most one standard error of the best candidate's score below the best score.

Other predictors (`analyses.choose.predictors`) stand beside the choice, and do not decide it. The same command resumes
an interrupted choice, and a larger budget uses again what a smaller one has computed at the same numbers of steps.
"""

from analyses.choose.analysis import ANALYSIS, Config, run

COST = "the minutes of its budget"
__all__ = ["ANALYSIS", "Config", "run"]
