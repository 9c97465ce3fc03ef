"""The trackers that lorakit knows: each opens a run in its library, or goes on with it."""

import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.registry import TRACKERS, Section

PROJECT = "lorakit"
"""The project of a run where neither the recipe nor the environment names one."""

Name = Annotated[str, Field(min_length=1)]

Sample = Mapping[str, Any]
"""A held-out row that was answered: `row` (its place), `prompt`, `reference` and `answer`."""

_SAMPLES, _PARTS = "eval/samples", ("row", "prompt", "reference", "answer")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run. `folder`: where what it stores on this machine goes; `id`: by which it knows the
    run from before, and `step`: after which that goes on; `parent`: the process that trains."""

    name: str
    folder: Path
    id: str | None = None
    step: int = 0
    parent: int = 0


@dataclass(frozen=True)
class OpenRun:
    """A run that a tracker has opened. `place`: where a person finds it, in words; `close` is told whether the run is
    complete; `arguments`: what the callback reads of transformers' training arguments; `last_steps`: of a run that goes
    on, the metrics that the tracker has already, up to which step; `log_samples` is told the answers after a step."""

    callback: Any
    id: str
    place: str
    close: Callable[[bool], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    last_steps: Mapping[str, int] = field(default_factory=dict)
    log_samples: Callable[[int, Sequence[Sample]], Any] = lambda step, samples: None


def samples_as_rows(samples: Sequence[Sample]) -> list[list[str]]:
    """The cells of a table: place, prompt, reference and answer."""
    return [[sample.get(part, "") for part in _PARTS] for sample in samples]


def samples_as_markdown(samples: Sequence[Sample]) -> str:
    """Each part of each row as a text that is shown as it is."""
    parts = []
    for sample in samples:
        parts.append(f"### {sample['row']}")
        for part in _PARTS[1:]:
            text = "\n".join(f"    {line}" for line in sample.get(part, "").splitlines())
            parts += [f"**{part}**", text]
    return "\n\n".join(parts) + "\n"


def without_credentials(text: str) -> str:
    """A text whose addresses name no user and no password."""
    return re.sub(r"//[^/@\s]+@", "//", text)


@TRACKERS.register("tensorboard", modules=("tensorboardX",))
def tensorboard(tracked: TrackedRun) -> OpenRun:
    """Event files for TensorBoard in the run's folder, or in TENSORBOARD_LOGGING_DIR."""
    from tensorboardX import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(tracked.folder)
    # TensorBoard forgets what was written from this step on before the run went on.
    writer = SummaryWriter(folder, purge_step=tracked.step + 1 if tracked.id else None)
    place = f"{folder} (tensorboard --logdir {quote(folder)})"
    return OpenRun(
        TensorBoardCallback(writer),
        tracked.id or tracked.name,
        place,
        lambda _: writer.close(),
        log_samples=lambda step, samples: writer.add_text(_SAMPLES, samples_as_markdown(samples), step),
    )


class WandbSettings(Section):
    """How Weights & Biases gets a run. Who you are is its own matter: `wandb login`, or WANDB_API_KEY."""

    project: Name | None = None
    """The project; null takes WANDB_PROJECT, or `lorakit`."""
    entity: Name | None = None
    """The user or the team that the project belongs to; null takes WANDB_ENTITY, or your own."""
    name: Name | None = None
    """What the run is called; null takes the recipe's name."""
    group: Name | None = None
    """The group of the run."""
    tags: list[Name] = []
    """The run's tags."""
    mode: Literal["online", "offline"] | None = None
    """offline writes into the run's folder, and `wandb sync` sends it later; null takes WANDB_MODE, or online."""


@TRACKERS.register("wandb", modules=("wandb",), settings=WandbSettings)
def wandb(settings: WandbSettings, tracked: TrackedRun) -> OpenRun:
    """Weights & Biases, online or offline."""
    import wandb as library
    from transformers.integrations import WandbCallback

    # There is no model in this process to watch or to upload.
    for variable in ("WANDB_LOG_MODEL", "WANDB_WATCH"):
        os.environ.pop(variable, None)
    run = library.init(
        project=settings.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        entity=settings.entity,
        name=settings.name or tracked.name,
        group=settings.group,
        tags=settings.tags or None,
        mode=settings.mode,
        id=tracked.id or secrets.token_hex(4),
        resume="allow" if tracked.id else None,
        dir=os.environ.get("WANDB_DIR") or str(tracked.folder.parent),  # in which it makes the folder wandb
        settings=library.Settings(console="off", silent=True, x_stats_pid=tracked.parent or os.getpid()),
    )
    folder = Path(run.dir).parent
    place = f"{folder} (wandb sync {quote(str(folder))})" if run.offline else str(run.url)

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        table = library.Table(columns=[*_PARTS], data=samples_as_rows(samples))
        run.log({_SAMPLES: table, "train/global_step": step})

    return OpenRun(
        WandbCallback(),
        run.id,
        place,
        lambda complete: run.finish(0 if complete else 1),
        log_samples=log_samples,
    )


