"""Settings of a process before it computes: the cache of compiled programs, and memory."""

import ctypes
import hashlib
import os
import pathlib
import platform

from etils import epy

from gptv_jax import hardware

with epy.lazy_imports():  # see `command`
    import jax

# Parameters of glibc's mallopt: when memory goes back to the system, how many large blocks are
# mapped apart from the heap, and the number of heaps.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
# glibc's environment variables by which a user decides what is kept.
KEPT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14  # size in bytes; advice of Linux's madvise
DEVICES = pathlib.Path("/dev")
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")  # NVIDIA, AMD, TPUs old and new
COMPILE_SECONDS = 0.1  # a program that compiles faster is not cached


def cache_programs() -> None:
    """Caches compiled programs on disk, so that the next start of a run does not compile again.

    The cache is in `JAX_COMPILATION_CACHE_DIR` or, without that variable, in ~/.cache/gptv_jax (or
    below XDG_CACHE_HOME). It may be deleted at any time.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(base) / "gptv_jax" / "programs" / machine_kind()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # without a cache every start compiles
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILE_SECONDS)


def keep_memory() -> None:
    """Lets glibc keep the memory that a training step frees for the next step, in huge pages.

    XLA allocates the memory of a step by malloc and frees it at the end. By default glibc returns
    large blocks to the system, so every step gets new pages, which the kernel clears one by one: an
    eighth of the time of a step (docs/results.md). Blocks that XLA aligns cannot always be reused,
    so the heap is given addresses for half of the machine's memory, which the kernel is asked to
    back by pages of 2 MiB. glibc and the kernel are free to ignore all this. Nothing is changed
    where one of the environment variables `KEPT` is set.

    Call this function before a thread of Python starts, such as the one of `stopping.install`: a
    thread that allocates memory gets a second heap. After such a thread every training step got new
    pages again, and trainings lost a quarter of their speed. The threads that the import of NumPy
    starts have no heap. Accelerators, whose steps do not use this memory, are looked for in /dev,
    as JAX has not started.
    """
    if platform.libc_ver()[0] != "glibc" or accelerators() or os.environ.keys() & {*KEPT}:
        return
    libc = ctypes.CDLL(None)
    for setting, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (ARENA_MAX, 1)):  # -1: never
        libc.mallopt(setting, value)
    libc.malloc.restype = ctypes.c_void_p
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    # The block is freed untouched: it takes no memory, but its addresses stay in the heap. A block
    # behind it, which takes no memory either, is kept: it holds the end of the heap in place where
    # a library asks glibc to trim the heap, as protobuf does after every 10,000 freed messages.
    if block := libc.malloc(ctypes.c_size_t(size)):
        libc.malloc(ctypes.c_size_t(HUGE_PAGE))
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        length = ctypes.c_size_t(block + size - first)
        libc.madvise(ctypes.c_void_p(first), length, MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def accelerators() -> list[pathlib.Path]:
    """Files of the machine's GPUs and TPUs, which are there before JAX starts."""
    return [path for name in ACCELERATORS for path in DEVICES.glob(name)]


def machine_kind() -> str:
    """A name for machines that can run each other's programs; a home folder may be shared.

    A program for a CPU uses the instructions of that CPU.
    """
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    flags = hardware.cpu_flags()
    if flags is None:
        return platform.machine()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
