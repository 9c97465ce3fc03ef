"""Whose code computes a model's blocks: `auto` of `train.kernels` and `train.compile`, each with its reason."""

import importlib.util
import math
import os
import shutil
import sys

from lorakit.amounts import counted, duration
from lorakit.errors import UserError
from lorakit.hardware.devices import Devices
from lorakit.hardware.gpus import slowest_gpu
from lorakit.hardware.machine import Machine, gpu_throughput
from lorakit.model.kernel_families import kernel_family
from lorakit.plan.memory import SizedRun
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.runtime import run_workload, training_seconds
from lorakit.recipe.adapter_kind import adapter_spec
from lorakit.recipe.schema import Recipe

# Seconds of a run that compiling, a minute or two of them, is worth.
_REPAID = 1800
_WAITING = "devices that share out the base wait for each other inside a pass"


def choose_kernels(
    recipe: Recipe, dtype: str, machine: Machine, info: ModelInfo | None, devices: Devices
) -> tuple[str, str]:
    """on or off, and why; `auto` where the model is not known."""
    if machine.is_gpu and machine.device != "cuda":
        return "off", "Liger-Kernel's run on NVIDIA's and AMD's GPUs"
    if not machine.is_gpu and dtype != "float32":
        return "off", "lorakit's own for a processor compute in float32"
    if machine.is_gpu and not machine.bfloat16:
        return "off", f"Triton, in which they are written, does not support {machine.name} (compute capability < 8.0)"
    if recipe.train.compile == "on":
        return "off", "train.compile is on: the compiler joins the same operations itself"
    if _waits(recipe, devices):
        return "off", f"{_WAITING}, so that a kernel that fails on one of them could not be given up"
    if info is None:
        return "auto", "set when the run starts: it depends on the model's family, and the model is not here yet"
    if not kernel_family(info.model_type):
        return "off", f"there are none for {info.model_type} that lorakit knows"
    tried = "tried against the model's own code before the first step"
    if not machine.is_gpu:
        return "on", f"lorakit's own for a processor take fewer passes over memory; {tried}"
    if machine.here and not all(map(importlib.util.find_spec, ("liger_kernel", "triton"))):
        return "off", "liger-kernel is not installed: pip install 'lorakit[gpu]'"
    needs = "" if machine.here else ", where lorakit[gpu] is installed"
    return "on", f"Liger-Kernel's for {info.model_type}{needs}; {tried}"


def _waits(recipe: Recipe, devices: Devices) -> bool:
    """Whether processes may wait for each other inside a pass."""
    return devices.count > 1 and recipe.train.sharding != "none"


def check_compile(recipe: Recipe, machine: Machine, devices: Devices) -> None:
    """Refuse `compile: on` where it cannot work."""
    if recipe.train.compile != "on":
        return
    if adapter_spec(recipe.adapter).name == "dora":
        reason = "PEFT's DoRA, which the compiler would have to follow, cannot be compiled whole"
    elif _waits(recipe, devices):
        reason = f"{_WAITING}; it needs sharding: none"
    elif machine.here and not machine.is_gpu and not shutil.which(_compiler()):
        reason = f"on a processor it needs a C++ compiler, and there is no {_compiler()} here"
    elif machine.device == "mps":
        reason = "torch compiles for Apple's GPUs only as an experiment"
    elif machine.device == "cuda" and not machine.bfloat16:
        reason = f"Triton does not support {machine.name} (compute capability < 8.0)"
    else:
        return
    raise UserError(f"train.compile: {reason}. Write auto or off.")


def _compiler() -> str:
    """What torch calls (torch/_inductor/config.py)."""
    return (os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")).split()[0]


def choose_compile(
    recipe: Recipe, machine: Machine, run: SizedRun | None, rows: int | None, mean: float, devices: Devices
) -> tuple[str, str]:
    """on or off, and why. `run` has all other choices made; `rows` are drawn an epoch."""
    if not machine.is_gpu:
        return "off", "on a processor compiling takes most of a minute, and gains less than a tenth"
    if machine.device != "cuda" or not machine.bfloat16 or _waits(recipe, devices):
        return "off", "tried on NVIDIA's and AMD's GPUs alone, where processes do not wait for each other"
    if run is None or run.kernels:
        return "off", "Liger-Kernel's kernels and lorakit's adapter layers do by hand what it would"
    if run.quantization != "none" or run.trainable.dora:
        return "off", "with quantized weights and with DoRA lorakit's own adapter layers save more"
    steps = recipe.train.steps or (rows and math.ceil(rows * (recipe.train.epochs or 1) / recipe.train.batch_size))
    if not steps:
        return "off", "the length of the run is not known"
    rates = gpu_throughput(machine.card or slowest_gpu(machine.memory), recipe.model.dtype)
    micro, checkpointing = int(recipe.train.micro_batch), bool(recipe.train.gradient_checkpointing)
    seconds = training_seconds(run_workload(run, micro, checkpointing, length=mean, steps=steps), rates).likely
    planned = f"{counted(steps, 'step')} are planned to take {duration(seconds)}"
    if seconds < _REPAID:
        return "off", f"{planned}; compiling takes a minute or more, which is repaid after half an hour"
    return "on", f"{planned}; tried against plain code before the first step"
