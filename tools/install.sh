#!/usr/bin/env bash
# Set up a virtual environment from the pinned requirements: install.sh VENV
# Where there is no NVIDIA GPU, torch's CPU build is installed: it is a tenth of the size.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

"$python" - <<'PY' || { echo "lorakit needs Python 3.11 or newer; set PYTHON to one, such as PYTHON=python3.12" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

torch=$(sed -n 's/^torch==\([^+ ;]*\).*/\1/p' "$here/requirements.txt")
if [ "$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null)" != "$torch" ]; then
    if command -v rocm-smi >/dev/null || command -v amd-smi >/dev/null || command -v xpu-smi >/dev/null; then
        # The build for AMD's or Intel's GPU; uv knows which that is.
        pip install uv && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend auto "torch==$torch"
    elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        # First a CPU build that pip's own configuration offers; then the index that uv knows by name; then whatever there is.
        pip install "torch==$torch+cpu" 2>/dev/null ||
            { pip install uv && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu "torch==$torch"; } ||
            pip install "torch==$torch"
    else
        pip install "torch==$torch"
    fi
fi
pip install -r "$here/requirements.txt"
# DeepSpeed comes as source. It looks for torch while it is built, and what it would compile then is not used.
deepspeed=$(sed -n 's/.*"deepspeed>=\([^"]*\)".*/\1/p' "$here/pyproject.toml")
if ! "$venv/bin/python" -c "import importlib.metadata as m; assert m.version('deepspeed') == '$deepspeed'" 2>/dev/null; then
    pip install --upgrade setuptools &&
        DS_BUILD_OPS=0 pip install --no-build-isolation "deepspeed==$deepspeed" ||
        echo "DeepSpeed could not be installed: its tests are skipped" >&2
fi
# Liger's kernels: beside the Triton that torch's build for GPUs brings. Elsewhere both go into a folder of their own, where
# one test finds them and no library a Triton: they run in its interpreter (tests/test_kernels.py).
liger=$(sed -n 's/.*"liger-kernel>=\([^"]*\)".*/\1/p' "$here/pyproject.toml")
if "$venv/bin/python" -c 'import triton' 2>/dev/null; then
    pip install --no-deps "liger-kernel==$liger"
elif [ "$(uname -s)" = Linux ] && [ ! -d "$venv/kernels/triton" ]; then
    pip install --no-deps --target "$venv/kernels" "liger-kernel==$liger" "triton==3.7.1" ||
        echo "Triton could not be installed: the test of Liger's kernels is skipped" >&2
fi
pip install --no-deps --no-build-isolation --editable "$here"
