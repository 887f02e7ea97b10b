"""The command line. Every command is a few lines here and its work elsewhere, imported when it runs: `--help` and
errors in a configuration answer in under a second.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 rejected (--require-promotion), 4 the loop is locked,
130 and 143 signals. stdout carries results, stderr progress.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from configs.load import InvalidConfig
from flows.quiet import silence
from search.errors import RatchetError, UserError

if TYPE_CHECKING:
    from configs.schema import Config

app = typer.Typer(
    name="ratchet",
    help="A self-improvement loop for language models that only ever turns one way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigArg = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="a .toml file or a shipped name; default: the last one used")
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one key: search.samples=32")
]
RunsOpt = Annotated[Path, typer.Option("--runs-dir", envvar="RATCHET_RUNS", help="where loops live")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print JSON on stdout")]
PrefectOpt = Annotated[str | None, typer.Option("--prefect", help="auto, on or off; default: as configured")]
RUNS = Path("runs")


@app.command("round")
def round_command(
    config: ConfigArg = None,
    overrides: SetOpt = None,
    control: Annotated[
        str | None, typer.Option(help="random or bootstrap: what the last round's gain is compared with")
    ] = None,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="give up the unfinished round: it is recorded as such")
    ] = False,
    require_promotion: Annotated[
        bool, typer.Option("--require-promotion", help="exit with 3 when the challenger is rejected")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check every hash of the champion first")] = False,
    prefect: PrefectOpt = None,
    runs_dir: RunsOpt = RUNS,
    as_json: JsonOpt = False,
) -> None:
    """Run one improvement round: resumes an unfinished one, else starts the next."""
    from flows.session import Session

    if control not in (None, "random", "bootstrap"):
        raise typer.BadParameter(f"--control {control}: expected random or bootstrap")
    session = Session(*_config(config, overrides, runs_dir), runs_dir, prefect=prefect, as_json=as_json)
    record = session.round(control=control, abandon=abandon, verify=verify)
    if require_promotion and (record is None or record.verdict not in ("promoted", "base")):
        raise typer.Exit(3)


@app.command("loop")
def loop_command(
    config: ConfigArg = None,
    rounds: Annotated[int | None, typer.Option(help="rounds to run; default: loop.rounds of the configuration")] = None,
    overrides: SetOpt = None,
    until_flat: Annotated[bool, typer.Option(help="stop when a round's gain is not significant")] = True,
    prefect: PrefectOpt = None,
    runs_dir: RunsOpt = RUNS,
    as_json: JsonOpt = False,
) -> None:
    """Run rounds until there are N of them, or until the gain of a round is not significant any more."""
    from flows.session import Session

    session = Session(*_config(config, overrides, runs_dir), runs_dir, prefect=prefect, as_json=as_json)
    session.loop(rounds, until_flat=until_flat)


@app.command()
def status(
    config: ConfigArg = None, overrides: SetOpt = None, runs_dir: RunsOpt = RUNS, as_json: JsonOpt = False
) -> None:
    """Where the loop stands, stage by stage."""
    from flows import status as module

    parsed, _, _ = _config(config, overrides, runs_dir)
    found = module.read_status(runs_dir, parsed.loop.name)
    _print_json(found) if as_json else module.show(found)


@app.command()
def plan(
    config: ConfigArg = None, overrides: SetOpt = None, runs_dir: RunsOpt = RUNS, as_json: JsonOpt = False
) -> None:
    """What a round would do and cost: problems, samples, tokens, FLOPs, time, detectable effect. Spends nothing."""
    from flows import plan as module

    parsed, _, _ = _config(config, overrides, runs_dir)
    found = module.make_plan(parsed, runs_dir)
    _print_json(found) if as_json else module.show(found)


@app.command("eval")
def eval_command(
    config: ConfigArg = None,
    overrides: SetOpt = None,
    model: Annotated[str, typer.Option(help="champion, base, reviser, or a model folder")] = "champion",
    strategies: Annotated[
        str | None,
        typer.Option(
            help="like 'majority,beam(width=2),dvts(vote=majority)'; default: greedy, pass, majority, and with a "
            "verifier best-of-n, beam, dvts, rebase and step rejection"
        ),
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="per problem, comma-separated; default: 1,4,16,64")] = None,
    unit: Annotated[str, typer.Option(help="of the budgets: samples, tokens or flops")] = "samples",
    split: Annotated[str, typer.Option(help="validation or test (a look at the test set is counted)")] = "validation",
    problems: Annotated[int, typer.Option(min=1, help="how many problems at most")] = 500,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="hard cap on the tokens generated, stored ones too; what is finished is reported"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="search again what is stored under runs/LOOP/eval")] = False,
    pool: Annotated[Path | None, typer.Option(help="a JSONL file of samples made elsewhere")] = None,
    task: Annotated[str | None, typer.Option(help="with --pool: the task that grades them")] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="a page and pictures: accuracy against samples, tokens and FLOPs; the compute-optimal choice by "
            "difficulty, what it saves, and what limits it. Compares more strategies by default",
        ),
    ] = False,
    larger: Annotated[
        str | None,
        typer.Option(help="with --report: folder of a larger model of the same task, for the exchange at equal FLOPs"),
    ] = None,
    runs_dir: RunsOpt = RUNS,
    as_json: JsonOpt = False,
) -> None:
    """Accuracy of search strategies against budget, with standard errors, paired gains and spend.

    Searches are kept under runs/LOOP/eval and reused. JSON rows hold strategy, budget, n, accuracy, se, failed,
    ungraded, gain (points over the better of greedy and majority at the same budget, with a 95 % interval),
    verifier_gain (the same over best_of_n_weighted), saving (the baseline's FLOPs at equal accuracy over its own; null
    out of its range, more_than where it never gets there), spend (of all problems together) and wall_s.
    """
    from flows import evaluation as module

    chosen = module.Request(_numbers(budgets) if budgets else None, strategies, unit, max_tokens, fresh)
    if larger is not None and not report:
        raise typer.BadParameter("--larger belongs to the report: add --report")
    if pool is not None:
        if task is None:
            raise typer.BadParameter("--pool needs --task: which task grades the answers, for example --task math")
        found = module.evaluate_pool(pool, task, chosen, report=report)
    else:
        parsed, name, given = _config(config, overrides, runs_dir)
        own = parsed.model.base in ("bootstrap", "scripted")
        if model == "base" and own and not (runs_dir / parsed.loop.name / "champion").exists():
            from flows.session import Session

            typer.echo(f"loop {parsed.loop.name} has no base yet: round 0 makes it, with its verifier", err=True)
            Session(parsed, name, given, runs_dir, prefect="off", as_json=False).base()
        found = module.evaluate_model(parsed, runs_dir, model, split, problems, chosen, report=report, larger=larger)
    if as_json:
        _print_json(found)
    else:
        from flows import eval_table

        eval_table.show(found)
        if "optimal" in found:
            from flows import optimal_report

            optimal_report.show(found["optimal"])


@app.command()
def solve(
    config: ConfigArg = None,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="as the task writes it: '3 5 7 > 22'")
    ] = None,
    overrides: SetOpt = None,
    budget: Annotated[int | None, typer.Option(min=1, help="samples; default: search.samples")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="like 'beam(width=4)'; default: search.strategy, or a majority vote")
    ] = None,
    model: Annotated[str, typer.Option(help="champion, base, reviser, or a model folder")] = "champion",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="hard cap on the tokens generated")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="show the search as a tree, and write a page of it")] = False,
    html: Annotated[Path | None, typer.Option(help="where the page goes; default: runs/LOOP/traces")] = None,
    runs_dir: RunsOpt = RUNS,
    as_json: JsonOpt = False,
) -> None:
    """Answer one question: searched for with the chosen strategy and budget."""
    from flows import solve as module

    if question is None:  # one argument is the question, of the configuration used last
        config, question = None, module.lone(config)
    parsed, _, _ = _config(config, overrides, runs_dir)
    asked = module.Question(question, strategy, budget, max_tokens, trace or html is not None)
    solution = module.ask(parsed, runs_dir, asked, model)
    page = None
    if asked.trace:
        page = module.write_page(solution, html or module.page_path(solution, runs_dir, parsed.loop.name))
    if as_json:
        _print_json(solution.to_json(tree=trace, page=page))
    else:
        module.show(solution, tree=trace, page=page)
    if solution.answer is None:
        _fail(solution.why_not(), 1)


@app.command()
def grade(
    task: Annotated[str, typer.Argument(metavar="TASK", help="countdown, arithmetic, gsm8k, math or jsonl")],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help='JSONL rows {"answer", "response"} or {"answer", "responses"}')
    ],
    out: Annotated[Path | None, typer.Option(help="write the rows back with `correct`: true, false or null")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Grade answers made elsewhere."""
    from search.grade import grade_file

    summary = grade_file(task, file, out)
    counts = {"task": task, "correct": summary.correct, "wrong": summary.wrong, "ungraded": summary.ungraded}
    if as_json:
        _print_json(counts)
    else:
        typer.echo(f"{task}: {summary.correct} correct, {summary.wrong} wrong, {summary.ungraded} ungraded")


