"""`doctor` and `python -m torchleaf`: what follows from the facts, that the facts are true, the exit status."""

import dataclasses
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import jax
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torchleaf.interop.doctor import probes
from torchleaf.interop.doctor.cuda_libraries import CudaLibraries, _loaded
from torchleaf.interop.doctor.doctor import doctor, examine
from torchleaf.interop.doctor.environment import Backend, Cache, GpuMemory, Gpus, Settings, Threads
from torchleaf.interop.doctor.probes import Call, Transport, Views
from torchleaf.interop.doctor.report import Finding, Report
from torchleaf.interop.doctor.versions import Versions, within

GIB = 2**30

GOOD = {
    "versions": Versions({"python": "3.12.1", "torchleaf": "0.1.0", "jax": "0.10.2"}, {"jax": ">=0.10"}),
    "backend": Backend("cpu", "", ""),
    "no gpus": Gpus(0, 0, "RuntimeError: no gpu", "AssertionError: no CUDA", "", False, "", "unset"),
    "gpus": Gpus(2, 2, "", "", "13.0", True, "", "unset"),
    "memory not shared": GpuMemory(None, None, {}),
    "memory": GpuMemory(70 * GIB, 80 * GIB, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    "no cuda libraries": CudaLibraries("", "", {}),
    "cuda libraries": CudaLibraries("9.19.0", "2.28.9", {"cuDNN": ["/site/nvidia/cudnn/lib/libcudnn.so.9"]}),
    "threads": Threads(2, 2, "unset", "unset"),
    "settings": Settings(True, torch.float32, True),
    "no cache": Cache("", -1, True),
    "cache": Cache("/cache", GIB, True),
    "transport": Transport(frozenset({"cpu", "cuda"}), "cpu", True, "", True),
    "views": Views({"to_jax on cpu": True, "to_torch on cpu": True}),
    "call": Call(1e-7, 1e-6),
}
DRIVER = dataclasses.replace(GOOD["gpus"], jax=0, torch=0, jax_error="RuntimeError: a", torch_error="RuntimeError: b")
PLUGIN = dataclasses.replace(GOOD["gpus"], jax=0, jax_error="RuntimeError: Unable to load cuSPARSE")
TORCH_CPU = dataclasses.replace(GOOD["gpus"], torch=0, torch_error="AssertionError: Torch not compiled", cuda="")
PREALLOCATED = dataclasses.replace(GOOD["memory"], free=20 * GIB, environment={})
CALLBACK = dataclasses.replace(GOOD["transport"], platforms=frozenset(), shared=False, error="ImportError: no")

# What is wrong: facts, status of the worst finding, and what it must say.
BAD = {
    "two copies of cuDNN": (
        CudaLibraries(
            "9.19.0", "", {"cuDNN": ["/one/libcudnn.so.9", "/two/libcudnn.so.9"], "NCCL": ["/one/libnccl.so"]}
        ),
        "note",
        ["9.19.0", "/one/libcudnn.so.9, /two/libcudnn.so.9", "LD_LIBRARY_PATH"],
    ),
    "old jax": (Versions({"jax": "0.9.2"}, {"jax": ">=0.10"}), "broken", ["0.9.2", '`pip install -U "jax>=0.10"`']),
    "new jax": (
        Versions({"jax": "0.13.0"}, {"jax": "<0.13,>=0.10"}),
        "note",
        ["0.13.0, newer than what torchleaf was tried with", "report it", '`pip install -U "jax<0.13,>=0.10"`'],
    ),
    "old jax with a bound": (Versions({"jax": "0.9.2"}, {"jax": "<0.13,>=0.10"}), "broken", ["needs <0.13,>=0.10"]),
    "new flax": (Versions({"flax": "0.13.1"}, {"flax": "<0.13,>=0.12"}), "note", ["0.13.1, newer than"]),
    "old python": (Versions({"python": "3.10.4"}, {"python": ">=3.11"}), "broken", ["Use a Python >=3.11"]),
    "no torch": (Versions({"torch": None}, {"torch": ">=2.11"}), "broken", ["not installed", "torch>=2.11"]),
    "no flax": (Versions({"flax": None}, {}), "note", ["not installed", "pip install flax"]),
    "no jax-tvm-ffi": (Versions({"jax-tvm-ffi": None}, {}), "note", ["not installed", "'torch calls'"]),
    "not installed": (Versions({"torchleaf": None}, {}), "note", ["not installed", "pip install ."]),
    "no jax platform": (Backend("", "RuntimeError: Unknown", "tpux"), "broken", ["RuntimeError: Unknown", "'tpux'"]),
    "no jax": (Backend("", "RuntimeError: no libtpu", ""), "broken", ["no libtpu", "Reinstall"]),
    "no gpu for jax": (PLUGIN, "problem", ["JAX sees 0, torch sees 2", "jax[cuda13]", "Unable to load cuSPARSE"]),
    "jax off the gpu": (dataclasses.replace(PLUGIN, jax_platforms="cpu"), "note", ["'cpu'", "'cuda,cpu'"]),
    "rocm": (dataclasses.replace(PLUGIN, cuda=""), "problem", ["not built for CUDA"]),
    "torch for cpu": (TORCH_CPU, "problem", ["JAX sees 2, torch sees 0", "built without CUDA"]),
    "old driver": (dataclasses.replace(TORCH_CPU, cuda="13.0"), "problem", ["CUDA 13.0", "Torch not compiled"]),
    "more gpus in jax": (dataclasses.replace(GOOD["gpus"], jax=4), "problem", ["CUDA_VISIBLE_DEVICES (unset)"]),
    "more gpus in torch": (dataclasses.replace(GOOD["gpus"], torch=4), "note", ["CUDA_VISIBLE_DEVICES (unset)"]),
    "unused driver": (
        dataclasses.replace(DRIVER, visible="-1"),
        "note",
        ["is -1", "RuntimeError: a", "RuntimeError: b"],
    ),
    "preallocated": (PREALLOCATED, "note", ["75%", "20.0 of 80.0 GiB", "PREALLOCATE=false"]),
    "too much preallocated": (
        dataclasses.replace(PREALLOCATED, free=4 * GIB, environment={"XLA_CLIENT_MEM_FRACTION": ".95"}),
        "problem",
        ["95%", "XLA_CLIENT_MEM_FRACTION"],
    ),
    "gpu in use": (dataclasses.replace(GOOD["memory"], free=1 * GIB), "problem", ["what it needs", "Other processes"]),
    "many threads": (Threads(16, 2, "16", "unset"), "problem", ["OMP_NUM_THREADS 16", "torch.set_num_threads(2)"]),
    "one thread": (Threads(1, 8, "unset", "1"), "note", ["one core", "torch.set_num_threads(8)"]),
    "no x64": (Settings(False, torch.float32, False), "note", ["off", "jax_enable_x64"]),
    "no x64 for float64": (Settings(False, torch.float64, None), "problem", ["float64", "jax_enable_x64"]),
    "cache is a file": (Cache("/file", -1, False), "problem", ["/file", "jax_compilation_cache_dir"]),
    "boundless cache": (Cache("/cache", -1, True), "note", ["/cache", "jax_compilation_cache_max_size"]),
    "callback": (CALLBACK, "problem", ["copies", "pip install -U jax-tvm-ffi", "ImportError: no"]),
    "callback on windows": (dataclasses.replace(CALLBACK, has_wheel=False), "note", ["copies", "no wheel"]),
    "tpu": (dataclasses.replace(GOOD["transport"], shared=False, backend="tpu"), "problem", ["tpu", "cpu, cuda only"]),
    "copies": (Views({"to_jax on cpu": True, "to_torch on cuda": False}), "problem", ["to_torch on cuda: copies"]),
    "kinds of memory": (Views({"to_jax on cuda": True}, are_two_kinds=True), "note", ["copied when", "PYTORCH_CUDA"]),
    "wrong value": (Call(0.5, 0.0), "broken", ["the value is 0.5 off"]),
    "wrong gradient": (Call(0.0, float("nan")), "broken", ["the gradient is nan off"]),
}
SEVERITY = ["ok", "note", "problem", "broken"]


@pytest.mark.all_cases
@pytest.mark.parametrize("name", GOOD)
def test_all_is_well(name):
    findings = GOOD[name].findings()
    assert [f.status for f in findings] == ["ok"] * len(findings)
    assert not any(f.remedy for f in findings)
    # A machine without a GPU is not told about its memory and its libraries.
    assert bool(findings) == (name not in ("memory not shared", "no cuda libraries"))


@pytest.mark.all_cases
@pytest.mark.parametrize("name", BAD)
def test_remedy(name):
    facts, status, words = BAD[name]
    worst = max(facts.findings(), key=lambda f: SEVERITY.index(f.status))
    assert worst.status == status
    assert worst.remedy
    assert [w for w in words if w not in f"{worst.value} {worst.remedy}"] == []


@pytest.mark.all_cases
@pytest.mark.parametrize("asked", ["", ">=0.10", ">=0.10,<0.12", "==0.10.2", "!=0.10.2", ">0.10", "<=0.10", ">=2"])
@pytest.mark.parametrize("version", ["0.9.9", "0.10", "0.10.0", "0.10.2", "0.10.2+cpu", "0.12.0", "1.0", "2.0.0"])
def test_ranges_are_those_of_packaging(version, asked):
    assert within(version, asked) == SpecifierSet(asked).contains(version)


@pytest.mark.all_cases
@pytest.mark.parametrize("version", ["0.9.9", "0.10", "0.12.9", "0.13", "2.0"])
def test_upper_bounds_are_left_out(version):
    for asked in (">=0.10,<0.13", "<=0.12,>=0.10", "<0.13"):
        lower = ",".join(part for part in asked.split(",") if part[0] != "<")
        assert within(version, asked, above=True) == SpecifierSet(lower).contains(version)


# --- the facts are true ---------------------------------------------------------------------------


def test_versions_are_what_pyproject_promises():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["flax"]]
    promised = {r.name: r.specifier for r in map(Requirement, asked)}
    gathered = Versions.gather()
    assert {name: SpecifierSet(text) for name, text in gathered.ranges.items()} == {
        "python": SpecifierSet(project["requires-python"]),
        **promised,
    }
    assert gathered.installed["jax"] == jax.__version__
    assert gathered.installed["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # of a build
    assert gathered.ranges.keys() <= gathered.installed.keys()
    for name in promised:
        assert within(gathered.installed[name], str(promised[name])), name


def test_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    threads = Threads.gather()
    assert (threads.torch, threads.omp, threads.mkl) == (torch.get_num_threads(), "3", "unset")
    assert 1 <= threads.cores <= os.cpu_count()


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1)])
def test_cores_of_a_container(monkeypatch, quota, cores):
    free = Threads.gather().cores
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/sys/fs/cgroup/cpu.max")
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert free >= 1
    assert Threads.gather().cores == (cores or 8)


