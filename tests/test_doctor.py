"""`lorakit doctor`: what is broken is told, with what to do, by a command that starts whatever is broken."""

import importlib.metadata
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from recipe_files import loaded

from lorakit.cli.doctor import _print
from lorakit.doctor import check, collective, machine, models
from lorakit.doctor.check import DoctorFinding, run_check
from lorakit.doctor.run import _sections, run_doctor
from lorakit.hardware.cgroups import CgroupLimits, read_cgroup_limits
from lorakit.hardware.drivers import DriverGpu, parse_gpus
from lorakit.hardware.machine import Machine, this_machine
from lorakit.hardware.threads import usable_processors
from lorakit.hardware.topology import parse_topology
from lorakit.plan.auto import resolve_auto
from lorakit.recipe.schema import Data, Model, Recipe

SECRET = "hf_do_not_show_me"


def by_name(findings) -> dict[str, DoctorFinding]:
    return {finding.name: finding for finding in findings}


def install(folder, name, version, requires=()):
    """A package that is there by its metadata alone."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]))


def doctor(*arguments, **variables):
    """Run the command in a process of its own: exit code, standard output, standard error."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "HF_TOKEN"))}
    command = [sys.executable, "-m", "lorakit", "doctor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, **variables})
    return done.returncode, done.stdout, done.stderr


# The whole, on this machine


@pytest.fixture(scope="module")
def healthy():
    """Every finding on this machine, whose packages are those of the tests."""
    return list(run_doctor(network=False))


def test_nothing_is_broken_where_the_tests_run(healthy):
    assert [finding for _, finding in healthy if finding.state == "broken"] == []
    sections = list(dict.fromkeys(section for section, _ in healthy))
    assert sections[:4] == ["Python", "Packages", "GPU", "bitsandbytes"] and len(sections) == 10


def test_bitsandbytes_is_really_called(healthy):
    found = by_name(finding for section, finding in healthy if section == "bitsandbytes")
    assert found.keys() == {"nf4", "q4", "q8", "adamw-8bit"}
    assert 0.08 < found["nf4"].figures["forward"] < 0.11  # Gaussian weights lose 0.092
    assert 0.11 < found["q4"].figures["backward"] < 0.14
    assert 0.001 < found["q8"].figures["forward"] < 0.02


def test_speed_is_measured_in_each_number_format(healthy):
    found = by_name(finding for section, finding in healthy if section == "Processor and memory")
    assert found["float32"].figures["speed"] > found["bfloat16"].figures["speed"] * 0.01 > 0
    assert found["memory"].figures["available"] <= found["memory"].figures["total"]


def test_what_auto_chooses_is_what_auto_chooses(healthy):
    told = {finding.name: finding.figures.get("value") for section, finding in healthy if "auto" in section}
    _, choices = resolve_auto(Recipe(model=Model(base="a/b"), data=Data(train="a/b")), this_machine(), None)
    chosen = {choice.path: choice.value for choice in choices}
    for path in ("model.dtype", "model.attention", "data.packing", "train.optimizer"):
        assert told[path] == chosen[path]


# A machine on which much is broken


@pytest.fixture(scope="module")
def ill(tmp_path_factory):
    """What the command says where bitsandbytes cannot be imported, two GPUs meet a torch without CUDA, threads are
    limited, lorakit's cache cannot be written, and the hub's cache holds a model: exit code, document, errors."""
    folder = tmp_path_factory.mktemp("ill")
    (folder / "packages" / "bitsandbytes").mkdir(parents=True)
    (folder / "packages" / "bitsandbytes" / "__init__.py").write_text(
        "print('noise')\nraise ImportError('libcudart.so.12: no such file')\n"
    )
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 24564, 24100, 550.54.14, 8.9'\n"
        "echo 'NVIDIA GeForce RTX 3060, 12288, 2000, 550.54.14, 8.6'\n"
    )
    smi.chmod(0o755)
    (folder / "file").touch()
    repository = folder / "hub" / "models--org--small"
    snapshot, blob = repository / "snapshots" / ("0" * 40), repository / "blobs" / "weights"
    for parent in (snapshot, blob.parent, repository / "refs"):
        parent.mkdir(parents=True)
    blob.write_bytes(bytes(3 << 20))
    (snapshot / "model.safetensors").symlink_to(blob)
    return doctor(
        "--json",
        PYTHONPATH=str(folder / "packages"),
        PATH=f"{smi.parent}{os.pathsep}{os.environ['PATH']}",
        LORAKIT_CACHE=str(folder / "file" / "cache"),
        HF_HUB_CACHE=str(folder / "hub"),
        HF_HUB_OFFLINE="1",
        HF_TOKEN=SECRET,
        OMP_NUM_THREADS="1",
    )


