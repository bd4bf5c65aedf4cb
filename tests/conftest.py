"""Eight simulated devices, strict JAX, one compilation cache for all workers and processes."""

import importlib.metadata
import importlib.util
import os
import pathlib

CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU in the machine does not alter the tests

# Tests compile much and compute little: without XLA's optimisations they compile in half the time.
# jax 0.10 has an older code generator for fused loops too, which compiles four times as fast; later
# releases have removed its flag, and XLA ends every process whose flags it does not know.
AS_USERS_COMPILE = {}  # compiler_options that bring back the users' code generator
FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True}
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import contextlib
import dataclasses
import fcntl
import gc
import io
import itertools
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from absl import flags
from jax.sharding import AxisType
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Part, of_images, prefixed

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that read the finished run come first, so one worker alone waits for the run."""
    items.sort(key=lambda item: "finished_run" not in item.fixturenames)


def pytest_collection_finish() -> None:
    """Imported objects live to the end, so garbage collections need not look at them."""
    gc.freeze()


MEMORY_MAPS = pathlib.Path("/proc/self/maps")  # Linux
MOST_MEMORY_MAPS = 20_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees the compiled programs after a file of tests where they hold many memory maps.

    XLA's CPU backend holds a few memory maps for every compiled program. Linux allows a process
    65,530, and the compilation beyond them ends the process with a segmentation fault.
    """
    if nextitem is None or item.path == nextitem.path or not MEMORY_MAPS.exists():
        return
    if MEMORY_MAPS.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        jax.clear_caches()


def make_mesh(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    """A mesh over the first devices: data, fsdp, tensor, or these with sequence before tensor."""
    shape = (*shape[:2], 1, shape[2]) if len(shape) == 3 else shape
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, sharding.AXES, (AxisType.Explicit,) * 4, devices=devices)


# Whatever the network can have beside iGPT's parts, of sizes that every mesh divides.
MODERN = {"rotary": True, "learned_positions": False, "qk_norm": True}
MODERN |= {"mlp": "swiglu", "mlp_ratio": 3, "base_width": 16}
RECIPES = {"igpt": {}, "modern": MODERN}


def tiny_network(
    classes: int = 0, vocabulary=11, grid=(4, 4), levels=(), patch=(), **changes
) -> Network:
    """2 layers, 16 tokens, 11 token values, three start vectors; divisible by every mesh."""
    config = config_lib.Model(layers=2, width=32, heads=4, axial_positions=True)
    config = dataclasses.replace(config, **changes)
    layout = of_images(vocabulary, grid, config.objective, levels=levels)
    return Network(config, layout, starts=3, classes=classes, patch=patch)


def parts_network(vocabulary=11, **changes) -> Network:
    """An image of 16 positions with tokens and pixels, then four objects of four tokens each.

    The objects are two coordinates of 6 bins and two of 7 classes.
    """
    objects = Part("objects", 19, (4, 4), bins=6, summed=True)
    layout = prefixed(Part("image", vocabulary, (4, 4)), objects)
    return Network(config_lib.Model(layers=2, width=32, heads=4, **changes), layout, stem=(8, 8))


def parts_batch(network: Network, size: int = 8, seed: int = 0) -> dict:
    """NumPy tokens, pixels, targets, inputs, weights and masks for `parts_network`."""
    rng, part = np.random.default_rng(seed), network.layout.parts[1]
    rows = rng.integers(part.vocabulary, size=(2, size, part.size), dtype=np.int32)
    shape = (size, network.layout.parts[0].size)
    return {
        "tokens": rng.integers(max(network.vocabulary, 1), size=shape, dtype=np.int32),
        "image": rng.integers(256, size=(size, 16, 16, 1), dtype=np.uint8),
        "targets": {part.name: rows[0]},
        "inputs": {part.name: rows[1]},
        "weights": {part.name: rng.random((size, part.size), dtype=np.float32)},
        "mask": (np.arange(size) < size - 1).astype(np.float32),
    }


