"""Contenders of this project: each factory makes a task that runs what the real command runs."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import Size
from benchmarks.worker import Task
from gptv_jax import api, sharding
from gptv_jax import config as config_lib
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler
from gptv_jax.decode.speculative import Draft
from gptv_jax.model import attention
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import causal_mask, of_images
from gptv_jax.probe import features, ridge
from gptv_jax.train import cached_distillation, distillation, step
from gptv_jax.train.optimizer import make_optimizer

OPTIMIZER = config_lib.Optimizer(name="adamw", learning_rate=1e-3, schedule="constant")
CLASSES = 10  # of the probe


def network_of(size: Size, dtype: str = "float32", **model) -> Network:
    """The network of a size; `model` are further fields of `config.Model`."""
    config = config_lib.Model(size.layers, size.width, size.heads, dtype=dtype, **model)
    side = math.isqrt(size.tokens)
    grid, levels = (side, side), tuple(size.levels)
    return Network(config, of_images(size.vocabulary, grid, config.objective, levels=levels))


def batch_of(network: Network, size: int) -> dict:
    """A batch on the device, of random tokens."""
    rng, shape = np.random.default_rng(0), (size, network.length)
    return sharding.global_batch({
        "tokens": rng.integers(network.vocabulary, size=shape, dtype=np.int32),
        "variant": np.zeros(size, np.int32),
        "label": rng.integers(CLASSES, size=size, dtype=np.int32),
        "mask": np.ones(size, np.float32),
    })  # fmt: skip


def train(size: dict, batch: int, dtype: str, **model) -> Task:
    """A train step of pretraining; the state is donated from step to step."""
    _prepare()
    network = network_of(Size(**size), dtype, **model)
    optimizer, rate = make_optimizer(OPTIMIZER, 1)
    train_step = step.make_train_step(step.make_loss(network), optimizer, rate)
    state = jax.jit(step.make_init(network, optimizer))(jax.random.key(0))
    data = batch_of(network, batch)

    def advance():
        nonlocal state
        state, metrics = train_step(state, data)
        return metrics

    return _task(advance)


def distill(
    size: dict, batch: int, dtype: str, teacher: dict | None = None, samples: int = 0
) -> Task:
    """A train step of a student: of `teacher` in memory, of `samples` cached ids, or of neither.

    Args:
      size: fields of the student's `Size`.
      batch: number of images.
      dtype: dtype of compute.
      teacher: fields of the teacher's `Size`.
      samples: distinct ids that the cache has of every position.
    """
    _prepare()
    network, frozen = network_of(Size(**size), dtype), None
    data, loss = batch_of(network, batch), step.make_loss(network)
    if teacher:
        large = network_of(Size(**teacher), dtype)
        frozen = {"teachers": (jax.jit(large.init)(jax.random.key(1)),)}
        loss = distillation.make_loss(network, (large,), config_lib.Distill(teacher=("its name",)))
    if samples:
        shape = (*data["tokens"].shape, samples)
        ids = np.random.default_rng(0).integers(network.vocabulary, size=shape, dtype=np.uint16)
        drawn = {"teacher_ids": ids, "teacher_counts": np.ones(shape, np.uint8)}
        data |= sharding.global_batch(drawn)
        loss = cached_distillation.make_loss(network, config_lib.Distill(cached=True))
    optimizer, rate = make_optimizer(OPTIMIZER, 1)
    train_step = step.make_train_step(loss, optimizer, rate)
    state = jax.jit(step.make_init(network, optimizer))(jax.random.key(0))

    def advance():
        nonlocal state
        state, metrics = train_step(state, data, frozen)
        return metrics

    return _task(advance)


def generate(size: dict, batch: int, dtype: str, count: int) -> Task:
    """Draws the first `count` tokens of `batch` sequences."""
    _prepare()
    network = network_of(Size(**size), dtype)
    params = jax.jit(network.init)(jax.random.key(0))
    unknown = np.full((batch, count), generation.UNKNOWN, np.int32)
    given, key = sharding.shard_rows(unknown), jax.random.key(1)

    def draw():
        return generation.generate(network, params, given, key)

    return _task(draw)


def sample(run: str, batch: int, draft: str = "", count: int = 4) -> Task:
    """Draws `batch` new images from a run's network, a `draft` proposing `count` tokens a pass."""
    _prepare()
    small = None
    if draft:
        found = api.load(draft, stage="pretrain")
        small = Draft(found.network, found.params)
    model = api.load(run, stage="pretrain")
    drawing = config_lib.Drawing(draft_tokens=count)
    sampler = Sampler(model.network, model.params, drawing, small)
    stopwatch, numbers = generation.Stopwatch(), itertools.count()

    def draw(**options):
        return sampler.new(batch, jax.random.key(0), number=next(numbers), **options)

    draw(stopwatch=stopwatch)
    return Task(draw, facts={"tokens": model.network.length, "passes": stopwatch.passes})


