"""`qa-deepspeed sweep`: a run for each combination of values; a table, tests by question and a page over all."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_deepspeed.cli.training.sweep_runs import Launch, SweepRun, finished_record, run_all
from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions, missing_options
from qa_deepspeed.qa.data.reading import resolve_files
from qa_deepspeed.qa.decoding.predictions import PREDICTIONS_FILE
from qa_deepspeed.qa.metrics.prediction_files import GoldFile, read_gold_files, read_predictions
from qa_deepspeed.qa.metrics.settings import RunScores, compare_with_best, summarize
from qa_deepspeed.qa.report.page import now
from qa_deepspeed.qa.report.sweep_page import spread, sweep_page, sweep_verdict
from qa_deepspeed.runs.requeue import REQUEUE_STATUS
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import output_file, write_json

SUMMARY_FILE, SWEEP_PAGE = "sweep.json", "sweep.html"

SEED = "seed"

REFUSED = {
    "do_train": "a sweep trains",
    "dry_run": "use --list",
    "overwrite_output_dir": "delete the output_dir to start a sweep again",
    "push_to_hub": "upload the chosen run afterwards",
}
"""Option that a sweep cannot have -> why, or what to do instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sweep`: its own, and those of `train`, each with one or several values."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of a run, which the flags add to")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of each run (default: 1), by torchrun if several")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="what starts a run instead, put before `qa_deepspeed train`: 'deepspeed --hostfile hosts --module'",
    )
    parser.add_argument(
        "--at_once", type=int, help="runs at the same time (default: as many as there are GPUs for; 1 on CPUs)"
    )
    parser.add_argument(
        "--list", action="store_true", help="write a YAML file for each run, print their names and end (a Slurm array)"
    )
    options.add_arguments(parser, RunOptions, "train")


def run(arguments: argparse.Namespace) -> int:
    """Run what is not finished, print the table; 0, 1 if runs failed, or 75 after preemption.

    Raises:
        UserError: options that cannot be, or none that has several values.
    """
    if "RANK" in os.environ:
        raise UserError("sweep starts its runs by itself: call it without a launcher, with --ranks or --launcher")
    runs = plan_runs(arguments)
    output_dir = runs[0].folder.parent
    for one in runs:
        one.write_config()
    if arguments.list:
        for one in runs:
            print(one.config)
        return 0
    launch = Launch.of(runs[0].options, arguments.ranks, arguments.launcher, arguments.at_once)
    statuses = run_all(runs, launch)
    scores = [scores_of(one) for one in runs if finished_record(one) is not None]
    if scores:
        report(output_dir, runs, scores)
    failed = [name for name, status in statuses.items() if status not in (0, REQUEUE_STATUS)]
    if REQUEUE_STATUS in statuses.values() or len(statuses) < len(runs):
        print("preempted: the same command resumes", flush=True)
        return REQUEUE_STATUS
    if failed:
        print(f"failed: {', '.join(failed)}; the same command starts them again, and keeps the others", flush=True)
    return 1 if failed else 0


def plan_runs(arguments: argparse.Namespace) -> list[SweepRun]:
    """The runs of the command line, those of a setting one after another.

    Raises:
        UserError: as `run`.
    """
    known = {field.name: field for field in options.fields_of(RunOptions, "train")}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    varied = {name: values for name in given if len(values := _values(name, given[name], known[name].metadata)) > 1}
    if not varied:
        raise UserError("nothing varies: give an option several values with commas between, like --seed 1,2,3")
    base = options.build(
        RunOptions, "train", {**given, **{name: values[0] for name, values in varied.items()}}, arguments.config
    )
    _check(base, varied)
    names = sorted(varied, key=lambda name: name == SEED)  # the seeds of a setting follow each other
    runs = []
    for combination in itertools.product(*(varied[name] for name in names)):
        chosen = dict(zip(names, combination, strict=True))
        folder = Path(str(base.output_dir)) / "_".join(_folder_part(*item) for item in chosen.items())
        settings = {**given, **chosen, "do_eval": "true", "output_dir": str(folder)}
        built = options.build(RunOptions, "train", settings, arguments.config)
        setting = ", ".join(f"{name} {value}" for name, value in chosen.items() if name != SEED)
        runs.append(SweepRun(folder.name, setting or "one setting", folder, built))
    names_of_runs = [one.name for one in runs]
    twice = next((name for name in names_of_runs if names_of_runs.count(name) > 1), None)
    if twice:
        raise UserError(f"two runs would have the folder {twice}: give each value once, in different words")
    return runs


def _values(name: str, raw: Any, metadata: Mapping[str, Any]) -> list[Any]:
    """The values of an option; one whose values are lists themselves, or a path that exists, has one."""
    if metadata["several"] or not isinstance(raw, str) or os.path.exists(raw):
        return [raw]
    values = [value.strip() for value in raw.split(",")]
    if not all(values):
        raise UserError(f"{name} '{raw}': a value is missing beside a comma")
    return values


def _folder_part(name: str, value: str) -> str:
    last = value.rstrip("/").rpartition("/")[2]  # of a path its last name
    return f"{name}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', last)}"


def _check(base: RunOptions, varied: Mapping[str, Any]) -> None:
    for name, instead in REFUSED.items():
        if name in base.given and getattr(base, name) != (name == "do_train"):
            raise UserError(f"sweep takes no {name}: {instead}")
    if "do_eval" in base.given and not base.do_eval:
        raise UserError("do_eval is false: a sweep chooses by the scores on predict_file, leave it out")
    if "output_dir" in varied:
        raise UserError("output_dir has several values: a sweep has one, with a folder for each run")
    if SEED in varied and base.validation_split:
        raise UserError("validation_split draws other questions with each seed: give --predict_file")
    missing = missing_options(base, True)
    if not (base.predict_file or base.data_dir or base.dataset_name or base.validation_split):
        missing.append("--predict_file (the development file, by which the sweep chooses)")
    if missing:
        raise UserError(f"missing: {', '.join(missing)} (see qa-deepspeed sweep --help)")


def scores_of(one: SweepRun) -> RunScores:
    """What a finished run scored.

    Raises:
        UserError: its predictions cannot be read.
    """
    record = finished_record(one)
    assert record is not None, "the run is finished"
    return RunScores(one.name, one.setting, record["metrics"], read_predictions(str(one.folder / PREDICTIONS_FILE)))


def report(output_dir: Path, runs: Sequence[SweepRun], scores: Sequence[RunScores]) -> None:
    """Print the table of settings, and write it as JSON and, with the questions, as a page."""
    base = runs[0].options
    metric = "exact" if base.metric_for_best_model == "exact" else "f1"
    rows = summarize(scores, metric)
    gold, where = _gold(base)
    tests = compare_with_best(gold, scores, rows, base.metric_language, metric) if gold else []
    print("\n" + "\n".join(_table(rows, tests, metric)) + "\n")
    print(f"{sweep_verdict(rows, tests, metric)}.")
    print(f"Chosen on {where}: scores of the best are optimistic, score the chosen run once on other data.")
    summary: dict[str, Any] = {"metric": metric, "data": where, "settings": rows, "tests": tests}
    summary["runs"] = {one.name: {"setting": one.setting, "metrics": one.metrics} for one in scores}
    write_json(output_dir / SUMMARY_FILE, summary)
    if gold is None:
        print("no tests by question and no page: the questions of a data set of the hub, or of a split, are in no file")
        return
    about = {"Runs": f"{len(scores)} of {len(runs)} in {output_dir}", "Data": where, "Date": now()}
    with output_file(output_dir / SWEEP_PAGE) as file:
        file.write(sweep_page(gold, scores, rows, tests, base.metric_language, metric, about))
    print(f"page: {output_dir / SWEEP_PAGE}", flush=True)


def _gold(base: RunOptions) -> tuple[GoldFile | None, str]:
    """The questions of the development file, if they are in a file of their own; and its name."""
    patterns = base.data_patterns("evaluate")
    if base.validation_split:
        return None, f"a part of {base.data_file('train')}"
    if not patterns:
        return None, f"{base.dataset_name}, {base.predict_split}"
    files = resolve_files(patterns)
    return read_gold_files(files), ", ".join(files)


def _table(rows: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """The settings as aligned columns, the best first."""
    by_setting = {test["setting"]: test for test in tests}
    cells = [["setting", "runs", "f1", "exact", f"best run by {metric}", "difference", "95% interval", "p"]]
    for row in rows:
        test = by_setting.get(row["setting"])
        ends = "{:+.2f} to {:+.2f}".format(*test["interval"]) if test else ""
        cells.append(
            [
                row["setting"],
                str(len(row["runs"])),
                spread(row, "f1"),
                spread(row, "exact"),
                f"{row['best_run']} ({row['best']:.2f})",
                f"{test['difference']:+.2f}" if test else "",
                ends,
                f"{test['p_value']:.3f}" if test else "",
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