def scenes_config(
    task: config_lib.Task, train: int, validation: int, test: int, **data
) -> config_lib.Config:
    """A small network that learns a task for two steps, from pixels of so many digit scenes."""
    steps = config_lib.Train(steps=2, batch_size=8, eval_every=2, checkpoint_every=2, log_every=2)
    return config_lib.Config(
        data=config_lib.Data(
            name="digit_scenes",
            image_size=(32, 48),
            train_split=f"train[:{train}]",
            validation_split=f"validation[:{validation}]",
            test_split=f"test[:{test}]",
            **data,
        ),
        tokens=config_lib.Tokens(kind="none"),
        model=config_lib.Model(layers=1, width=16, heads=2),
        task=dataclasses.replace(task, image_input="pixels", stem=(8, 8, 8)),
        finetune=config_lib.Finetune(train=steps, scratch=False),
    )


def random_params(network: Network, seed: int = 0) -> dict:
    """Weights without the zeros that the initialisation has, so that nothing is hidden by them.

    Drawn by NumPy: the same on every mesh, and nothing to compile.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        value = rng.normal(0.5 if leaf.ndim < 2 else 0.0, 0.2, leaf.shape)
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    return jax.tree.map(draw, sharding.abstract(network.init))


def random_batch(network: Network, size: int = 8, seed: int = 0) -> dict:
    """NumPy tokens, variants, labels and masks."""
    rng = np.random.default_rng(seed)
    classes = max(network.classes, network.config.class_tokens, 1)
    return {
        "tokens": rng.integers(network.vocabulary, size=(size, network.length), dtype=np.int32),
        "variant": rng.integers(network.starts, size=size, dtype=np.int32),
        "label": rng.integers(classes, size=size, dtype=np.int32),
        "mask": (np.arange(size) < size - 1).astype(np.float32),
    }


@pytest.fixture
def one_device():
    """The mesh (1, 1, 1), set."""
    with jax.set_mesh(make_mesh((1, 1, 1))) as mesh:
        yield mesh


# The real command, every stage of it, in seconds: a tiny network that saves all the time.
SMALL = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "train.steps": 120,
    "train.batch_size": 16,
    "train.eval_every": 40,
    "train.checkpoint_every": 5,
    "train.log_every": 10,
    "finetune.train.steps": 12,
    "finetune.train.eval_every": 4,
    "finetune.train.checkpoint_every": 4,
    "finetune.train.log_every": 4,
    "finetune.train.optimizer.name": "adamw",
    "finetune.train.optimizer.learning_rate": 0.05,
    "finetune.train.optimizer.rest_learning_rate": None,
    "finetune.train.optimizer.warmup_steps": 2,
    "probe.c": (0.1, 1.0),
    "sample.count": 6,
    "sample.completions": 4,
}


def small_arguments(workdir: pathlib.Path, *more: str) -> list[str]:
    """Flags of the small run; of two values for a field the later one counts."""
    config = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
    fields = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return [f"--config={config}", f"--workdir={workdir}", *fields, *more]


# Commands start in one process that has imported everything but the command itself, and forks for
# each of them. They are the same commands, without 4 seconds of imports each. A process between
# the server and a command waits for the command and writes its exit code; the server never waits.
SERVER = """
import json, os, pathlib, runpy, signal, sys
import jax
from gptv_jax.stages import finetune, generate, pretrain, probe, reports, sample, tokenizer
from gptv_jax.stages import robustness, typicality
from ml_collections import config_flags
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    module, arguments, devices, out, err, code = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        print(child, flush=True)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pathlib.Path(f"{code}.tmp").write_text(str(ended))
        os.replace(f"{code}.tmp", code)
        os._exit(0)
    os.setsid()
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = [f"{module}.py", *arguments]
    runpy.run_module(f"gptv_jax.{module}", run_name="__main__", alter_sys=True)
    sys.exit()