@app.command()
def compare(
    config: ConfigArg = None,
    overrides: SetOpt = None,
    html: Annotated[Path | None, typer.Option(help="write a self-contained page")] = None,
    runs_dir: RunsOpt = RUNS,
    as_json: JsonOpt = False,
) -> None:
    """The iterations side by side: accuracy, coverage, spend, verdicts."""
    from flows import compare as module

    parsed, _, _ = _config(config, overrides, runs_dir)
    module.run(runs_dir, parsed.loop.name, as_json=as_json, html=html)


@app.command()
def track(config: ConfigArg = None, overrides: SetOpt = None, runs_dir: RunsOpt = RUNS) -> None:
    """Rebuild the MLflow record of the loop from the runs folder."""
    from flows import tracking

    silence()
    parsed, _, _ = _config(config, overrides, runs_dir)
    typer.echo(tracking.rebuild(runs_dir / parsed.loop.name, parsed.tracking))


@app.command()
def promote(
    config: ConfigArg = None,
    round_number: Annotated[int, typer.Option("--round", help="the round whose model becomes champion")] = -1,
    reason: Annotated[str, typer.Option(help="why; it is recorded")] = "",
    overrides: SetOpt = None,
    runs_dir: RunsOpt = RUNS,
) -> None:
    """Make the model of a round the champion by hand."""
    from flows import moves

    if not reason.strip() or round_number < 0:
        raise typer.BadParameter("say which and why: --round 2 --reason 'the gate set was too small'")
    parsed, _, _ = _config(config, overrides, runs_dir)
    typer.echo(moves.promote(parsed, runs_dir, round_number, reason))


