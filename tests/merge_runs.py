"""A run merged as `lorakit merge RUN` does, for tests of what comes after."""

from pathlib import Path

from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.run_dir import Run


def merged_run(run: Run) -> Path:
    """The merged folder in the run's own."""
    opened, prepared = reopen_run(run.folder, Silent())
    merge(input_of_run(opened, prepared, Silent()), opened.merged, Silent())
    return opened.merged
