"""Judge the claims on a tree of result folders: one row of the ledger a claim."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from analyses.claims import theory, training
from analyses.claims.claim import TRIED_RATES, Claim, Evidence, Outcome, Results, Verdict
from analyses.core.errors import MISTAKES
from analyses.records import RecordError, Result, load_result, result_folders
from propulsion.errors import UserError, one_line

TASKS = ("sst2", "rte", "cola", "stsb")
"""The paper's tasks of Figures 6 and 7, in its order."""
CLAIMS = tuple(found for module in (theory, training) for found in vars(module).values() if isinstance(found, Claim))
"""Every claim, in the order in which its module has it."""


@dataclass(frozen=True)
class Row:
    """A claim judged.

    Attributes:
        claim: The claim.
        verdict: What its rule gives.
        evidence: The numbers, none without a result.
        folders: The result folders they are from, relative to the tree.
        missing: What it waits for, of `claim.needs`.
        reason: Why it could not be judged, where a result lacks what it needs.
    """

    claim: Claim
    verdict: Verdict
    evidence: tuple[Evidence, ...]
    folders: tuple[str, ...]
    missing: tuple[str, ...] = ()
    reason: str = ""

    @property
    def decisive(self) -> Evidence | None:
        """The number that stands for the verdict: the first that speaks against the claim where it fails, and so on."""
        order = {
            Verdict.FAILS: (Outcome.UNMET,),
            Verdict.CONDITIONS: (Outcome.MET, Outcome.PARTLY),
            Verdict.UNTESTABLE: (Outcome.OPEN,),
        }.get(self.verdict, (Outcome.MET,))
        return next((e for outcome in order for e in self.evidence if e.outcome == outcome), None)


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
        if name.split("/")[0] != result.analysis:
            raise UserError(f"{root / name} is a result of {result.analysis}: it belongs in {root / result.analysis}")
    return results


def _tasks_in_order(name: str) -> tuple[str, int, str]:
    analysis, _, task = name.partition("/")
    return analysis, TASKS.index(task) if task in TASKS else len(TASKS), task


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
    """The verdict on one claim, from the results it names and no other."""
    names = [name for name in results if not (name.endswith(TRIED_RATES) and name.removesuffix(TRIED_RATES) in results)]
    missing = tuple(need for need in claim.needs if not matching([need], names))
    folders = matching([*claim.needs, *claim.also], names)
    if missing:
        return Row(claim, Verdict.MISSING, (), tuple(folders), missing)
    try:
        evidence = tuple(claim.judge({name: results[name] for name in folders}))
    except (*MISTAKES, KeyError) as error:
        reason = f"a result holds no {error}" if isinstance(error, KeyError) else one_line(error)
        return Row(claim, Verdict.UNTESTABLE, (), tuple(folders), reason=reason)
    return Row(claim, claim.rule.combine([e.outcome for e in evidence]), evidence, tuple(folders))


def matching(needs: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that a claim's needs cover, in their own order."""
    patterns = [pattern for need in needs for pattern in need.split("|")]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
