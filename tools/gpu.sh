#!/usr/bin/env bash
# What a GPU shows in under nine minutes; each part's result is written as it finishes.
#
#   tools/gpu.sh [--out DIR] [--minutes N]   run here; results in DIR (runs/gpu): results.json, summary.md, log.txt
#   tools/gpu.sh --rehearse                  the same on a processor, with tiny models
#   tools/gpu.sh wheels [PYTHON [CUDA...]]   with a network: put into .wheels/ what a machine without one lacks, for
#                                            these versions of Python and CUDA (3.12, and four of CUDA): 60 MB at most
#   tools/gpu.sh install DIR...              on that machine: install wheels from these folders, then stop
#
# PYTHON names the interpreter that has torch (python3). A machine that takes little at a time gets .wheels/1, .wheels/2
# and so on in turn: `install` each, then run. On a machine with a network `make gpu` does it all.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=${LORAKIT_SITE:-${TMPDIR:-/tmp}/lorakit-site}

case "${1:-}" in
wheels)
    shift
    exec "$python" tools/gpu_wheels.py "${@:-3.12}"
    ;;
install)
    shift
    for folder in "$@"; do
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$folder"/*.whl
    done
    exit
    ;;
esac

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
[ ! -d "$site" ] || export PYTHONPATH="$PYTHONPATH:$site"
exec "$python" tools/gpu.py "$@"