def test_settings(x64):
    assert Settings.gather().x64
    with jax.enable_x64(False):
        assert not Settings.gather().x64


@pytest.mark.parametrize("kind", ["new folder", "below a file", "address"])
def test_cache(kind, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folder = {"new folder": f"{tmp_path}/a/b", "below a file": f"{tmp_path}/file/a", "address": "gs://bucket/a"}[kind]
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", folder)
    try:
        assert Cache.gather() == Cache(folder, -1, kind != "below a file")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_gpus_are_those_the_frameworks_see():
    gpus = Gpus.gather()
    assert gpus.torch == torch.cuda.device_count()
    assert gpus.jax == sum(d.platform == "gpu" for d in jax.devices())
    assert bool(gpus.jax_error) == (gpus.jax == 0)
    assert bool(gpus.torch_error) == (gpus.torch == 0)


@pytest.mark.parametrize("torch_sees", [False, True])
def test_gpus_that_jax_does_not_see(monkeypatch, torch_sees):
    def no_gpu(backend=None):
        raise RuntimeError(f"Unknown backend {backend}.")

    def no_cuda():
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(jax, "local_devices", no_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "init", no_cuda)
    gpus = Gpus.gather()
    assert (gpus.jax, gpus.jax_error) == (0, "RuntimeError: Unknown backend gpu")
    torch_error = "" if torch_sees else "AssertionError: Torch not compiled with CUDA enabled"
    assert (gpus.torch, gpus.torch_error) == (3 * torch_sees, torch_error)


@pytest.mark.parametrize("shared", [True, False])
def test_gpu_memory(monkeypatch, shared):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * GIB, 80 * GIB))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if shared else "cpu")
    values = [f.value for f in GpuMemory.gather().findings()]
    assert values == ["JAX takes 50% at its start; 30.0 of 80.0 GiB are free"] * shared