@pytest.fixture(scope="module")
def ill_findings(ill):
    found = json.loads(ill[1])["findings"]
    return {(item["section"], item["name"]): item for item in found}


def test_broken_things_are_findings_and_exit_code_1(ill):
    code, out, err = ill
    document = json.loads(out)
    assert code == 1 and document["ok"] is False and "Traceback" not in err
    assert {"section", "name", "state", "found", "remedy", "figures"} == document["findings"][0].keys()
    broken = {item["name"] for item in document["findings"] if item["state"] == "broken"}
    assert broken == {"bitsandbytes", "torch on GPU", "lorakit's cache"}


def test_a_package_that_cannot_be_imported_takes_no_other_down(ill_findings):
    found = ill_findings["Packages", "bitsandbytes"]
    assert "libcudart.so.12: no such file" in found["found"] and "--force-reinstall bitsandbytes==" in found["remedy"]
    assert ill_findings["Packages", "trl"]["state"] == "ok"
    assert "not tried" in ill_findings["bitsandbytes", "bitsandbytes"]["found"]


@pytest.mark.skipif("+cpu" not in importlib.metadata.version("torch"), reason="this torch has CUDA")
def test_a_gpu_beside_a_torch_without_cuda_is_broken(ill_findings):
    assert "without CUDA" in ill_findings["GPU", "torch on GPU"]["found"]
    assert "(cpu)" in ill_findings["What auto chooses here", "device"]["found"]


def test_gpus_are_told_with_memory_driver_and_which_is_used(ill_findings):
    first, second = ill_findings["GPU", "GPU 0"], ill_findings["GPU", "GPU 1"]
    for word in ("RTX 4090", "24.0 GiB", "550.54.14", "8.9"):
        assert word in first["found"]
    assert (
        first["state"] == "ok"
        and first["figures"]["memory"] == 24564 << 20
        and first["figures"]["driver"] == "550.54.14"
    )
    assert second["state"] == "note" and "other programs" in second["found"]
    used = ill_findings["GPU", "used"]["found"]
    assert "a training uses 2 of the 2 GPUs, one process each" in used and "the memory of the smallest" in used


@pytest.mark.skipif(usable_processors() < 2, reason="one thread is all that one core takes")
def test_threads_that_a_variable_limits_are_told(ill_findings):
    found = ill_findings["Processor and memory", "threads"]
    assert found["state"] == "note" and found["remedy"].startswith("unset OMP_NUM_THREADS")


def test_the_token_is_told_and_never_shown(ill, ill_findings):
    assert ill_findings["Hub", "token"]["found"] == "HF_TOKEN is set"
    assert SECRET not in ill[1] + ill[2]


def test_offline_and_the_size_of_the_hubs_cache_are_told(ill_findings):
    assert "HF_HUB_OFFLINE" in ill_findings["Hub", "offline"]["found"]
    assert ill_findings["Disk", "hub's cache"]["figures"]["size"] < 4 << 20  # the link is not counted again


def test_the_command_starts_where_torch_cannot_be_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')")
    code, out, err = doctor("--json", PYTHONPATH=str(tmp_path))
    found = json.loads(out)["findings"]
    assert code == 1 and "Traceback" not in err
    assert [item["name"] for item in found if item["state"] == "broken"] == ["torch"]
    torch = next(item for item in found if item["state"] == "broken")
    assert "libtorch_cpu.so: undefined symbol" in torch["found"] and "--force-reinstall torch==" in torch["remedy"]
    assert any(item["name"] == "model.dtype" for item in found)


def test_help_loads_no_torch():
    code = (
        "import sys; sys.argv = ['lorakit', 'doctor', '--help']\n"
        "from lorakit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'packaging'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Packages


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("torch", "2.1.0", "below 2.10 there are known security holes"),
        ("transformers", "5.2.9", "below 5.3 there are known security holes"),
        ("trl", "1.0.0", "lorakit is made for"),
        ("trl", "2.0.0", "lorakit is made for"),
        ("pyyaml", "5.1", "lorakit is made for"),
    ],
)
def test_a_version_that_lorakit_is_not_made_for_is_broken(tmp_path, monkeypatch, name, version, said):
    install(tmp_path, name, version)
    monkeypatch.syspath_prepend(tmp_path)
    findings = by_name(check.check_required())
    found = findings[name]
    assert {finding.name for finding in findings.values() if finding.state == "broken"} == {name}
    assert found.message.startswith(f"{version}: {said}")
    assert found.remedy.startswith(f"pip install --upgrade '{name}")