@app.command()
def rollback(
    config: ConfigArg = None,
    reason: Annotated[str, typer.Option(help="why; it is recorded")] = "",
    overrides: SetOpt = None,
    runs_dir: RunsOpt = RUNS,
) -> None:
    """Go back to the champion before this one."""
    from flows import moves

    if not reason.strip():
        raise typer.BadParameter("say why: --reason 'worse in production'")
    parsed, _, _ = _config(config, overrides, runs_dir)
    typer.echo(moves.rollback(parsed, runs_dir, reason))


@app.command()
def deploy(
    config: ConfigArg = None,
    cron: Annotated[str, typer.Option(help="when, for example '0 2 * * *'")] = "0 2 * * *",
    timezone: Annotated[str, typer.Option(help="of the schedule")] = "UTC",
    overrides: SetOpt = None,
    runs_dir: RunsOpt = RUNS,
) -> None:
    """Serve the round as a Prefect deployment on a schedule: one round of a loop at a time."""
    silence()
    from flows import deploy as module
    from flows import searching

    parsed, name, given = _config(config, overrides, runs_dir)
    searching.check(parsed)
    module.deploy(name, cron, runs_dir, given, timezone=timezone, loop=parsed.loop.name)


@app.command()
def doctor(
    config: ConfigArg = None, overrides: SetOpt = None, runs_dir: RunsOpt = RUNS, as_json: JsonOpt = False
) -> None:
    """Check the machine: versions, devices, engines, servers, disk, configuration; say what to do."""
    from flows import doctor as module

    silence()
    findings = module.examine(config, overrides or [], runs_dir)
    _print_json([f.to_json() for f in findings]) if as_json else module.show(findings)
    if any(f.level == "error" for f in findings):
        raise typer.Exit(1)


# ---------------------------------------------------------------- shared


def _config(name: str | None, overrides: list[str] | None, runs_dir: Path) -> tuple[Config, str, list[str]]:
    """The configuration, as named or the last one used, with its name and overrides."""
    from configs import load
    from flows.runner import last_config, remember_config

    given = list(overrides or [])
    if name is None:
        last = last_config(runs_dir)
        if last is None:
            raise InvalidConfig("which configuration? None was used yet: for example `ratchet round countdown`")
        name, given = last[0], given or last[1]
    config = load.load(name, given)
    remember_config(runs_dir, name, given)
    return config, name, given


def _numbers(text: str) -> tuple[float, ...]:
    """Budgets; whole numbers, also written like 2e9."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(n >= 1 and n == int(n) for n in numbers if n < math.inf) or math.inf in numbers:
        raise typer.BadParameter(f"--budgets {text}: expected whole numbers from 1, for example 1,4,16,64")
    return tuple(map(int, dict.fromkeys(sorted(numbers))))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def _fail(message: object, code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"ratchet: {message}\n")
    sys.exit(code)


def main() -> None:
    """Entry point: one clear line for what a user can mend, a traceback for what is our fault."""
    silence()
    try:
        code = app(standalone_mode=False)
    except InvalidConfig as error:
        _fail(error, 2)
    except RatchetError as error:
        _fail(error, error.exit_code if isinstance(error, UserError) else 1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on where it stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("click", "typer") and hasattr(error, "format_message"):
            _fail(getattr(error, "format_message")(), 2)  # noqa: B009 - click's own usage errors
        raise
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
