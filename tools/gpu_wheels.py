"""Wheels for a machine without a network that has Python, torch and the usual numeric packages.

Everything that lorakit's GPU script and tests import, at the versions of requirements.txt, and Liger's kernels, for
another version of Python on x86-64 Linux; but not torch and what comes with it, nor the large packages below, which
such machines have. bitsandbytes' wheel is left with the kernels of a few versions of CUDA. The wheels are laid into
folders .wheels/1, .wheels/2 ... of at most 55 MiB each, for machines that take only so much at a time, and take 60 MB
in all.

    gpu_wheels.py PYTHON_VERSION [CUDA_VERSION...]      such as 3.12 12.8
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".wheels"
ROOM = 55 << 20
TOTAL = 60_000_000
CUDA = ("12.6", "12.8", "13.0", "13.2")  # those that torch's wheels are built for
THERE = {"torch", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "pip"}
LEFT_OUT = {"hf-xet", "sacrebleu", "rouge-score"}  # downloads, and metrics that the script does not take
LIGER = "liger-kernel==0.8.5"  # beside it only triton is needed, which comes with torch
TESTS = ("pytest", "pytest-timeout", "hypothesis")
# glibc versions that wheels are tagged with; pip takes exactly the tags that it is given.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 27, 28, 31, 34)]
PLATFORMS += ["manylinux1_x86_64", "manylinux2014_x86_64"]


def main() -> None:
    """Download, and say what lies where."""
    version, cuda = sys.argv[1], sys.argv[2:] or CUDA
    with tempfile.TemporaryDirectory() as folder:
        lines = pins(needed())
        download(lines if any(line.startswith("liger") for line in lines) else [*lines, LIGER], version, Path(folder))
        for wheel in Path(folder).glob("bitsandbytes-*.whl"):
            keep_cuda(wheel, tuple(cuda))
        parts = packed(sorted(Path(folder).glob("*.whl"), key=lambda wheel: -wheel.stat().st_size))
        shutil.rmtree(WHEELS, ignore_errors=True)
        for number, part in enumerate(parts, start=1):
            place = WHEELS / str(number)
            place.mkdir(parents=True)
            for wheel in part:
                (place / wheel.name).write_bytes(wheel.read_bytes())
            size = sum(wheel.stat().st_size for wheel in part) / 2**20
            print(f"{place.relative_to(ROOT)}: {len(part)} wheels, {size:.0f} MiB, for Python {version}")
        total = sum(wheel.stat().st_size for part in parts for wheel in part)
        print(f"{total / 1e6:.1f} MB in all, with bitsandbytes' kernels for CUDA {', '.join(cuda)}")
        if total > TOTAL:
            sys.exit(f"more than {TOTAL / 1e6:.0f} MB: name the version of CUDA that the machine's torch has")


def keep_cuda(wheel: Path, versions: tuple[str, ...]) -> None:
    """Write bitsandbytes' wheel anew without the kernels of other versions of CUDA, and of other makers' devices."""
    kept = {f"libbitsandbytes_cuda{version.replace('.', '')}.so" for version in versions} | {"libbitsandbytes_cpu.so"}

    def stays(path: str) -> bool:
        name = path.rpartition("/")[2]
        return not name.startswith("libbitsandbytes_") or name in kept

    pruned = wheel.with_suffix(".pruned")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(pruned, "w", zipfile.ZIP_DEFLATED) as part:
        for entry in filter(lambda entry: stays(entry.filename), whole.infolist()):
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if stays(line.split(",")[0])).encode()
            part.writestr(entry.filename, content)
    pruned.replace(wheel)


def needed() -> set[str]:
    """The names of every package that lorakit and its tests stand on, read from what is installed here."""
    found: set[str] = set()

    def follow(name: str) -> None:
        name = canonicalize_name(name)
        if name in found or name in THERE | LEFT_OUT:
            return
        try:
            wanted = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            return  # for another system or Python
        found.add(name)
        for one in wanted:
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                follow(one.name)

    for name in ("lorakit", *TESTS):
        follow(name)
    return found - {"lorakit"}


def pins(names: set[str]) -> list[str]:
    """Their lines of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line[:1] not in ("", "#") and canonicalize_name(line.split("==")[0]) in names]


def download(lines: list[str], version: str, folder: Path) -> None:
    """Wheels as the index has them; what it has only as source is pure Python, and is built here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--only-binary=:all:", "--python-version", version, "--implementation", "cp"]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    download = [*pip, "download", "--no-deps", *target, "-d", str(folder)]
    if not subprocess.run([*download, *lines], capture_output=True).returncode:
        return
    for line in lines:
        if subprocess.run([*download, line], capture_output=True).returncode:
            subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), line], check=True)


def packed(wheels: list[Path]) -> list[list[Path]]:
    """The wheels, largest first, in as few folders as they fit into."""
    parts: list[list[Path]] = []
    for wheel in wheels:
        size = wheel.stat().st_size
        fitting = (part for part in parts if size + sum(other.stat().st_size for other in part) <= ROOM)
        part = next(fitting, None)
        if part is None:
            parts.append([wheel])
        else:
            part.append(wheel)
    return parts


if __name__ == "__main__":
    main()
