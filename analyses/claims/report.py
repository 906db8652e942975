"""The ledger of claims as plain values, and as a terminal table, Markdown and JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analyses.claims.claim import Evidence, Outcome, Quantity, Verdict
from analyses.claims.commands import NOTE, command, through_pooler
from analyses.claims.judge import Row
from analyses.records import RESULT_FILE, Result, format_table, plain

WIDTH = 100
AGAIN = "results"
"""Folder that the commands of the ledger write to."""
SYMBOLS = dict(zip(Verdict, "✓◐◔✗○?…", strict=True))
HOW_TO_READ = (
    "Every verdict is computed from stored results by the rule that is printed with it, over all models together. A "
    "number has its 95 % interval in brackets, and a baseline: the same number for a null model, for another method, "
    "or by chance. A number is met if its whole interval meets the threshold, not met if its whole interval misses it, "
    "and undecided otherwise. A claim on trained models is not testable where full fine-tuning, the reference, has not "
    "learnt the task: where it is not above the best single answer and above the head alone by its whole interval, or "
    "is not known to have converged. The plan (plan.md) says so in full; the claims are in our own words."
)
QUICK = (
    "Made by --quick, on the demonstration task with few steps and few examples. These verdicts show how the ledger "
    "works; they say nothing about the paper's claims."
)


def ledger(rows: Sequence[Row], results: Mapping[str, Result], root: str, *, quick: bool = False) -> dict[str, Any]:
    """The content of the ledger as plain values.

    Args:
        rows: The judged claims.
        results: The results that they were judged by.
        root: The folder of those results, as commands should name it.
        quick: True if the results were made with ``--quick``.
    """
    counts = {verdict.value: sum(row.verdict == verdict for row in rows) for verdict in Verdict}
    return {
        "format": 1,
        "root": root,
        "quick": quick,
        "counts": counts,
        "rows": [_row(row, root) for row in rows],
        "sources": {name: _source(name, results, root) for name in results},
    }


def _row(row: Row, root: str) -> dict[str, Any]:
    claim = row.claim
    words = ("key", "title", "words", "where", "measure", "threshold", "settle")
    source = "--data-dir glue" if row.missing else f"--load {root}"
    outcomes = [e.outcome for e in row.evidence]
    return {name: getattr(claim, name) for name in words} | {
        "rule": claim.rule.words,
        "verdict": row.verdict.value,
        "condition": row.condition,
        "counts": {outcome.value: outcomes.count(outcome) for outcome in Outcome},
        "models": _by_model(row),
        "notes": list(row.notes),
        "number": None if row.decisive is None else _evidence(row.decisive),
        "evidence": [_evidence(e) for e in row.evidence],
        "results": list(row.folders),
        "waits_for": list(row.missing),
        "reason": row.reason,
        "command": f"python -m analyses.claims --only {claim.key} {source}",
        "settling_command": claim.settling_command,
    }


def _by_model(row: Row) -> dict[str, dict[str, int]]:
    """For each model, the number of its numbers by their outcomes."""
    found: dict[str, dict[str, int]] = {}
    for e in row.evidence:
        counts = found.setdefault(e.model, {outcome.value: 0 for outcome in Outcome})
        counts[e.outcome.value] += 1
    return found


def _evidence(e: Evidence) -> dict[str, Any]:
    null = None if e.null is None else _quantity(e.null)
    corrected = None if e.corrected is None else e.corrected.value
    return _quantity(e.found) | {"model": e.model, "outcome": e.outcome.value, "after_holm": corrected, "null": null,
                                 "detail": e.detail}  # fmt: skip


def _quantity(q: Quantity) -> dict[str, Any]:
    return {"label": q.label, "text": str(q), "value": plain(q.value), "low": plain(q.low), "high": plain(q.high)}


def _source(name: str, results: Mapping[str, Result], root: str) -> dict[str, Any]:
    result = results[name]
    return {
        "analysis": result.analysis,
        "commit": result.environment.get("commit"),
        "dirty": result.environment.get("dirty"),
        "seed": result.seed,
        "config": result.config,
        "command": command(result, f"{AGAIN}/{name}", {other: f"{root}/{other}" for other in results}),
        "through_pooler": through_pooler(result),
    }


def to_json(content: Mapping[str, Any]) -> str:
    """The text of `ledger.json`."""
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def counts_in_words(content: Mapping[str, Any]) -> str:
    """The number of claims with each verdict, as text."""
    return ", ".join(f"{n} {verdict}" for verdict, n in content["counts"].items() if n)


def note_in_words(content: Mapping[str, Any]) -> str:
    """The note on results that were computed through an untrained pooler; "" if there are none."""
    marked = any(source["through_pooler"] for source in content["sources"].values())
    return f"Results of MiniLM-L6: {NOTE[0].lower()}{NOTE[1:]}" if marked else ""


def number_in_words(row: Mapping[str, Any]) -> str:
    """The number that a row shows for its verdict, with its label; without a number, the reason."""
    found = row["number"]
    if found is None:
        return f"waits for {', '.join(row['waits_for'])}" if row["waits_for"] else row["reason"] or "-"
    return f"{found['text']} ({found['label']})"


def met_in_words(row: Mapping[str, Any]) -> str:
    """How many of a row's numbers have each outcome, as text."""
    return counted(row["counts"])


def counted(counts: Mapping[str, int]) -> str:
    """Numbers by outcome, as text: "3 met, 1 undecided"."""
    return ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)