def test_loaded_libraries_are_read_off_the_memory_map(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 00000000 00:00 1 /a/libcudnn.so.9\n7f01-7f02 r-xp 00000000 00:00 1 /a/libcudnn.so.9\n"
        "7f02-7f03 r--p 00000000 00:00 2 /a/libcudnn_graph.so.9\n7f03-7f04 rw-p 00000000 00:00 0\n"
        "7f04-7f05 r--p 00000000 00:00 3 /b/libnccl.so.2\n"
    )
    assert _loaded(maps) == {"cuDNN": ["/a/libcudnn.so.9"], "NCCL": ["/b/libnccl.so.2"]}
    assert _loaded(tmp_path / "absent") == {}


def test_a_compiled_call_sees_the_buffer():
    assert Transport.gather().shared


def test_an_operand_that_is_copied_is_noticed(monkeypatch):
    original = probes.torch_function
    monkeypatch.setattr(probes, "torch_function", lambda fn: original(lambda x: fn(x.clone())))
    assert not Transport.gather().shared


@pytest.mark.parametrize("name", ["to_jax", "to_torch"])
def test_a_copying_conversion_is_noticed(monkeypatch, name):
    assert all(Views.gather().shared.values())
    original = getattr(probes, name)
    monkeypatch.setattr(probes, name, lambda x: original(x, copy=True))
    assert {key.split()[0] for key, shared in Views.gather().shared.items() if not shared} == {name}