def read(size: dict, batch: int, dtype: str, what: str) -> Task:
    """Reads features of images.

    Args:
      size: fields of the network's `Size`.
      batch: number of images.
      dtype: dtype of compute.
      what: "last": features of the last layer; "all": features of all layers; "ridge": features of
        all layers, added to the moments of a ridge regression.
    """
    _prepare()
    network = network_of(Size(**size), dtype)
    params, data = jax.jit(network.init)(jax.random.key(0)), batch_of(network, batch)
    moments = ridge.empty(network.config.layers + 1, network.config.width, CLASSES)

    @jax.jit
    def last(params, data):
        return network.bind(params)(data["tokens"], data["variant"]).pooled[-1]

    def every():
        return features.read(network, params, data, raw=False, votes=1)

    def summed():
        nonlocal moments
        moments = ridge.add(moments, every(), data)
        return moments

    steps = {"last": lambda: last(params, data), "all": every, "ridge": summed}
    return Task(steps[what], jax.block_until_ready)


def attend(
    batch: int,
    tokens: int,
    heads: int,
    head_size: int,
    backward: bool,
    dtype: str,
    plain: bool = False,
) -> Task:
    """Causal attention, in the form that gptv_jax uses on this platform, or in its plain form."""
    _prepare()
    shape, spec = (batch, tokens, heads, head_size), sharding.BATCH_FIRST
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, gradient = (jax.random.normal(key, shape, dtype, out_sharding=spec) for key in keys)

    def forward(q, k, v):
        if plain:
            return attention.attention(q, k, v, jnp.tri(tokens, dtype=bool))
        return attention.self_attention(q, k, v, visible=causal_mask(q.shape[1]))

    function = jax.jit((lambda *qkv: jax.vjp(forward, *qkv)[1](gradient)) if backward else forward)
    return Task(lambda: function(*qkv), jax.block_until_ready)


def matmul(side: int, dtype: str) -> Task:
    """A product of two square matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return Task(lambda: product(a, b), jax.block_until_ready)


def copy(size: int) -> Task:
    """Copies `size` bytes in place, to measure memory bandwidth.

    Each byte is read and written; in place, so that no memory pages are new.
    """
    _prepare()
    array = jnp.ones(size // 4, jnp.float32)
    negative = jax.jit(lambda x: -x, donate_argnums=0)  # XLA would omit a copy that changes nothing

    def advance():
        nonlocal array
        array = negative(array)
        return array

    return Task(advance, jax.block_until_ready)


def _task(function: Callable) -> Task:
    """A task that starts one iteration and then waits for the one before, as training does.

    With more iterations under way, a CPU's devices may wait for each other for ever.
    """
    before = None

    def step():
        nonlocal before
        begun = function()
        before, ended = begun, before
        jax.block_until_ready(ended)
        return begun

    return Task(step, jax.block_until_ready)


def _prepare() -> None:
    """Sets the mesh of the default configuration."""
    jax.set_mesh(sharding.make_mesh(config_lib.Mesh()))