def models_in_words(row: Mapping[str, Any]) -> str:
    """For each model, how many of its numbers have each outcome, as text."""
    return "; ".join(f"{model}: {counted(counts)}" for model, counts in row["models"].items())


def verdict_in_words(row: Mapping[str, Any]) -> str:
    """The symbol and the name of a row's verdict, with the condition under which the claim holds."""
    condition = f": {row['condition']}" if row["condition"] else ""
    return f"{SYMBOLS[Verdict(row['verdict'])]} {row['verdict']}{condition}"


def text(content: Mapping[str, Any], width: int = WIDTH) -> str:
    """A table for the terminal, no wider than `width`."""
    header = ("claim", "verdict", "number")
    rows = [(r["title"], verdict_in_words(r | {"condition": ""}), f"{met_in_words(r)}; {number_in_words(r)}")
            for r in content["rows"]]  # fmt: skip
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)][:-1]
    sizes.append(width - sum(sizes) - 2 * len(sizes))
    lines = [header, tuple("-" * size for size in sizes), *rows]
    table = ["  ".join(_cut(cell, n).ljust(n) for cell, n in zip(line, sizes, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, "", counts_in_words(content)])


def _cut(words: str, width: int) -> str:
    return words if len(words) <= width else words[: width - 1] + "…"


def markdown(content: Mapping[str, Any], root: Path, folder: Path) -> str:
    """The ledger as a Markdown document for `folder`, with links to the results below `root`."""
    link = os.path.relpath(root.resolve(), folder.resolve()).replace(os.sep, "/")
    made = f"python -m analyses.claims --load {content['root']} --output-dir {as_given(folder)}"
    blocks = [
        "# Claims of the paper and their verdicts",
        f"{HOW_TO_READ} Symbols: {', '.join(f'{s} {v}' for v, s in SYMBOLS.items())}.",
        *(f"**{note}**" for note in (QUICK if content["quick"] else "", note_in_words(content)) if note),
        f"Made by\n\n```sh\n{made}\n```",
        f"**{counts_in_words(content)}.**",
        format_table(
            ["claim", "verdict", "models", "threshold", "number"],
            [[f"[{row['title']}](#{anchor(row['title'])})", _cell(verdict_in_words(row)), _cell(models_in_words(row)),
              _cell(row["threshold"]), _cell(number_in_words(row))]
             for row in content["rows"]],
            markdown=True,
        ),
        *(_section(row) for row in content["rows"]),
        "## Results",
        f"Each command computes its result again, in a new folder below `{AGAIN}/`. Where a command needs another "
        f"result, it reads it from `{content['root']}`, so the commands can be run in any order.",
        *(_run(name, source, link) for name, source in content["sources"].items()),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _section(row: Mapping[str, Any]) -> str:
    blocks = [f"## {row['title']}", f"{row['words']} *{row['where']}.*", f"**{verdict_in_words(row)}**"]
    if row["reason"]:
        blocks[-1] += f": {row['reason']}"
    if row["waits_for"]:
        blocks[-1] += f": waits for {', '.join(row['waits_for'])}"
    settling = f" Command: `{row['settling_command']}`" if row["settling_command"] else ""
    lines = [f"- numbers: {models_in_words(row) or 'none'}", f"- measured: {row['measure']}",
             f"- threshold: {row['threshold']}", f"- rule: {row['rule']}",
             *(f"- this verdict {note}" for note in row["notes"]),
             f"- what would settle it: {row['settle']}{settling}"]  # fmt: skip
    blocks.append("\n".join(lines))
    if row["evidence"]:
        blocks.append(format_table(
            ["case", "model", "number", "outcome", "after Holm", "baseline", "notes"],
            [[_cell(e["label"]), e["model"], e["text"], e["outcome"], e["after_holm"] or "", _cell(null_in_words(e)),
              _cell(e["detail"])]
             for e in row["evidence"]],
            markdown=True,
        ))  # fmt: skip
    judged = ", ".join(f"[{name}](#{anchor(name)})" for name in row["results"])
    blocks.append(f"{f'Judged by {judged}; again' if judged else 'Run and judged'} by `{row['command']}`.")
    return "\n\n".join(blocks)


def _run(name: str, source: Mapping[str, Any], link: str) -> str:
    made = f"[Configuration and numbers]({link}/{name}/{RESULT_FILE}), {commit_in_words(source)}."
    made += " Through the untrained pooler." if source["through_pooler"] else ""
    return f"### {name}\n\n{made}\n\n```sh\n{source['command']}\n```"


def null_in_words(evidence: Mapping[str, Any]) -> str:
    """The baseline of a number, as text."""
    null = evidence["null"]
    return "" if null is None else f"{null['label']}: {null['text']}"


def commit_in_words(source: Mapping[str, Any]) -> str:
    """The commit that made a result and its seed, as text."""
    if source["commit"] is None:
        return f"no commit known, seed {source['seed']}"
    changed = " with uncommitted changes" if source["dirty"] else ""
    return f"commit {source['commit'][:10]}{changed}, seed {source['seed']}"


def anchor(title: str) -> str:
    """The link target that Markdown renderers give a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def as_given(folder: Path) -> str:
    """A folder's path for a document; of an absolute path only the name, so that it does not depend on the machine."""
    return folder.name if folder.is_absolute() else folder.as_posix()
