"""Code that a model wrote: hostile and endless programs count as wrong and leave nothing behind."""

import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorakit[tasks]'")
pytest.importorskip("seccompy", reason="this machine has no seccomp")

from lorakit.errors import UserError
from lorakit.evaluate.benchmarks import confined_code
from lorakit.evaluate.benchmarks.confined_code import ConfinedCode, check_confinement, run_confined

RIGHT = {
    "an assertion": "assert 1 + 1 == 2",
    "the library": "import math, re, random, datetime, hashlib, typing\nrandom.random()\ndatetime.datetime.now()",
    "a file that is read": "open('/etc/hostname', 'rb').read() if __import__('os').path.exists('/etc/hostname') else 0",
    "a thread": "import threading\nt = threading.Thread(target=len, args=('',))\nt.start()\nt.join()",
    "a thread that stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "numpy": "import numpy as np\nassert np.eye(9).sum() == 9",
    "letters": "assert 'é' == '\\u00e9'",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_program_that_comes_to_its_end_passes(name):
    assert run_confined(RIGHT[name]) == "passed"


WRONG = {
    "an exception": "assert 1 == 2",
    "no Python": "def",
    "an exit": "import sys\nsys.exit(0)",
    "a hard exit": "import os\nos._exit(0)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a question to the terminal": "input()",
    "a process": "import os\nos.fork()",
    "a program": "import subprocess\nsubprocess.run(['true'], check=True)",
    "a program in its place": "import os\nos.execv('/bin/true', ['true'])",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
    "a socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "a new file": "open('FOLDER/new', 'w').write('x')",
    "a file opened to read, and made": "import os\nos.open('FOLDER/new', os.O_CREAT | os.O_RDONLY)",
    "a file that is changed": "open('FOLDER/kept', 'a').write('x')",
    "a file that is deleted": "import os\nos.remove('FOLDER/kept')",
    "a folder that is deleted": "import shutil\nshutil.rmtree('FOLDER')",
    "other rights of a file": "import os\nos.chmod('FOLDER/kept', 0)",
    "another time of a file": "import os\nos.utime('FOLDER/kept', (1, 1))",
    "a signal": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
    "a signal by a descriptor": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "limits of another": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "another's memory": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "all memory": "x = bytearray(1 << 34)",
    "words into every descriptor": "import os\nfor f in range(64):\n  try: os.write(f, b'x')\n  except OSError: pass",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_hostile_program_fails_and_changes_nothing(name, tmp_path):
    (tmp_path / "kept").write_text("kept")
    before = (tmp_path / "kept").stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = WRONG[name].replace("FOLDER", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))
        assert run_confined(code) == "failed"
    assert (tmp_path / "kept").stat() == before and [one.name for one in tmp_path.iterdir()] == ["kept"]


ENDLESS = {
    "a loop": "while True: pass",
    "a loop that catches everything": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "a sleep": "import time\ntime.sleep(60)",
    "a pattern": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "output": "while True: print('x' * 9999)",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_program_is_stopped(name):
    start = time.monotonic()
    assert run_confined(ENDLESS[name], seconds=0.3) == "timed out"
    assert time.monotonic() - start < 30


def test_the_metric_is_that_of_the_hub():
    """A share of problems by Chen et al.'s estimate, and every answer's outcome."""
    add, sub = "def f(a, b): return a + b", "def f(a, b): return a - b"
    tests = ["assert f(2, 3) == 5", "assert f(2, 3) == -1"]
    shares, results = ConfinedCode().compute(references=tests, predictions=[[add, sub], [add, add]], k=[1, 2, 9])
    assert shares == {"pass@1": 0.25, "pass@2": 0.5}
    assert [[one["passed"] for _, one in each] for each in results.values()] == [[True, False], [False, False]]


def test_code_that_ends_the_process_early_leaves_no_other(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(confined_code._PROGRAM.parents[3])!r})\n"
    code += "from lorakit.evaluate.benchmarks.confined_code import run_confined\n"
    code += "print([run_confined(text) for text in ('assert True', 'raise SystemExit')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['passed', 'failed']\n" and done.stderr == ""


def test_a_machine_that_cannot_confine_says_so(monkeypatch):
    check_confinement()
    monkeypatch.setitem(sys.modules, "seccompy", None)
    with pytest.raises(UserError, match=r"--allow-code: .*seccomp.*Linux"):
        check_confinement()
