"""The ledger of claims: from stored results, in its three formats, and from runs that are killed, resumed or fail."""

import errno
import html
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import tyro

from analyses import ablation
from analyses.claims import __main__ as claims
from analyses.claims import commands, report
from analyses.claims import plan as runs
from analyses.claims.claim import DEFAULT_MODEL
from analyses.claims.judge import CLAIMS, load_tree, placed
from analyses.claims.model_plan import model_plan
from analyses.claims.page import pictures
from analyses.core import child
from analyses.core.cells import Grid
from analyses.core.command_line import configured, default_options, options_of
from analyses.core.errors import MISTAKES
from analyses.core.locks import held
from analyses.records import RESULT_FILE, RecordError
from figures.all import captions
from propulsion.errors import UserError

ROOT = Path(__file__).parent.parent.parent
STORED = Path("docs/results")
NAMES = sorted(p.parent.relative_to(ROOT / STORED).as_posix() for p in (ROOT / STORED).rglob(RESULT_FILE))


@pytest.fixture(scope="module")
def stored():
    return load_tree(ROOT / STORED)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Write the reports for the committed results, with the repository's root as the current folder."""
    folder = tmp_path_factory.mktemp("claims")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        claims.main(claims.Config(load=STORED, output_dir=folder))
    return folder


# --- traceability ---------------------------------------------------------------------------------------------------


def test_the_published_ledger_is_what_the_published_results_give(published):
    """If it fails, results changed: run python -m analyses.claims --load docs/results --output-dir docs/claims."""
    found, kept = (json.loads((f / "ledger.json").read_text("utf-8")) for f in (published, ROOT / "docs" / "claims"))
    assert [row["key"] for row in kept["rows"]] == [claim.key for claim in CLAIMS]
    for row, expected in zip(found["rows"], kept["rows"], strict=True):
        assert row == expected, row["key"]
    assert found == kept


def test_the_published_document_is_that_ledger(published):
    found, kept = ((f / "claims.md").read_text("utf-8") for f in (published, ROOT / "docs" / "claims"))
    assert (
        found.replace(f"--output-dir {published.name}", "--output-dir docs/claims").replace(
            f"]({report.os.path.relpath(ROOT / STORED, published)}/", "](../results/"
        )
        == kept
    )
    for link in re.findall(r"\]\((\.\./[^)]+)\)", kept):
        assert (ROOT / "docs" / "claims" / link).is_file(), link


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_published_result_gives_its_configuration(name, stored):
    result = stored[name]
    config = importlib.import_module(f"analyses.{result.analysis}").Config
    again = options_of(tyro.cli(config, args=commands.arguments(result)))
    kept = {k: v or None for k, v in options_of(result.config).items() if k not in commands._NOT_THE_EXPERIMENT}
    assert {k: again[k] or None for k in kept} == kept
    words = shlex.split(commands.command(result, "again", {other: f"{STORED}/{other}" for other in NAMES}))
    assert words[-2:] == ["--output-dir", "again"]
    for option, value in pairwise(words):
        if option in ("--comparison", "--rates-from"):
            assert (ROOT / value / RESULT_FILE).is_file()