class MLflowSettings(Section):
    """How MLflow gets a run. Its server is MLFLOW_TRACKING_URI's; without that, a database in the run's folder."""

    experiment: Name | None = None
    """The experiment; null takes MLFLOW_EXPERIMENT_NAME, or `lorakit`."""
    name: Name | None = None
    """What the run is called; null takes the recipe's name."""
    tags: dict[Name, str] = {}
    """The run's tags."""


@TRACKERS.register("mlflow", modules=("mlflow",), settings=MLflowSettings)
def mlflow(settings: MLflowSettings, tracked: TrackedRun) -> OpenRun:
    """MLflow, on a tracking server or in a SQLite database in the run's folder."""
    import mlflow as library
    from transformers.integrations import MLflowCallback

    os.environ["MLFLOW_FLATTEN_PARAMS"] = "1"
    experiment = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    if os.environ.get("MLFLOW_TRACKING_URI"):
        library.set_experiment(experiment)
    else:
        folder = tracked.folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        library.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        if library.get_experiment_by_name(experiment) is None:
            library.create_experiment(experiment, (folder / "artifacts").as_uri())
        library.set_experiment(experiment)
    last_steps = {}
    if tracked.id:
        os.environ["MLFLOW_MAX_LOG_PARAMS"] = "0"  # MLflow lets nothing be written over them
        client = library.MlflowClient()
        for metric in client.get_run(tracked.id).data.metrics:
            last_steps[metric] = max(point.step for point in client.get_metric_history(tracked.id, metric))
    run = library.start_run(run_id=tracked.id, run_name=settings.name or tracked.name, tags=settings.tags or None)
    return OpenRun(
        MLflowCallback(),
        run.info.run_id,
        f"{without_credentials(library.get_tracking_uri())}, experiment {experiment}",
        lambda complete: library.end_run("FINISHED" if complete else "KILLED"),
        last_steps=last_steps,
        # A file for each step: what is sent a second time takes the place of the first.
        log_samples=lambda step, samples: library.log_text(samples_as_markdown(samples), f"samples/step-{step:06d}.md"),
    )


class TrackioSettings(Section):
    """How Trackio gets a run. A server of your own is TRACKIO_SERVER_URL's; without that or a space, a database in the
    run's folder, or in TRACKIO_DIR."""

    project: Name | None = None
    """The project; null takes TRACKIO_PROJECT, or `lorakit`."""
    name: Name | None = None
    """What the run is called, before four letters and digits of its own; null takes the recipe's name."""
    space: Name | None = None
    """The Hugging Face Space that gets it, such as user/runs, which is made where there is none; null takes \
TRACKIO_SPACE_ID."""
    private: bool | None = None
    """Whether a Space that is made is private; null leaves it to the hub."""


@TRACKERS.register("trackio", modules=("trackio",), settings=TrackioSettings)
def trackio(settings: TrackioSettings, tracked: TrackedRun) -> OpenRun:
    """Trackio, in a database in the run's folder, on a Hugging Face Space or on a server of your own."""
    if not os.environ.get("TRACKIO_DIR"):
        os.environ["TRACKIO_DIR"] = str(tracked.folder.absolute())  # which it reads when it is imported
    import trackio as library
    from transformers.integrations import TrackioCallback

    project = settings.project or os.environ.get("TRACKIO_PROJECT") or PROJECT
    # Trackio goes on with a run of the same name: another one must not have it.
    name = tracked.id or f"{settings.name or tracked.name}-{secrets.token_hex(2)}"
    space = settings.space or os.environ.get("TRACKIO_SPACE_ID")
    folder = os.environ["TRACKIO_DIR"]
    local = f"{folder} (TRACKIO_DIR={quote(folder)} trackio show --project {quote(project)})"
    place = space or without_credentials(os.environ.get("TRACKIO_SERVER_URL", "").partition("?")[0]) or local
    arguments = {
        "project": project,
        "run_name": name,
        "trackio_space_id": space,
        "trackio_static_space_id": False,  # no second Space at the end
        "hub_private_repo": settings.private,
    }

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        table = library.Table(columns=[*_PARTS], data=samples_as_rows(samples))
        library.log({_SAMPLES: table, "train/global_step": step})

    return OpenRun(TrackioCallback(), name, place, lambda _: None, arguments, log_samples=log_samples)
