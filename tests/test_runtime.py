"""Settings of a process, seen from inside processes that fork from one that has imported JAX."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from gptv_jax.hosts import runtime

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = SETTING.exists() and "[never]" not in SETTING.read_text()
GLIBC = platform.libc_ver()[0] == "glibc"
SET_BY_TESTS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
FORKS = """
import ctypes, json, os, pathlib, resource, runpy, sys
import jax
from gptv_jax import errors
from gptv_jax.hosts import runtime
for program in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        exec(program)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
"""
FAULTS = """
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
runtime.COMPILE_SECONDS = 0.0
os.environ["XDG_CACHE_HOME"] = {cache!r}
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
runtime.cache_programs()
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((8, 8))).block_until_ready()
found = sum(event == "/jax/compilation_cache/cache_hits" for event in events)
print(json.dumps([jax.config.jax_compilation_cache_dir, found]))
"""
COMMAND = """
import ctypes, json, os, pathlib, runpy, sys
from gptv_jax import errors
from gptv_jax.hosts import runtime
runtime.DEVICES = pathlib.Path("/nowhere")
path, *arguments = sys.argv[1:]
def end(code, message):
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(path.encode(), b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    print(json.dumps([pathlib.Path(path).read_text().count("<heap nr="), message]))
    sys.exit()
errors.end, sys.argv = end, ["main.py", *arguments]
runpy.run_module("gptv_jax.main", run_name="__main__", alter_sys=True)
"""


def run(*programs: str) -> list:
    """Runs each program in a forked process; the JSON that each printed last."""
    environment = {k: v for k, v in os.environ.items() if k not in SET_BY_TESTS}
    command = [sys.executable, "-c", FORKS, json.dumps(programs)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]


@pytest.mark.process
@pytest.mark.skipif(not GLIBC, reason="other C libraries are left alone")
@pytest.mark.skipif(not HUGE_PAGES, reason="the kernel has no huge pages")
def test_results_are_written_without_page_faults():
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    # Libraries trim the heap, protobuf after every 10,000 messages that it frees.
    trimmed = FAULTS.replace("before =", "ctypes.CDLL(None).malloc_trim(0); before =")
    keep = "runtime.keep_memory()\n"
    given_back, kept, trimmed = run(FAULTS, keep + FAULTS, keep + trimmed)
    assert min(given_back) > pages / 2
    assert max(kept) < pages / 100
    assert max(trimmed) < pages / 20  # with small blocks of Python's, which are given back too


@pytest.mark.process
def test_compiled_programs_are_cached_where_a_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    cached = COMPILES.format(cache=str(tmp_path))
    uncached, first, second = run(COMPILES.format(cache=str(tmp_path / "file")), cached, cached)
    assert uncached == [None, 0]  # every start compiles
    assert first[0] == second[0] and first[0].startswith(str(tmp_path / "gptv_jax" / "programs"))
    assert first[1] == 0 and second[1] > 0


def test_a_cache_folder_that_the_user_names_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named = jax.config.jax_compilation_cache_dir
    assert named is not None  # by conftest.py
    runtime.cache_programs()
    assert jax.config.jax_compilation_cache_dir == named and not list(tmp_path.iterdir())


@pytest.mark.process
@pytest.mark.skipif(not GLIBC, reason="other C libraries are left alone")
def test_the_command_caches_programs_and_has_one_heap_for_all_threads(tmp_path):
    (tmp_path / "file").touch()
    digits = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
    arguments = [f"--config={digits}", f"--workdir={tmp_path / 'file' / 'run'}"]
    environment = {k: v for k, v in os.environ.items() if k not in SET_BY_TESTS}
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, tmp_path / "heaps.xml", *arguments],
        capture_output=True,
        text=True,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    heaps, message = json.loads(ended.stdout.splitlines()[-1])
    assert heaps == 1 and "workdir" in message
    assert (tmp_path / "gptv_jax" / "programs").is_dir()


def test_programs_are_cached_apart_by_the_instructions_of_the_processor(monkeypatch):
    assert jax.default_backend() == "cpu"

    def kind(flags, speed):
        lines = f"processor: 0\ncpu MHz: {speed}\nflags: {flags}\n"
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path: lines)
        return runtime.machine_kind()

    assert kind("sse avx2", 2000) == kind("sse avx2", 3000) != kind("sse avx2 avx512f", 2000)


@pytest.mark.skipif(not GLIBC, reason="other C libraries are never asked")
def test_glibc_is_left_alone_with_accelerators_and_by_its_own_variables(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(runtime, "DEVICES", tmp_path)

    def refuse(*_):
        raise AssertionError("the C library was asked")

    monkeypatch.setattr(runtime.ctypes, "CDLL", refuse)
    runtime.keep_memory()
    (tmp_path / "nvidia0").unlink()
    with monkeypatch.context() as set_by_user:
        set_by_user.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        runtime.keep_memory()
    with pytest.raises(AssertionError):
        runtime.keep_memory()
