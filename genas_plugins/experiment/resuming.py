"""What a run that is resumed must have in common with the one that it continues, and what it may change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genas_plugins._messages import escaped
from genas_plugins._reading import ReadingError, read_json
from genas_plugins.checkpoints import load_supernet
from genas_plugins.datasets import SearchData, check_identity, write_identity
from genas_plugins.experiment import config
from genas_plugins.files import write_text
from genas_plugins.scoring import CombinedScore, Recalibration
from genas_plugins.search import History, JsonLines

__all__ = [
    "MAY_CHANGE",
    "RUN_FILE",
    "RunHistory",
    "begin",
    "check_began",
    "check_folder",
    "check_scored",
    "check_scores",
    "check_weights",
    "difference",
    "state_digest",
]

RUN_FILE = "run.json"
"""In a run folder: the settings that it began with, and hashes of the weights that its candidates were scored with."""

MAY_CHANGE = (
    *("data.root", "data.download"),
    *("training.accelerator", "training.num_workers", "training.threads", "training.logger"),
    *("search.in_flight", "search.service", "search.workers"),
)
"""Where the images lie, on what and by how many processes and threads is computed, and who is told: that decides no
result."""


# What older versions wrote where a newer one writes that nothing was said: they mean the same.
_UNSAID = {"score.recalibration_images": Recalibration.images}


def difference(before: config.Experiment, now: config.Experiment, sections: Sequence[str] | None = None) -> str | None:
    """The first setting that differs and may not, in words; ``None`` if there is none.

    Args:
        before: Settings.
        now: Others.
        sections: Only these of them; ``None`` for all.
    """
    for section, old in vars(before).items():
        if sections is not None and section not in sections:
            continue
        new = getattr(now, section)
        if not dataclasses.is_dataclass(old):
            if old != new:
                return f"{section} is {escaped(old)}, not {escaped(new)}"
            continue
        for key, value in vars(old).items():
            name, now_value = f"{section}.{key}", getattr(new, key)
            unsaid = name in _UNSAID and {value, now_value} == {None, _UNSAID[name]}
            if value != now_value and not unsaid and name not in MAY_CHANGE:
                return f"{name} is {escaped(value)}, not {escaped(now_value)}"
    return None


def check_began(folder: Path, experiment: config.Experiment, sections: Sequence[str] | None = None) -> None:
    """Raise if settings are not those with which the run in ``folder`` began; an older run has not stored them.

    Raises:
        ConfigError: The message names the setting.
    """
    stored = _read(folder).get("experiment")
    if stored is None:
        return
    try:
        began = config.parse(stored)
    except config.ConfigError as error:
        raise config.ConfigError(f"{folder / RUN_FILE} cannot be read ({error}): {_ADVICE}.") from error
    if told := difference(began, experiment, sections):
        raise config.ConfigError(
            f"{folder / 'config.yaml'} is not what the run began with ({told}): put that back, or start another run. "
            f"Without another result may change: {', '.join(MAY_CHANGE)}."
        )


def begin(folder: Path, experiment: config.Experiment, identity: Mapping[str, Any] | None) -> None:
    """Store what the run is begun, or gone on, with; files that say so already are left alone.

    Raises:
        OSError: A file cannot be written.
    """
    written, text = folder / "config.yaml", config.dump(experiment)
    if not written.is_file() or written.read_text(encoding="utf-8") != text:
        write_text(written, text)
    stored = _read(folder)
    if "experiment" not in stored:
        _write(folder, {"experiment": json.loads(json.dumps(dataclasses.asdict(experiment))), **stored})
    if identity is not None and not check_identity(folder, identity):
        write_identity(folder, identity)


def check_folder(folder: Path, experiment: config.Experiment, resume: bool) -> None:
    """Raise if a run cannot be begun, or gone on with, in a folder.

    Raises:
        ConfigError: The folder holds a run and ``resume`` is not set, holds another experiment or other files, or
            nothing to resume.
    """
    written = folder / "config.yaml"
    if written.exists():
        if not resume:
            raise config.ConfigError(
                f"{folder} already holds a run: continue it with --resume, or choose another --output."
            )
        if told := difference(config.load(written), experiment):
            raise config.ConfigError(
                f"{folder} holds a run of another experiment ({told}): resume it without --config and --set, or choose "
                "another --output."
            )
        check_began(folder, experiment)
        return
    if resume:
        raise config.ConfigError(f"{folder} holds no run to resume (no config.yaml); start it without --resume.")
    # A kill while the first file is written leaves a hidden one.
    if folder.exists() and (not folder.is_dir() or any(not item.name.startswith(".") for item in folder.iterdir())):
        raise config.ConfigError(f"{folder} is not an empty folder: choose another --output.")


class RunLines(JsonLines[Any]):
    """Lines of a run that were all measured with the same weights.

    Args:
        path: In the run's folder.
        weights: Names of the files there that hold the weights.
        read_only: See :class:`~genas_plugins.search.JsonLines`.
    """

    def __init__(self, path: Path, weights: Sequence[str], *, read_only: bool = False) -> None:
        super().__init__(path, read_only=read_only)
        self.weights = weights
        self._checked = read_only

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; the first that this process adds stores, or compares, the weights.

        Raises:
            ConfigError: The records before were scored with other weights.
        """
        if not self._checked:
            folder = self.path.parent
            found = check_weights(folder, self.weights, scored=bool(self.records))
            stored = _read(folder)
            if stored.get("weights") != found:
                _write(folder, {**stored, "weights": found})
            self._checked = True
        super().append(record)


