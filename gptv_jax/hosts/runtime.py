"""What a process is set to before it works: compiled programs that are found again, and memory."""

import ctypes
import hashlib
import os
import pathlib
import platform

import jax

# Of glibc's mallopt: when to give memory back, whether to map large blocks apart, and how many
# heaps there are.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
NEVER = -1
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14  # bytes; of Linux's madvise
DEVICES = pathlib.Path("/dev")
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")  # NVIDIA's, AMD's, TPUs old and new
COMPILE_SECONDS = 0.1  # programs that compile faster are not kept


def keep_programs() -> None:
    """Keeps compiled programs, so that another start of the same run does not compile again.

    They lie in `JAX_COMPILATION_CACHE_DIR` or, where that is not set, in ~/.cache/gptv_jax (or
    below XDG_CACHE_HOME); whoever wants the space may delete them at any time.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(base) / "gptv_jax" / "programs" / _kind()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # then every start compiles
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILE_SECONDS)


def keep_memory() -> None:
    """Lets the C library keep what a step frees for the next one, in huge pages.

    XLA takes the memory of a step from malloc and frees it at the end. glibc gives large blocks
    back to the system, so that every step is given fresh pages, which the kernel must clear one by
    one as they are touched: an eighth of a step (docs/results.md). It is told to keep everything.
    As XLA wants its blocks aligned, what is kept is not always used again; so the heap has
    addresses for half of the machine's memory from the start, which the kernel is to back by pages
    of 2 MiB. All this works only before JAX has started its threads, so it goes by the devices that
    the machine has, not by what JAX says.
    """
    accelerators = [path for name in ACCELERATORS for path in DEVICES.glob(name)]
    if platform.libc_ver()[0] != "glibc" or accelerators:
        return
    libc = ctypes.CDLL(None)
    for setting, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, NEVER), (ARENA_MAX, 1)):
        libc.mallopt(setting, value)
    libc.malloc.restype = ctypes.c_void_p
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    # Given back at once, untouched, so that it costs no memory, but is the heap from now on.
    if block := libc.malloc(ctypes.c_size_t(size)):
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        length = ctypes.c_size_t(block + size - first)
        libc.madvise(ctypes.c_void_p(first), length, MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def _kind() -> str:
    """The kind of machine: programs for a CPU use what that CPU has, and a home may be shared."""
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    try:
        told = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line for line in told if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
