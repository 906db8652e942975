"""Judge the claims on a tree of result folders: one row of the ledger for each claim, over all models.

The tree has one folder for each analysis, as kernel_distance/sst2, with the results of the default model and of random
networks, and one folder for each further model, with the same folders in it, as mpnet-base/kernel_distance/sst2.
"""

import pkgutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import analyses
from analyses.claims import choices, theory, training
from analyses.claims.claim import (
    DEFAULT_MODEL,
    LAYER,
    RANDOM,
    TRIED_RATES,
    Claim,
    Evidence,
    Outcome,
    Results,
    Verdict,
)
from analyses.claims.commands import through_pooler
from analyses.core.errors import MISTAKES
from analyses.core.intervals import holm
from analyses.records import RecordError, Result, load_result, result_folders
from analyses.subjects.paired_scores import LEVEL_OF_ERRORS
from propulsion.errors import UserError, one_line

TASKS = ("sst2", "rte", "cola", "stsb")
"""The paper's tasks of Figures 6 and 7, in its order."""
CLAIMS = tuple(
    found for module in (theory, training, choices) for found in vars(module).values() if isinstance(found, Claim)
)
"""Every claim, in the order in which its module has it."""
ANALYSES = frozenset(module.name for module in pkgutil.iter_modules(analyses.__path__))
"""The names of all analyses: any other folder of a tree of results is one of a model."""


@dataclass(frozen=True)
class Row:
    """A claim judged over all models.

    Attributes:
        claim: The claim.
        verdict: What its rule gives for the numbers of all models.
        evidence: The numbers, each with its model; none without a result.
        folders: The result folders they are from, relative to the tree.
        missing: What it waits for, of `claim.needs`.
        reason: Why it could not be judged, where a result lacks what it needs.
        untrained_pooler: Whether a result was computed through a pooler that was never trained.
    """

    claim: Claim
    verdict: Verdict
    evidence: tuple[Evidence, ...]
    folders: tuple[str, ...]
    missing: tuple[str, ...] = ()
    reason: str = ""
    untrained_pooler: bool = False

    @property
    def decisive(self) -> Evidence | None:
        """The number that stands for the verdict: the first that speaks against the claim where it fails, and so on."""
        order = {
            Verdict.FAILS: (Outcome.UNMET,),
            Verdict.IN_PART: (Outcome.PARTLY,),
            Verdict.OPEN: (Outcome.OPEN,),
            Verdict.UNTESTABLE: (Outcome.UNTESTABLE,),
        }.get(self.verdict, (Outcome.MET,))
        return next((e for outcome in order for e in self.evidence if e.outcome == outcome), None)

    @property
    def condition(self) -> str:
        """Where a claim holds, or holds in part: the numbers that are met, by model, with their count."""
        wanted = {Verdict.WHERE: Outcome.MET, Verdict.IN_PART: Outcome.PARTLY}.get(self.verdict)
        if wanted is None:
            return ""
        found: dict[str, list[str]] = {}
        for e in self.evidence:
            if e.outcome == wanted:
                found.setdefault(e.model, []).append(e.found.label)
        count = sum(map(len, found.values()))
        where = "; ".join(_listed(model, labels) for model, labels in found.items())
        return f"{where} ({count} of {len(self.evidence)})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What limits the verdict: its models, intervals beyond the possible values, decisions that Holm takes back."""
        if not self.evidence:
            return ()
        models, notes = {e.model for e in self.evidence}, []
        trained = models - {RANDOM, LAYER}
        if models == {RANDOM}:
            notes.append("rests on untrained networks alone")
        elif len(trained) == 1:
            notes.append(f"rests on one model, {next(iter(trained))}")
        if self.untrained_pooler and trained:
            notes.append("rests on results read through a pooler that was never trained")
        if beyond := [e.found.label for e in self.evidence if e.found.leaves]:
            notes.append(f"has an interval that leaves the possible values: {', '.join(beyond)}")
        changed = [e.found.label for e in self.evidence if e.corrected not in (None, e.outcome)]
        if changed:
            notes.append(f"has numbers that Holm's correction leaves undecided: {', '.join(changed)}")
        return tuple(notes)


_MOST_LABELS = 4


def _listed(model: str, labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MOST_LABELS} more" if len(labels) > _MOST_LABELS else ""
    return f"{model}: {', '.join(labels[:_MOST_LABELS])}{more}"