class RunHistory(RunLines, History):
    """The history of a run, see :class:`RunLines` and :class:`~genas_plugins.search.History`."""

    def beside(self, name: str) -> RunLines:
        """Lines of another kind, measured with the same weights."""
        return RunLines(self.path.with_name(name), self.weights, read_only=self.read_only)


def check_scores(history: History, score: CombinedScore) -> None:
    """Raise if records were measured by another score, as far as they tell.

    Raises:
        HistoryError: The message has the line.
    """
    measured = {"flatness": "losses", "angle": "angle", "accuracy": "top1"}
    for number, record in enumerate(history.records):
        if record.status != "ok":
            continue
        for metric, key in measured.items():
            if (key in record) != (metric in score.metrics):
                there = "without" if metric in score.metrics else "with"
                raise history.error(number, f"was measured {there} {metric}, this search goes by {score.metric}")
        if "flatness" in score.metrics and record.sigmas != list(score.sigmas):
            told = f"{record.sigmas!r:.100}, this search measures at {list(score.sigmas)}"
            raise history.error(number, f"was measured at the sigmas {told}")


def check_scored(folder: Path, data: SearchData, history: RunHistory) -> None:
    """Raise if images or weights are not those of the run, before anything is written.

    Raises:
        DataChangedError: The images are others.
        ConfigError: The weights are others.
    """
    if data.identity is not None:
        check_identity(folder, data.identity)
    history.check()
    if history.records:
        check_weights(folder, history.weights, scored=True)


def check_weights(folder: Path, names: Sequence[str], *, scored: bool) -> dict[str, str]:
    """Raise if weights are not those with which candidates were scored; return their hashes by file.

    Args:
        folder: Run folder.
        names: Files in it.
        scored: There are such candidates.

    Raises:
        ConfigError: The message has the file.
        CheckpointError: One cannot be read.
    """
    found = {
        name: state_digest(load_supernet(folder / name).state_dict()) for name in names if (folder / name).exists()
    }
    stored = _read(folder).get("weights", {}) if scored else {}
    for name, digest in found.items():
        if stored.get(name, digest) != digest:
            raise config.ConfigError(
                f"{folder / name} is not the one that the candidates of this run were scored with: put that back, or "
                "remove history.jsonl to score all of them anew."
            )
    return found


def state_digest(state: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # As bytes: NumPy does not know all types.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_ADVICE = "restore it, or remove it if you are sure that nothing was changed since the run began"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    if not path.is_file():
        return {}
    try:
        stored = read_json(path)
    except ReadingError as error:
        raise config.ConfigError(f"{path} is damaged ({error}): {_ADVICE}.") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("weights", {}), dict):
        raise config.ConfigError(f"{path} is damaged: {_ADVICE}.")
    return stored


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    write_text(folder / RUN_FILE, json.dumps(content, indent=1) + "\n")