@pytest.mark.parametrize("file", ["claims.md", "ledger.json", "report.html"])
def test_a_published_report_names_no_folder_of_a_machine(file):
    assert not re.search(r"(?<![\w.:/<])/(work|tmp|home|root)\b", (ROOT / "docs" / "claims" / file).read_text("utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_a_published_result_names_its_commit_and_no_machine(name, stored):
    environment = stored[name].environment
    assert re.fullmatch("[0-9a-f]{40}", environment["commit"])
    assert environment["dirty"] is False
    assert not re.search(r'"/(work|tmp|home|root)\b', (ROOT / STORED / name / RESULT_FILE).read_text("utf-8"))
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run(
        [*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=False
    )
    if shallow.stdout.strip() == "false":  # Other copies of the repository have no history to look the commit up in.
        # An object that no branch reaches may lie in one copy of the repository and be missing in every other.
        subprocess.run([*git, "merge-base", "--is-ancestor", environment["commit"], "HEAD"], check=True)


def test_the_full_plan_is_what_is_published(stored):
    plan = runs.full_plan(("sst2", "rte", "cola", "stsb"), Path("glue"), Path("model.gguf"), gpu=True)
    own = {name for name in stored if placed(name)[0] == DEFAULT_MODEL}
    assert own == {run.name for run in plan}
    models = {placed(name)[0] for name in set(stored) - own}
    further = {run.name for m in models for run in model_plan(m, ("sst2", "rte", "cola", "stsb"), None)}
    assert set(stored) - own <= further
    places = {"data_dir", "model", "models", "device", "comparison", "rates_from", "memory_budget_gb"}
    for run in plan:
        config = run.config(Path("results"))
        planned = options_of(config)
        # Options that are newer than a published result must have their defaults.
        found = default_options(type(config)) | options_of(stored[run.name].config)
        for option in planned.keys() - commands._NOT_THE_EXPERIMENT - places:
            resolved = option == "degree" and planned[option] is None  # The result stores the task's degree.
            assert resolved or planned[option] == found[option], (run.name, option)
        for option in planned.keys() & {"comparison", "rates_from"}:
            assert (planned[option] is None) == (found[option] is None), (run.name, option)


# --- forms ----------------------------------------------------------------------------------------------------------


def test_the_terminal_table(published):
    content = json.loads((published / "ledger.json").read_text("utf-8"))
    lines = report.text(content).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == len(CLAIMS) + 4
    for row, line in zip(content["rows"], lines[2:], strict=False):
        assert line.startswith(row["title"])
        assert row["verdict"] in line


def test_every_row_says_how_it_was_judged(published):
    content = json.loads((published / "ledger.json").read_text("utf-8"))
    assert sum(content["counts"].values()) == len(content["rows"])
    for row in content["rows"]:
        assert all(row[name] for name in ("words", "where", "measure", "threshold", "rule", "command"))
        assert bool(row["waits_for"]) == (row["verdict"] == "no result yet")
        assert set(row["results"]) <= content["sources"].keys()
        if row["verdict"] not in ("no result yet", "not testable here"):
            assert row["number"] in row["evidence"]
    for name, source in content["sources"].items():
        assert source["config"]
        assert source["command"].endswith(f"--output-dir results/{name}")


class Page(HTMLParser):
    """Collects the tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_beside_it(published, stored):
    text = (published / "report.html").read_text("utf-8")
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {claim.key for claim in CLAIMS} <= set(ids)
    links = [attrs["href"] for _, attrs in page.tags if "href" in attrs]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(list((ROOT / STORED).rglob("*.png")))
    for image in images:
        assert image["src"].startswith("data:image/png;base64,")
        assert len(image["alt"]) > 40
        assert int(image["width"]) > 0 < int(image["height"])
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert {"prefers-color-scheme: dark", "@media print", "max-width: 46rem"} <= set(
        re.findall(r"prefers-color-scheme: dark|@media print|max-width: 46rem", text)
    )
    for symbol, verdict in ((s, v) for v, s in report.SYMBOLS.items()):
        if any(row.strip() == f"{symbol} {verdict}" for row in page.words):
            break
    else:
        raise AssertionError("no verdict is written as symbol and word")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_is_never_wider_than_its_window(published, tmp_path):
    text = (published / "report.html").read_text("utf-8")
    sizes = (360, 800, 1400)
    widths = "[root.clientWidth, root.scrollWidth]"
    script = f"<script>const root = document.documentElement; parent.postMessage({widths}, '*')</script>"
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html" style="width:{size}px;height:900px;border:0"></iframe>' for size in sizes
    )
    listen = "<script>addEventListener('message', e => document.body.append(' size ' + e.data.join('/')))</script>"
    (tmp_path / "frames.html").write_text(f"<body>{listen}{frames}</body>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]  # fmt: skip
    command = ["chromium", *flags, "--dump-dom", (tmp_path / "frames.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = sorted(tuple(map(int, pair)) for pair in re.findall(r"size (\d+)/(\d+)", found))
    assert measured == [(size, size) for size in sizes]


# --- runs -----------------------------------------------------------------------------------------------------------


def launch(command, log):
    """Run the analysis in this process, which is faster than a process of its own."""
    module = importlib.import_module(command[2])
    log.write_text("", encoding="utf-8")
    publish = module.ANALYSIS.publish if hasattr(module, "ANALYSIS") else module.main
    publish(tyro.cli(module.Config, args=command[3:]))
    return 0


class Killed(BaseException):
    """Stands for SIGKILL in a test that runs in one process."""


@pytest.fixture
def plan(monkeypatch):
    """One run without a grid and one with a grid, whose training is replaced by a constant result."""

    def score(config, data, setting, seed):
        value = 0.5 + 0.1 * float(setting.label) + 0.01 * seed
        return {"score": value, "last_loss": 1.0, "trained_parameters": 9, "diverged": ""}

    monkeypatch.setattr(ablation, "_train", score)
    return [
        runs.run("parameter_count", models=("RoBERTa-base", "RoBERTa-large")),
        runs.run("ablation/init_value", factor="init_value", seeds=(0, 1)),
    ]


def test_a_killed_call_goes_on_and_gives_the_same_ledger(plan, tmp_path, monkeypatch, capsys):
    def ledger(root):
        claims.write(claims.Config(only=("parameter-pair", "initial-value")), load_tree(root), root, root)
        return json.loads((root / "ledger.json").read_text("utf-8"))

    def scores(root):
        return load_tree(root)["ablation/init_value"].tables["settings"]

    whole, killed = tmp_path / "a" / "whole", tmp_path / "b" / "whole"
    for root in (whole, killed):
        runs.check_root(root, quick=False)
    assert runs.carry_out(plan, whole, launch) == {}
    first, second = [line for line in capsys.readouterr().out.splitlines() if ": done, " in line]
    assert first.endswith("; about 1 min for the rest")
    assert "rest" not in second

    computed, cell = [], Grid.cell

    def dying(self, name, *args):
        if self.computed == 3:
            raise Killed
        found = cell(self, name, *args)
        computed.append(name)
        return found

    monkeypatch.setattr(Grid, "cell", dying)
    with pytest.raises(Killed):
        runs.carry_out(plan, killed, launch)
    monkeypatch.setattr(Grid, "cell", cell)
    assert (killed / "parameter_count" / RESULT_FILE).exists()
    assert not (killed / "ablation" / "init_value").exists()
    before = {p: p.stat().st_mtime_ns for p in killed.rglob("*.json")}
    assert len(before) == 1 + 3
    capsys.readouterr()
    assert runs.carry_out(plan, killed, launch) == {}
    assert "parameter_count: there already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert scores(killed) == scores(whole)
    assert ledger(killed)["rows"] == ledger(whole)["rows"]
    assert runs.carry_out(plan, killed, lambda *_: pytest.fail("everything is there")) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": ("RoBERTa-base",)}, "with models ['RoBERTa-base', 'RoBERTa-large'] instead of ['RoBERTa-base']"),
        ({}, "with models ['RoBERTa-base', 'RoBERTa-large'] instead of"),
    ],
)
def test_the_result_of_another_run_is_not_taken_for_this_one(options, words, plan, tmp_path, capsys):
    runs.check_root(tmp_path, quick=False)
    assert runs.carry_out(plan[:1], tmp_path, launch) == {}
    other = [
        runs.run("parameter_count", **options),
        runs.run("convergence", comparison=runs.Earlier("parameter_count")),
    ]
    failed = runs.carry_out(other, tmp_path, lambda *_: pytest.fail("it would overwrite"))
    assert words in failed["parameter_count"]
    assert failed["convergence"] == "waits for parameter_count"
    assert load_tree(tmp_path, ["convergence"]) == {}


def test_one_process_at_a_time_works_on_a_folder(tmp_path):
    root = tmp_path / "claims"
    with held(root), pytest.raises(UserError, match=rf"claims is in use by process {os.getpid()} on"):
        claims.main(claims.Config(quick=True, only=("jl-bound",), output_dir=root))
    assert not any(root.rglob(RESULT_FILE))


def test_a_damaged_result_is_not_taken_for_a_run(plan, tmp_path):
    runs.check_root(tmp_path, quick=False)
    assert runs.carry_out(plan[:1], tmp_path, launch) == {}
    (tmp_path / "parameter_count" / RESULT_FILE).write_text("{}", encoding="utf-8")
    assert "parameter_count" in runs.carry_out(plan[:1], tmp_path, launch)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with a parent that was killed")
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_the_process_that_started_it(kill, tmp_path):
    log = tmp_path / "child"
    child = f"import os, time; open({str(log)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"""
from propulsion.errors import run_command
from analyses.core.child import run_python
run_command(lambda: run_python(["-c", {child!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
    pid = int(log.read_text())
    process.send_signal(kill)
    assert process.wait() == (143 if kill == signal.SIGTERM else -kill)
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with a parent that was killed")
def test_a_child_whose_parent_has_ended_before_it_starts_ends_too():
    process = subprocess.Popen([sys.executable, "-c", "input()"], preexec_fn=lambda: child._end_with_parent(-1))
    assert process.wait() == -signal.SIGTERM


def test_a_failed_run_is_one_line_and_what_needs_it_waits(tmp_path, capsys):
    plan = [
        runs.run("parameter_count", models=("RoBERTa-tiny",)),
        runs.run("convergence", comparison=runs.Earlier("parameter_count")),
    ]
    runs.check_root(tmp_path, quick=False)
    failed = runs.carry_out(plan, tmp_path)  # The program runs in its own process.
    assert failed["parameter_count"].startswith("failed (exit 2): no model RoBERTa-tiny (did you mean RoBERTa-base")
    assert failed["convergence"] == "waits for parameter_count"
    assert not any(tmp_path.rglob(RESULT_FILE))
    assert "[1/2] parameter_count: failed (exit 2): no model" in capsys.readouterr().out


def test_the_exit_code_of_a_call_with_a_failed_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "quick_plan", lambda: [runs.Run("parameter_count"), runs.Run("memory")])

    def failing(command, log):
        if "analyses.memory" in command:
            log.write_text("Traceback\nMemoryError: too much\n", encoding="utf-8")
            return -9
        return launch(command, log)

    monkeypatch.setattr(runs, "in_own_process", failing)
    with pytest.raises(SystemExit) as stop:
        claims.main(claims.Config(quick=True, only=("parameter-pair", "memory"), output_dir=tmp_path / "q"))
    assert stop.value.code == 1
    assert f"memory: failed (killed): MemoryError: too much; log in {tmp_path}" in capsys.readouterr().err
    content = json.loads((tmp_path / "q" / "ledger.json").read_text("utf-8"))
    assert [row["verdict"] for row in content["rows"]] == ["fails", "no result yet"]
    assert content["quick"]
    assert report.QUICK in html.unescape((tmp_path / "q" / "report.html").read_text("utf-8"))


def test_a_full_disk_after_the_runs_says_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "quick_plan", lambda: [runs.Run("parameter_count")])
    monkeypatch.setattr(runs, "in_own_process", launch)

    def no_room(folder, texts):
        raise RecordError(f"cannot write to {folder}: {os.strerror(errno.ENOSPC)}")

    config, root = claims.Config(quick=True, only=("parameter-pair",), output_dir=tmp_path / "q"), tmp_path / "q"
    with monkeypatch.context() as full:
        full.setattr(claims, "write_texts", no_room)
        with pytest.raises(UserError, match=f"No space left on device; the results of 1 finished runs in {root} are"):
            claims.main(config)
    assert (root / "parameter_count" / RESULT_FILE).is_file()
    assert not (root / "ledger.json").exists()
    claims.main(config)
    assert (root / "ledger.json").is_file()


@pytest.mark.parametrize(
    "plan",
    [runs.quick_plan(), runs.full_plan(("sst2", "rte", "cola", "stsb"), Path("glue"), Path("model.gguf"), gpu=True),
     model_plan("mpnet-base", ("sst2", "rte", "cola", "stsb", "mrpc"), Path("glue")),
     model_plan("smollm2-135m", ("sst2",), Path("glue"))],
)  # fmt: skip
def test_every_command_of_a_plan_is_one_that_its_analysis_takes(plan):
    assert len({run.name for run in plan}) == len(plan)
    for place, run in enumerate(plan):
        command = run.command(Path("results"))
        config = tyro.cli(importlib.import_module(command[2]).Config, args=command[3:])
        assert config == run.config(Path("results"))
        assert config.output_dir == Path("results") / run.name
        assert set(run.after) <= {earlier.name for earlier in plan[:place]}


def test_an_option_that_an_analysis_lacks_is_refused():
    with pytest.raises(UserError, match=r"analyses.ablation has no option max_step, width"):
        configured(ablation.Config, {"max_step": 3, "width": 4, "factor": "degree"})


def test_the_full_plan_makes_all_that_the_claims_need():
    plan = runs.full_plan(("sst2", "rte"), None, Path("model.gguf"))
    for claim in CLAIMS:
        found = runs.needed(plan, [claim], everything=False)
        assert all(runs.matching([need], [run.name for run in found]) for need in claim.needs), claim.key
    assert runs.needed(plan, [], everything=True) == plan
    (figure3,) = (claim for claim in CLAIMS if claim.key == "convergence")
    # The comparisons give the rates, and say whether full fine-tuning has learnt.
    assert [run.name for run in runs.needed(plan, [figure3], everything=False)] == [
        "method_comparison/sst2", "method_comparison/rte-rates", "method_comparison/rte", "convergence",
    ]  # fmt: skip


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.settling_command], ids=lambda claim: claim.key)
def test_the_command_that_would_settle_a_claim_is_one_that_its_module_takes_and_makes_what_it_needs(claim):
    _, _, module, *options = shlex.split(claim.settling_command)
    if module != "analyses.claims":
        tyro.cli(importlib.import_module(module).Config, args=options)
        assert any(module == f"analyses.{need.split('/')[0]}" for need in claim.needs)
        return
    config = tyro.cli(claims.Config, args=options)
    found = [run.name for run in runs.needed(claims._plan(config), [claim], everything=False)]
    assert all(runs.matching([need], found) for need in claim.needs)


def test_the_plan_of_a_language_model_has_kernels_of_label_words_alone():
    for model in ("smollm2-135m", "folder/smollm2-135m.gguf"):
        (run,) = model_plan(model, ("sst2", "rte"), None)
        assert (run.options["head"], run.options["model"]) == ("label_words", model)


def test_the_plan_of_a_model_is_of_that_model_in_a_folder_of_its_name():
    plan = model_plan("hub/mpnet-base", ("sst2", "rte"), None)
    for run in plan:
        assert run.name.startswith("mpnet-base/")
        options = options_of(run.config(Path("results")))
        assert options.get("model", options.get("models")) in ("hub/mpnet-base", ["hub/mpnet-base"])
        assert placed(run.name) == ("mpnet-base", run.name.removeprefix("mpnet-base/"))
    (scale,) = (claim for claim in CLAIMS if claim.key == "theorem1-scale")
    assert [run.name for run in runs.needed(plan, [scale], everything=False)] == [
        f"mpnet-base/{analysis}/{task}" for analysis in ("peft_kernels", "kernel_distance") for task in ("sst2", "rte")
    ]  # fmt: skip


def test_results_of_another_model_are_found_by_their_folder(tmp_path):
    shutil.copytree(ROOT / STORED / "parameter_count", tmp_path / "parameter_count")
    shutil.copytree(ROOT / STORED / "kernel_distance" / "sst2", tmp_path / "mpnet-base" / "kernel_distance" / "sst2")
    found = load_tree(tmp_path)
    assert list(found) == ["parameter_count", "mpnet-base/kernel_distance/sst2"]
    claims.main(claims.Config(load=tmp_path, output_dir=tmp_path / "reports", only=("theorem1-scale",)))
    (row,) = json.loads((tmp_path / "reports" / "ledger.json").read_text("utf-8"))["rows"]
    assert row["models"] == {"mpnet-base": {"met": 1, "partly met": 0, "not met": 0, "undecided": 0, "not testable": 0}}
    assert "mpnet-base: 1 met" in (tmp_path / "reports" / "claims.md").read_text("utf-8")
    (tmp_path / "mpnet-base" / "kernel_distance").rename(tmp_path / "mpnet-base" / "memory")
    with pytest.raises(
        UserError, match=r"belongs in .*kernel_distance, or, of another model, in .*MODEL/kernel_distance"
    ):
        load_tree(tmp_path)


def test_every_command_line_can_be_read():
    for path in sorted([*(ROOT / "analyses").glob("*.py"), *(ROOT / "analyses").glob("*/__main__.py")]):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        analysis = getattr(module, "ANALYSIS", None)
        if analysis is not None or "tyro.cli(Config" in path.read_text("utf-8"):
            with pytest.raises(SystemExit) as stop:
                tyro.cli(module.Config if analysis is None else analysis.config, args=["--help"])
            assert stop.value.code == 0


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes(tmp_path):
    def message(**options):
        with pytest.raises(MISTAKES) as error:
            claims.main(claims.Config(**options))
        return str(error.value)

    assert "is not a folder" in message(load=tmp_path / "nowhere")
    assert "holds no result folder" in message(load=tmp_path)
    assert "no claim figure8; there are" in message(load=tmp_path, only=("figure8",))
    assert "--load runs nothing" in message(load=tmp_path, quick=True)
    assert "--load runs nothing" in message(load=tmp_path, model="mpnet-base")
    assert "--quick is of the default model" in message(quick=True, model="mpnet-base", output_dir=tmp_path / "new")
    assert "name one task" in message(tasks=())
    shutil.copytree(ROOT / STORED / "theorem1", tmp_path / "memory")
    assert "is a result of theorem1" in message(load=tmp_path)
    assert "holds results that --quick did not make" in message(quick=True, output_dir=tmp_path)
    (tmp_path / "memory").rename(tmp_path / "theorem1")
    (tmp_path / "theorem1" / RESULT_FILE).write_text("{", encoding="utf-8")
    assert "is damaged or was changed by hand" in message(load=tmp_path)
    (tmp_path / "theorem1" / "SHA256SUMS").unlink()
    assert "cannot read" in message(load=tmp_path)
    (tmp_path / runs.MARK).touch()
    assert "holds a quick run" in message(output_dir=tmp_path)
    (tmp_path / "file").touch()
    assert "cannot write" in message(output_dir=tmp_path / "file" / "below")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_a_broken_figure_is_named(tmp_path, damage):
    """By its path in one line, with the command that draws it again."""
    content = (ROOT / STORED / "theorem1" / "theorem1.png").read_bytes()
    damaged = {"empty": b"", "cut": content[: len(content) // 2], "text": b"no figure",
               "flipped": content[:40] + b"\xff\xff\xff\xff" + content[44:]}  # fmt: skip
    (tmp_path / "theorem1").mkdir()
    path = tmp_path / "theorem1" / "theorem1.png"
    path.write_bytes(damaged[damage])
    with pytest.raises(RecordError, match=f"^{path} is damaged .*python -m figures.all {tmp_path}$"):
        pictures(tmp_path, ["theorem1"], {})


def test_figures_of_the_page_have_captions():
    stems = {path.stem for path in (ROOT / STORED).rglob("*.png")}
    assert stems <= set(captions())