def placed(name: str) -> tuple[str, str]:
    """The model and the rest of the path of a result folder below a tree.

    "kernel_distance/sst2" is of the default model; in "mpnet-base/kernel_distance/sst2" a folder, named as the model is
    on the command line, holds the results of another model.
    """
    first, _, rest = name.partition("/")
    return (DEFAULT_MODEL, name) if first in ANALYSES or not rest else (first, rest)


def load_tree(root: Path, only: Collection[str] | None = None) -> dict[str, Result]:
    """Every result folder below a folder, by its path relative to it, as "kernel_distance/sst2".

    Args:
        root: The folder.
        only: Names of the results to load, of those that are there; all by default.

    Raises:
        UserError: There is no such folder, none in it, a damaged one, or one in another analysis' place.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    try:
        names = [folder.relative_to(root).as_posix() for folder in result_folders(root)]
    except RecordError as error:
        raise UserError(f"{error}: name the folder that holds theorem1, kernel_distance, ...") from error
    if only is not None:
        names = [name for name in names if name in only]
    names.sort(key=_tasks_in_order)
    results = {name: load_result(root / name) for name in names}
    for name, result in results.items():
        if placed(name)[1].split("/")[0] != result.analysis:
            raise UserError(
                f"{root / name} is a result of {result.analysis}: it belongs in {root / result.analysis}, or, of "
                f"another model, in {root / 'MODEL' / result.analysis}"
            )
    return results


def _tasks_in_order(name: str) -> tuple[bool, str, str, int, str]:
    model, rest = placed(name)
    analysis, _, task = rest.partition("/")
    return model != DEFAULT_MODEL, model, analysis, TASKS.index(task) if task in TASKS else len(TASKS), task


def choose(keys: Sequence[str]) -> tuple[Claim, ...]:
    """The claims of these names; all without any.

    Raises:
        UserError: There is no such claim.
    """
    known = {claim.key: claim for claim in CLAIMS}
    if unknown := [key for key in keys if key not in known]:
        raise UserError(f"no claim {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[key] for key in keys) if keys else CLAIMS


def judge(claims: Iterable[Claim], results: Results) -> list[Row]:
    """One row a claim."""
    return [judge_claim(claim, results) for claim in claims]


def judge_claim(claim: Claim, results: Results) -> Row:
    """The verdict on one claim over all models, from the results it names and no other.

    Each model's results are judged alone, and their numbers counted together. A claim of several needs is judged on
    another model than the default one by those of its results that are there.
    """
    names = [n for n in results if not (n.endswith(TRIED_RATES) and n.removesuffix(TRIED_RATES) in results)]
    missing = tuple(need for need in claim.needs if not matching([need], names))
    folders = matching([*claim.needs, *claim.also], names)
    if missing:
        return Row(claim, Verdict.MISSING, (), tuple(folders), missing)
    evidence, reasons = [], []
    for model in dict.fromkeys(placed(name)[0] for name in matching(claim.needs, folders)):
        own = {placed(name)[1]: results[name] for name in folders if placed(name)[0] == model}
        try:
            evidence += _of_one_model(claim, own, model)
        except (*MISTAKES, KeyError) as error:
            reason = f"a result holds no {error}" if isinstance(error, KeyError) else one_line(error)
            reasons.append(reason if model == DEFAULT_MODEL else f"{model}: {reason}")
    verdict = claim.rule.combine([e.outcome for e in evidence]) if evidence else Verdict.UNTESTABLE
    pooler = any(through_pooler(results[name]) for name in matching(claim.needs, folders))
    return Row(claim, verdict, tuple(evidence), tuple(folders), (), "; ".join(reasons), pooler)


def _of_one_model(claim: Claim, results: Results, model: str) -> list[Evidence]:
    """The evidence of one model, with Holm's decisions.

    What every run has, networks with random weights and the default model, is counted once, with the default model.
    """
    found = [replace(e, model=e.model or model) for e in claim.judge(results)]
    found = [e for e in found if model == DEFAULT_MODEL or e.model not in (RANDOM, DEFAULT_MODEL)]
    family = [(i, e.p) for i, e in enumerate(found) if e.p is not None and e.outcome != Outcome.UNTESTABLE]
    for (i, _), p in zip(family, holm([p for _, p in family]), strict=True):
        decided = found[i].outcome in (Outcome.MET, Outcome.UNMET)
        found[i] = replace(found[i], corrected=Outcome.OPEN if decided and p > LEVEL_OF_ERRORS else found[i].outcome)
    return found


def matching(needs: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that a claim's needs cover, whatever their model, in their own order."""
    patterns = [pattern for need in needs for pattern in need.split("|")]
    return [name for name in names if any(fnmatchcase(placed(name)[1], pattern) for pattern in patterns)]
