"""Trackers: DeepSpeed's monitors (Weights & Biases, Comet, CSV files) get the curves of a run.

The run makes them, not DeepSpeed's engine, which logs the learning rate at the number of samples: wandb then drops
every point at the number of optimizer steps, which is smaller.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qa_deepspeed.config.option_groups import AUTO, TRACKERS
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.config_check import missing_package
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_bytes
from qa_deepspeed.utils.supported import require_names

NAMES = {"deepspeed.monitor.config": "get_monitor_config", "deepspeed.monitor.monitor": "MonitorMaster"}
"""Names of DeepSpeed in use: module -> names in it."""

SECTIONS = (*TRACKERS, "tensorboard")
"""Sections of a DeepSpeed config that enable a monitor; TensorBoard's is one beside this program's own."""

CSV_FOLDER = "csv_monitor"
"""Folder of the CSV files in the output folder."""


def fill_monitors(config: dict[str, Any], options: RunOptions, name: str, conflicts: list[str]) -> None:
    """Enable the monitors of `report_to` in a config, in place; a section that says otherwise is a conflict."""
    asked = options.report_to is not None
    run_name = options.run_name or Path(options.output_dir or "run").name
    for section in SECTIONS:
        wanted = section in TRACKERS and section in options.trackers
        enabled = (config.get(section) or {}).get("enabled", AUTO)
        if enabled == AUTO:
            if wanted:
                defaults = _defaults(section, options, run_name)
                config[section] = {**defaults, **(config.get(section) or {}), "enabled": True}
            elif config.get(section):
                config[section]["enabled"] = False
        elif section in TRACKERS and asked and bool(enabled) != wanted:
            state = str(bool(enabled)).lower()
            conflicts.append(f"{section}.enabled is {state} in {name}, report_to is {options.report_to}")
        label = {"csv_monitor": "job_name", "comet": "experiment_name"}.get(section)
        if options.run_name and label and (config.get(section) or {}).get("enabled") is True:
            config[section].setdefault(label, options.run_name)


def require_packages(config: dict[str, Any], options: RunOptions) -> None:
    """Raises UserError if the package of a monitor that `report_to` enables is not installed."""
    problem = missing_package(config)
    if problem:
        raise UserError(f"report_to {options.report_to}: {problem}")


def _defaults(section: str, options: RunOptions, run_name: str) -> dict[str, Any]:
    """Settings of a monitor that the config leaves to this program."""
    if section == "wandb":
        return {"project": os.environ.get("WANDB_PROJECT", "qa_deepspeed")}
    if section == "comet":
        return {"experiment_name": run_name, "samples_log_interval": 1}
    return {"output_path": str(Path(options.output_dir or ".") / CSV_FOLDER), "job_name": run_name}


def without_monitors(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config for DeepSpeed's engine, which is to make no monitors."""
    return {key: value for key, value in config.items() if key not in SECTIONS}


class Monitors:
    """The monitors of a run, on rank 0. One that fails costs its curves, not the run."""

    def __init__(self, config: Mapping[str, Any], options: RunOptions, done_steps: int) -> None:
        """done_steps: rows of later steps in CSV files of the output folder, which a resumed run repeats, are removed.

        Raises:
            UserError: a monitor cannot start (no login, no network).
        """
        require_names("deepspeed", {place: names.split() for place, names in NAMES.items()})
        sections = {key: config[key] for key in SECTIONS if key in config}
        named = ", ".join(enabled_monitors(config))
        if "wandb" in enabled_monitors(config):
            _name_for_wandb(options)
        try:
            settings = importlib.import_module("deepspeed.monitor.config").get_monitor_config(sections)
            self._master: Any = importlib.import_module("deepspeed.monitor.monitor").MonitorMaster(settings)
        except Exception as error:  # each tracker has exceptions of its own
            raise UserError(
                f"{named} cannot start ({_line(error)}): log in (wandb login, WANDB_MODE=offline, COMET_API_KEY), or "
                "leave it out of report_to and of the DeepSpeed config"
            ) from None
        self._failed = False
        if self._master.csv_monitor is not None:
            _continue_csv(self._master.csv_monitor, Path(str(options.output_dir)), done_steps)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve, by its tag, after optimizer step `step`."""
        self._try(lambda: self._master.write_events([(tag, value, step) for tag, value in values.items()]))

    def close(self) -> None:
        """End the trackers' runs, which sends what they still hold."""
        if self._master.wandb_monitor is not None:
            self._try(lambda: importlib.import_module("wandb").finish())
        if self._master.comet_monitor is not None:
            self._try(lambda: self._master.comet_monitor.experiment.end())

    def _try(self, act: Any) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:  # each tracker has exceptions of its own
            self._failed = True
            dist.log0(f"the trackers of the DeepSpeed config fail ({_line(error)}): the run continues without them")


def enabled_monitors(config: Mapping[str, Any]) -> list[str]:
    """The sections of the monitors that a config enables."""
    return [section for section in SECTIONS if (config.get(section) or {}).get("enabled") is True]


def _name_for_wandb(options: RunOptions) -> None:
    """Set what DeepSpeed passes to wandb by no argument: the run's name, and the folder of its files."""
    if options.run_name:
        os.environ["WANDB_NAME"] = options.run_name
    os.environ.setdefault("WANDB_NAME", Path(str(options.output_dir)).name)
    os.environ.setdefault("WANDB_DIR", str(options.output_dir))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _continue_csv(monitor: Any, output_dir: Path, done_steps: int) -> None:
    """Let the CSV files of an output folder continue where the run resumes, without a second header.

    Elsewhere DeepSpeed appends, since the files may be those of other runs.
    """
    folder = Path(monitor.log_dir)
    if not folder.resolve().is_relative_to(output_dir.resolve()):
        return
    for path in sorted(folder.glob("*.csv")):
        header, *rows = path.read_bytes().splitlines(keepends=True) or [b""]
        kept = [row for row in rows if row.split(b",")[0].isdigit() and int(row.split(b",")[0]) <= done_steps]
        write_bytes(path, b"".join([header, *kept]))
        monitor.filenames.append(path.stem)