"""


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    output: str  # on stdout
    errors: str  # on stderr


@dataclasses.dataclass
class Command:
    """A command that runs in a process and a session of its own; methods as of a `Popen`."""

    pid: int
    place: pathlib.Path  # start of the paths of its files

    @property
    def output(self) -> str:
        """What the command has written on stdout."""
        return self.place.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        """What the command has written on stderr."""
        return self.place.with_suffix(".err").read_text()

    def poll(self) -> int | None:
        code = self.place.with_suffix(".code")
        return int(code.read_text()) if code.exists() else None

    def wait(self, timeout: float = 600) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.place), timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """To the command alone; commands of several processes pass signals on to their child."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def send_to_all(self, number: signal.Signals) -> None:
        """To the command and its child processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """`start(module, *arguments, devices=1)` starts `gptv_jax.<module>`, and gives a `Command`."""
    folder, pipe = tmp_path_factory.mktemp("commands"), subprocess.PIPE
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True)
    numbers = itertools.count()

    def call(module: str, *arguments: str, devices: int = 1) -> Command:
        place = folder / str(next(numbers))
        files = [str(place.with_suffix(ending)) for ending in (".out", ".err", ".code")]
        server.stdin.write(json.dumps([module, arguments, devices, *files]) + "\n")
        server.stdin.flush()
        return Command(int(server.stdout.readline()), place)

    yield call
    server.stdin.close()
    server.stdout.close()
    assert server.wait() == 0


@pytest.fixture(scope="session")
def command(start):
    """`command(module, *arguments, devices=1)` runs `gptv_jax.<module>`, and gives `Ended`."""

    def call(module: str, *arguments: str, devices: int = 1) -> Ended:
        started = start(module, *arguments, devices=devices)
        return Ended(started.wait(), started.output, started.errors)

    return call


@dataclasses.dataclass
class FinishedRun:
    """A run folder that the real command made, with all stages; to be read only."""

    folder: pathlib.Path
    output: str  # of the command, on stdout
    errors: str  # on stderr: the log, and a line `import time: ...` for every import

    @property
    def summary(self) -> dict:
        """What summary.json holds."""
        return json.loads((self.folder / "summary.json").read_text())


def free_port() -> int:
    """A port of this machine at which processes of a run can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def made_once(tmp_path_factory, name: str, make: Callable) -> tuple[pathlib.Path, object]:
    """A folder that `make(folder)` fills, by the worker that comes first, and what it returned.

    The others wait, and find it; what is returned is kept as JSON.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.json"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            done.write_text(json.dumps(make(folder)))
    return folder, json.loads(done.read_text())


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> FinishedRun:
    """Made once for all workers."""

    def make(folder: pathlib.Path) -> list[str]:
        module = [sys.executable, "-X", "importtime", "-m", "gptv_jax.main"]
        command = [*module, *small_arguments(folder)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return [ended.stdout, ended.stderr]

    folder, written = made_once(tmp_path_factory, "finished_run", make)
    return FinishedRun(folder, *written)


@pytest.fixture(scope="session")
def kills_benchmark():
    """The module `benchmarks/kills.py`."""
    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "kills.py"
    spec = importlib.util.spec_from_file_location("kills", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real data sets, no part of the project: GPTV_JAX_DATA, or shared/data beside it."""
    beside = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("GPTV_JAX_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder (GPTV_JAX_DATA names another one)")
    return folder


def generator(seed: int = 0) -> np.random.Generator:
    """Of random numbers."""
    return np.random.default_rng(seed)


def random_image(*shape: int, seed: int = 0) -> np.ndarray:
    """Uint8 noise."""
    return generator(seed).integers(256, size=shape, dtype=np.uint8)


def transformed(step, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """The image after a transform, alone in its record."""
    return step({"image": image}, rng)["image"]


def encoded(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    """An image file of pixels [H, W] or [H, W, C]; one channel is grey."""
    file = io.BytesIO()
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def make_folder(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """Files by their paths in the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