def test_a_missing_package_is_broken_and_a_missing_extra_is_a_note(tmp_path, monkeypatch):
    requires = ["torch>=2.10", "no-such-package>=1.2", "no-such-reader>=1; extra == 'gguf'"]
    install(tmp_path, "lorakit", "9.9", requires)
    monkeypatch.syspath_prepend(tmp_path)
    missing = by_name(check.check_required())["no-such-package"]
    assert (missing.state, missing.remedy) == ("broken", "pip install --upgrade 'no-such-package>=1.2'")
    extra = by_name(check.check_optional())["extra gguf"]
    assert (extra.state, extra.remedy) == ("note", "pip install 'lorakit[gguf]'")


# Checks


def test_a_check_that_fails_is_a_finding_after_what_it_found(monkeypatch, capsys):
    def check():
        print("noise of a library")
        yield DoctorFinding("first", "ok", "fine")
        raise RuntimeError("wrapped") from OSError("the cause\nand more")

    monkeypatch.delenv("LORAKIT_DEBUG", raising=False)
    first, second = run_check("disk", check)
    assert first.state == "ok" and (second.name, second.state) == ("disk", "broken")
    assert second.message == "the check failed with RuntimeError: the cause"
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LORAKIT_DEBUG", "1")
    with pytest.raises(RuntimeError):
        list(run_check("disk", check))


def test_a_quantized_layer_that_computes_wrong_is_broken(monkeypatch):
    import torch

    plain = torch.nn.Linear
    monkeypatch.setattr(machine, "_quantized_layer", lambda _, weight, dtype: plain(*weight.shape, bias=False))
    found = by_name(machine.check_bitsandbytes())
    assert {found[kind].state for kind in ("nf4", "q4", "q8")} == {"broken"} and "over 0.12" in found["nf4"].message


@pytest.mark.parametrize(("bfloat16", "told"), [(2e11, True), (1e11, False)])
def test_auto_is_questioned_where_the_measured_speed_says_otherwise(monkeypatch, bfloat16, told):
    slow = Machine("cpu", "a processor", 8 << 30, bfloat16=False)
    monkeypatch.setattr(machine, "usable_machine", lambda progress: slow)
    monkeypatch.setattr(machine, "matmul_speed", lambda _, dtype: (1e11 if dtype == "float32" else bfloat16, 512))
    found = by_name(machine.check_choices(None))["model.dtype"]
    assert ("2.0 times as fast" in found.message) is told and (found.state == "note") is told


def test_a_setting_of_the_recipe_that_cannot_work_here_is_broken(tmp_path, monkeypatch):
    slow = Machine("cpu", "a processor", 8 << 30, bfloat16=False)
    monkeypatch.setattr(machine, "usable_machine", lambda progress: slow)
    recipe = loaded(tmp_path, "model: {base: a/b, dtype: float16}\ndata: {train: train.jsonl}\n").recipe
    found = by_name(machine.check_choices(recipe))["settings"]
    assert found.state == "broken" and found.message.startswith("model.dtype: float16 needs a GPU")


def on(folder, **model) -> Recipe:
    return Recipe(model=Model(base=str(folder), **model), data=Data(train="any/rows"))


