"""What a process is set to, seen from inside processes of their own."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from gptv_jax.hosts import runtime

pytestmark = pytest.mark.process

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = SETTING.exists() and "[never]" not in SETTING.read_text()
FAULTS = """
import json, resource, sys
import jax
from gptv_jax.hosts import runtime
if sys.argv[1] == "kept":
    runtime.keep_memory()
x, negative = jax.numpy.ones(2**24), jax.jit(lambda x: -x)
negative(x).block_until_ready()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    negative(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""
COMPILES = """
import json
import jax
from gptv_jax.hosts import runtime
runtime.COMPILE_SECONDS = 0.0
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
runtime.cache_programs()
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((8, 8))).block_until_ready()
found = sum(event == "/jax/compilation_cache/cache_hits" for event in events)
print(json.dumps([jax.config.jax_compilation_cache_dir, found]))
"""

COMMAND = """
import json, pathlib, runpy, sys
from gptv_jax import errors
from gptv_jax.hosts import runtime
asked, runtime.DEVICES = [], pathlib.Path("/nowhere")
runtime.ctypes.CDLL = lambda name, load=runtime.ctypes.CDLL: asked.append(name) or load(name)
def end(code, message):
    print(json.dumps([len(asked), message]))
    sys.exit()
errors.end, sys.argv = end, ["main.py", *sys.argv[1:]]
runpy.run_module("gptv_jax.main", run_name="__main__", alter_sys=True)
"""


def told(program: str, *arguments: str, **environment: str):
    """What a Python process printed last, as JSON."""
    set_by_tests = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    kept = {k: v for k, v in os.environ.items() if k not in set_by_tests}
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=kept | environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.skipif(not HUGE_PAGES, reason="the kernel has no huge pages")
def test_results_are_written_without_page_faults():
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    given_back, kept = told(FAULTS, "given back"), told(FAULTS, "kept")
    assert min(given_back) > pages / 2
    assert max(kept) < pages / 100


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    first, found_first = told(COMPILES, XDG_CACHE_HOME=str(tmp_path))
    second, found_second = told(COMPILES, XDG_CACHE_HOME=str(tmp_path))
    assert first == second and first.startswith(str(tmp_path / "gptv_jax" / "programs"))
    assert found_first == 0 and found_second > 0


def test_a_place_that_is_named_is_taken(tmp_path):
    named = str(tmp_path / "named")
    assert told(COMPILES, JAX_COMPILATION_CACHE_DIR=named)[0] == named


def test_without_a_place_every_start_compiles(tmp_path):
    (tmp_path / "file").touch()
    assert told(COMPILES, XDG_CACHE_HOME=str(tmp_path / "file")) == [None, 0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_the_command_keeps_programs_and_memory(tmp_path):
    (tmp_path / "file").touch()
    digits = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
    arguments = (f"--config={digits}", f"--workdir={tmp_path / 'file' / 'run'}")
    asked, message = told(COMMAND, *arguments, XDG_CACHE_HOME=str(tmp_path))
    assert asked == 1 and "workdir" in message
    assert (tmp_path / "gptv_jax" / "programs").is_dir()


def test_programs_are_kept_apart_by_what_the_processor_can_do(monkeypatch):
    assert jax.default_backend() == "cpu"

    def kind(flags, speed):
        told = f"processor: 0\ncpu MHz: {speed}\nflags: {flags}\n"
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path: told)
        return runtime.machine_kind()

    assert kind("sse avx2", 2000) == kind("sse avx2", 3000) != kind("sse avx2 avx512f", 2000)


def test_machines_with_accelerators_keep_the_memory_of_their_c_library(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(runtime, "DEVICES", tmp_path)

    def refuse(*_):
        raise AssertionError("the C library was asked")

    monkeypatch.setattr(runtime.ctypes, "CDLL", refuse)
    runtime.keep_memory()
    (tmp_path / "nvidia0").unlink()
    with pytest.raises(AssertionError):
        runtime.keep_memory()