def test_wrong_numbers_are_noticed(monkeypatch):
    right = Call.gather()
    assert max(right.value, right.gradient) < 1e-4
    original = probes.torch_function
    monkeypatch.setattr(probes, "torch_function", lambda fn: lambda x: 2 * original(fn)(x))
    wrong = Call.gather()
    assert wrong.value == pytest.approx(1, rel=1e-3)
    assert wrong.gradient == pytest.approx(1, rel=1e-3)


# --- the report -----------------------------------------------------------------------------------


def test_report_of_this_machine(capfd):
    report = doctor()
    names = [f.name for f in report.findings]
    assert report.ok
    assert len(set(names)) == len(names)
    assert {"python", "torchleaf", "jax", "jaxlib", "torch", "equinox", "flax", "jax-tvm-ffi"} <= set(names)
    assert {"torch calls", "shared memory", "numbers", "x64", "gpus", "threads", "compilation cache"} <= set(names)
    assert {f.name: f.status for f in report.findings}["numbers"] == "ok"
    assert capfd.readouterr() == ("", "")


def test_print_is_aligned():
    long = "word " * 40
    report = Report(
        (Finding("a", "1"), Finding("longer name", long, "problem", "Do this."), Finding("b", "2", "note", "x"))
    )
    lines = str(report).splitlines()
    column = lines[0].index("1")
    assert lines[0] == "ok       a            1"
    assert all(line[:column].strip() == "" for line in lines[2:5])
    assert all(len(line) <= 100 and line.isascii() for line in lines)
    assert "-> Do this." in str(report)
    assert lines[-1] == "0 broken, 1 problem, 1 note."


