"""Trackers: a run's figures in the programs that people compare runs with, by transformers' own callbacks.

A tracker is a plain function of its settings, where it has any, and a `TrackedRun`; it opens the run in its library and
returns an `OpenRun`, whose callback is transformers' (`transformers.integrations`). `TrackerSpec` in
lorakit/registry.py has what it is registered with. lorakit/track/process.py calls it, in a process of its own.

The recipe reads this table: transformers and the libraries are imported when a function is called.
"""

import importlib

importlib.import_module("lorakit.track.trackers")