def test_a_recipe_whose_model_is_neither_here_nor_to_be_had_is_broken(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = by_name(models.check_base(on("org/nowhere")))["base"]
    assert found.state == "broken" and "HF_HUB_OFFLINE" in found.message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert by_name(models.check_base(on("org/nowhere")))["base"].state == "note"


def test_a_base_that_can_be_loaded_is_ok(tiny_base):
    (found,) = models.check_base(on(tiny_base))
    assert (found.name, found.state) == ("base", "ok") and "tokens, with" in found.message


def test_what_a_run_would_refuse_of_a_base_is_broken_with_its_remedy(tmp_path):
    config = {"model_type": "not_yet", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = by_name(models.check_base(on(tmp_path)))
    assert {finding.state for finding in found.values()} == {"broken"} and all(one.remedy for one in found.values())
    assert "has no .safetensors file" in found["base"].message
    assert found["base's family"].message.startswith("not_yet: transformers ")


@pytest.mark.slow
def test_a_recipe_is_asked_with_its_overrides(tmp_path, tiny_base):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {base: org/nowhere}\ndata: {train: any/rows}\n")
    (tmp_path / "config.json").write_text("{}")
    _, out, _ = doctor(str(path), "--set", f"model.base={tmp_path}")
    assert "names no model_type" in out
    code, _, err = doctor("--set", "model.base=org/other")
    assert code == 2 and "Name the recipe too" in err


def test_a_mistake_in_the_recipe_is_exit_code_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {base: a/b}\ndata: {trian: x}\n")
    code, out, err = doctor(str(tmp_path / "bad.yaml"))
    assert (code, out) == (2, "") and "data.trian" in err


def test_a_run_folder_that_cannot_be_written_is_broken(tmp_path):
    (tmp_path / "file").touch()
    assert by_name(machine.check_disk(tmp_path / "file" / "run"))["runs"].state == "broken"
    assert by_name(machine.check_disk(tmp_path / "new" / "run"))["runs"].state != "broken"


def test_what_nvidia_smi_does_not_know_is_no_error():
    assert parse_gpus("Orin (nvgpu), [N/A], [N/A], [N/A], 8.7\n") == [DriverGpu("Orin (nvgpu)", 0, 0, "[N/A]", "8.7")]


def test_a_gpu_on_the_bus_that_no_driver_shows_is_broken(tmp_path, monkeypatch):
    for name, vendor, kind in [("0", "0x10de", "0x030200"), ("1", "0x10de", "0x040300"), ("2", "0x8086", "0x030000")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert machine.count_gpus_on_bus(tmp_path) == 1 and machine.count_gpus_on_bus(tmp_path / "none") == 0
    monkeypatch.setattr(
        machine, "read_driver_gpus", lambda: ([], "nvidia-smi: couldn't communicate with the NVIDIA driver")
    )
    monkeypatch.setattr(machine, "count_gpus_on_bus", lambda: 1)
    found = by_name(machine.check_gpus())["driver"]
    assert found.state == "broken" and "couldn't communicate" in found.message
    monkeypatch.setattr(machine, "count_gpus_on_bus", lambda: 0)
    assert by_name(machine.check_gpus())["GPU"].state == "note"


def test_a_driver_that_this_torch_cannot_use_is_broken(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        machine, "read_driver_gpus", lambda: ([DriverGpu("a GPU", 8 << 30, 8 << 30, "470.1", "8.0")], "")
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = by_name(machine.check_torch())["torch on GPU"]
    assert found.state == "broken" and "CUDA 13.0" in found.message and "470.1" in found.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert by_name(machine.check_torch())["torch on GPU"].state == "ok"
    assert "hides every GPU" in by_name(machine.check_gpus())["visible"].message


# As nvidia-smi 550 prints it, with the escapes of its terminal.
TOPOLOGY = """\x1b[4m\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tSYS\tSYS\tPIX\t0-31,64-95\t0\t\tN/A
GPU1\tNV12\t X \tSYS\tSYS\tPXB\t0-31,64-95\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tNODE\tSYS\t32-63,96-127\t1\t\tN/A
GPU3\tSYS\tSYS\tNODE\t X \tSYS\t32-63,96-127\t1\t\tN/A
NIC0\tPIX\tPXB\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


def test_what_joins_the_gpus_is_told(monkeypatch):
    pairs = parse_topology(TOPOLOGY)
    across = dict.fromkeys([(0, 2), (0, 3), (1, 2), (1, 3)], "SYS")
    assert pairs == {(0, 1): "NV12", (2, 3): "NODE", **across}
    assert parse_topology("GPU0\t X \t0-7\t0\n") == parse_topology("") == {}
    monkeypatch.setattr(collective, "read_topology", lambda: pairs)
    (found,) = collective.check_links()
    assert "0-1 by NVLink, 12 links (NV12)" in found.message and found.figures["pairs"]["NODE"] == ["2-3"]
    assert "0-2 0-3 1-2 1-3 by the link between processors (SYS)" in found.message


def test_two_processes_really_add_up(healthy):
    found = by_name(finding for section, finding in healthy if section == "Several processes")
    assert found["collective"].state == "ok" and found["collective"].figures["processes"] == 2
    assert 0 < found["collective"].figures["seconds"] < 10


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("RuntimeError: gethostbyname: Name or service not known", "/etc/hosts"),
        ("DistStoreError: Timed out after 61 seconds waiting for clients", "a firewall"),
        ("torch.distributed.DistBackendError: NCCL error: unhandled cuda error", "NCCL_P2P_DISABLE=1"),
        ("RuntimeError: error while creating shared memory segment /dev/shm/nccl-x (size 9637888)", "--shm-size"),
        ("KeyError: 'x'", "TORCH_DISTRIBUTED_DEBUG=DETAIL"),
    ],
)
def test_processes_that_cannot_add_up_are_broken_with_what_to_look_at(tmp_path, monkeypatch, error, remedy):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ $RANK = 0 ] && exec tail -f /dev/null\necho noise\necho "{error}" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    found = by_name(collective.check_collective())["collective"]
    assert found.state == "broken" and error in found.message and remedy in found.remedy


def test_a_sum_that_is_wrong_is_broken(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"sum": 2.0, "seconds": 0.1}'\n""")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert "the sum is 2.0, not 1" in by_name(collective.check_collective())["collective"].message


def test_lines_stay_within_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    long = DoctorFinding("train.gradient_checkpointing", "note", "word " * 60, "do " * 60)
    for finding in (long, DoctorFinding("torch", "broken", "word " * 60)):
        _print(finding)
        lines = capsys.readouterr().out.splitlines()
        assert all(len(line) < 80 for line in lines) and finding.state in lines[0] and finding.name in lines[0]


# The hub


class _Hub(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None]] = []

    def do_GET(self):
        _Hub.asked.append((self.path, self.headers.get("authorization")))
        self.send_response(401 if self.path.startswith("/api/whoami") else 200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def local_hub(monkeypatch):
    """A hub on this machine, which knows no token; the address is that of HF_ENDPOINT."""
    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    _Hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_at_its_endpoint_and_a_refused_token_is_broken(local_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    found = by_name(models.check_hub(network=True))
    assert found["reachable"].state == "ok" and "127.0.0.1" in found["reachable"].message
    assert found["token"].state == "broken" and SECRET not in str(found)
    assert _Hub.asked == [("/api/models?limit=1", None), ("/api/whoami-v2", f"Bearer {SECRET}")]


def test_a_hub_that_does_not_answer_is_broken_with_what_to_look_at(local_hub):
    local_hub.shutdown()
    local_hub.server_close()
    found = by_name(models.check_hub(network=True))["reachable"]
    assert found.state == "broken" and "HF_ENDPOINT" in found.remedy


def test_the_hub_is_asked_only_where_the_network_is_allowed(local_hub):
    def ask(network):
        return [finding for check in _sections(network, None)["Hub"] for finding in check()]

    assert "not asked (--network asks)" in {finding.message for finding in ask(network=False)} and _Hub.asked == []
    assert ask(network=True) and _Hub.asked


# Limits of containers


def groups(folder, membership, files):
    """A /proc and a /sys/fs/cgroup with these files."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(membership)
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_cgroup_limits(folder / "proc", folder / "groups")


def test_limits_of_version_2_are_the_tightest_on_the_way_up(tmp_path):
    found = groups(
        tmp_path,
        "0::/batch/job\n",
        {
            "batch/memory.max": f"{8 << 30}\n",
            "batch/memory.current": f"{7 << 30}\n",
            "batch/memory.stat": f"anon 5\ninactive_file {2 << 30}\n",
            "batch/cpu.max": "max 100000\n",
            "batch/job/memory.max": "max\n",
            "batch/job/memory.current": "4096\n",
            "batch/job/cpu.max": "150000 100000\n",
        },
    )
    assert found == CgroupLimits(memory=8 << 30, memory_left=3 << 30, processors=1.5)


def test_limits_of_version_1_inside_a_container_stand_in_its_root(tmp_path):
    found = groups(
        tmp_path,
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        {
            "memory/memory.limit_in_bytes": f"{4 << 30}\n",
            "memory/memory.usage_in_bytes": f"{1 << 30}\n",
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {1 << 28}\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert found == CgroupLimits(memory=4 << 30, memory_left=(3 << 30) + (1 << 28), processors=2.0)


def test_no_limit_is_none(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
    }
    assert groups(tmp_path, "4:memory:/\n1:cpu:/\n", files) == CgroupLimits()
    assert read_cgroup_limits(tmp_path / "no-proc", tmp_path / "no-groups") == CgroupLimits()


def test_a_gpu_of_another_maker_is_shown_with_its_type_and_said_to_be_untried(monkeypatch):
    card = DriverGpu("AMD Instinct MI300X", 192 << 30, 192 << 30, "6.10.5", "gfx942")
    monkeypatch.setattr(machine, "read_driver_gpus", lambda: ([], ""))
    monkeypatch.setattr(machine, "read_other_gpus", lambda: ("cuda", [card]))
    found = by_name(machine.check_gpus())["GPU 0"]
    assert found.state == "ok" and "MI300X (cuda), 192.0 GiB" in found.message and "was not run on one" in found.message
    import torch

    if not torch.accelerator.is_available():
        found = by_name(machine.check_torch())["torch on GPU"]
        assert found.state == "broken" and "build for ROCm" in found.remedy