@pytest.mark.parametrize("status", SEVERITY)
def test_only_what_is_broken_makes_a_report_fail(status):
    assert Report((Finding("a", "1"), Finding("b", "2", status, "Do this."))).ok == (status != "broken")


def test_report_without_findings_to_act_on():
    assert str(Report((Finding("a", "1"),))).splitlines()[-1] == "All is well."


class Raises(Threads):
    """A check that cannot be made."""

    message = "first line\n  second line"

    @classmethod
    def gather(cls):
        raise ValueError(cls.message)


class Warns(Threads):
    """A check during which a library warns."""

    @classmethod
    def gather(cls):
        warnings.warn("noise", stacklevel=1)
        return GOOD["threads"]


def test_a_check_that_raises_is_a_finding():
    report = examine({"first": Raises, "second": Warns, "third": Raises})
    first, threads, third = report.findings
    assert (first.name, first.value, first.status) == ("first", "ValueError: first line second line", "broken")
    assert first.remedy
    assert threads.status == "ok"
    assert (third.name, third.status) == ("third", "broken")
    assert "'first'" in third.value
    assert not report.ok


def test_an_exception_is_quoted_without_its_traceback():
    finding = examine({"check": type("Long", (Raises,), {"message": "bad kernel. " + "File, line. " * 100})}).findings[
        0
    ]
    assert finding.value.startswith("ValueError: bad kernel. File")
    assert len(finding.value) < 350


# --- the command ----------------------------------------------------------------------------------


def run_command(*before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m torchleaf` in a process of its own, after the Python statements `before`."""
    script = ["import runpy", *before, "runpy.run_module('torchleaf', run_name='__main__')"]
    how = ["-c", "\n".join(script)] if before else ["-m", "torchleaf"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, *how], env=env, capture_output=True, text=True)


def lines_of(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Status and value of each finding, by name."""
    findings = [line for line in result.stdout.splitlines()[:-2] if not line.startswith(" ")]
    column = findings[0].index("3.")
    return {line[9:column].strip(): f"{line[:9].strip()} {line[column:]}" for line in findings}


@pytest.mark.long
def test_command(tmp_path):
    """Settings by environment variables."""
    settings = {
        "JAX_ENABLE_X64": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    result = run_command(**settings)
    assert (result.returncode, result.stderr) == (0, "")
    lines = lines_of(result)
    assert lines["x64"] == "ok on"
    assert "OMP_NUM_THREADS 1" in lines["threads"]
    assert lines["compilation cache"].startswith("note")
    assert lines["numbers"].startswith("ok")


@pytest.mark.long
def test_command_without_jax_tvm_ffi():
    """Slower, not broken."""
    dispatch = "import jax; jax.config.update('jax_cpu_enable_async_dispatch', False)"
    result = run_command("import sys; sys.modules['jax_tvm_ffi'] = None", dispatch)
    assert (result.returncode, result.stderr) == (0, "")
    lines = lines_of(result)
    assert lines["async dispatch"].startswith("ok off")
    assert lines["torch calls"].startswith("problem jax.pure_callback")
    assert lines["numbers"].startswith("ok")


@pytest.mark.long
def test_command_where_jax_does_not_start():
    result = run_command(JAX_PLATFORMS="nonsense")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    lines = lines_of(result)
    assert lines["jax platform"].startswith("broken JAX does not start")
    assert lines["numbers"] == "broken the same error as 'jax platform'"
    assert "JAX_PLATFORMS is 'nonsense'" in result.stdout


@pytest.mark.long
def test_command_where_torch_calls_fail():
    result = run_command("import torch", "torch.sin = lambda x: 1 / 0")
    assert result.returncode == 1
    assert lines_of(result)["numbers"].startswith("broken ZeroDivisionError: division by zero")
