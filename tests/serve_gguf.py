"""Serve a GGUF file on 127.0.0.1 until standard input ends: python serve_gguf.py FILE [TEMPLATE_FILE].

The first line of standard output is the server's address.
"""

import sys
from pathlib import Path

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.hostnames, parameters.port = ["127.0.0.1"], 0
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 2048, 4, False
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
if sys.argv[2:]:
    parameters.chat_template = Path(sys.argv[2]).read_text(encoding="utf-8")
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
