"""The trainings of a run: what a stage runs, and what the planner knows of the costs.

For a plan the programs are traced, not run or compiled: JAX then says which arrays the backward
pass keeps and how each is split, under the rematerialisation of the config.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import flops
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Part
from gptv_jax.planning.memory import Memory, spec_of, stored_dtype, total_bytes
from gptv_jax.tasks.network import network_of
from gptv_jax.train import objective, optimizer, step

WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes


class Call(NamedTuple):
    """A collective that the sharding of a training requires, `count` times a step."""

    kind: str
    axes: tuple[str, ...]  # mesh axes; axes of size 1 are ignored
    count: int
    bytes: float | int  # of one call: of the whole array, on one device


@dataclasses.dataclass(frozen=True)
class Training:
    """A training of a configuration: what all kinds of training share.

    Each subclass adds the `network` that is trained, its `loss`, `batch` and first state (`init`),
    the `flops` of training on one `unit`, and the costs of a step on a mesh: `executed`,
    `activations`, `collectives` and `weights_read`, which `Pretraining` describes.
    """

    config: config_lib.Config

    section: ClassVar[str]  # path of the section `train` in the configuration
    sections: ClassVar[tuple[str, ...]]  # of the configuration, which the mesh must divide
    unit: ClassVar[str]  # FLOPs are shown per "token" or "image"
    tunable: ClassVar[bool]  # whether rematerialisation and microbatches can be chosen
    draws: ClassVar[bool] = False  # whether sequences are drawn from what is trained
    encoding: ClassVar[int] = 0  # FLOPs of making a step's tokens from pixels by a network
    after: ClassVar[Callable | None] = None  # as `make_train_step` takes it
    relative_width: ClassVar[float] = 1.0  # as `make_optimizer` takes it, like `layer_decay`
    layer_decay: ClassVar[float] = 1.0

    @property
    def train(self) -> config_lib.Train:
        return operator.attrgetter(self.section)(self.config)

    @functools.cached_property
    def optimizer(self) -> tuple:
        """The optimizer, and its learning rate by step."""
        settings, scales = self.train.optimizer, (self.layer_decay, self.relative_width)
        return optimizer.make_optimizer(settings, self.train.steps, *scales)

    @functools.cached_property
    def train_step(self) -> Callable:
        """See `step.make_train_step`."""
        return step.make_train_step(
            self.loss,
            *self.optimizer,
            microbatches=self.train.microbatches,
            seed=self.config.seed,
            ema=self.train.ema,
            after=self.after,
        )

    def frozen(self, split: jax.NamedSharding | None = None) -> dict | None:
        """Abstract arrays that the loss reads and does not train."""

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The stage's train step for the mesh, which is in force, on abstract arguments."""
        rows, whole = (jax.NamedSharding(mesh, spec) for spec in (sharding.BATCH_FIRST, jax.P()))
        batch = self.batch(self.train.batch_size, rows)
        return self.train_step.lower(sharding.abstract(self.init), batch, self.frozen(whole))

    def state(self) -> tuple[list, list]:
        """Parameters, and all other arrays that live from step to step, as abstract arrays."""
        state = {**state_of(self.traced(), sharding.one_device()), "frozen": self.frozen()}
        del state["step"]
        return jax.tree.leaves(state.pop("params")), jax.tree.leaves(state)

    def memory(self, mesh: AbstractMesh) -> Memory:
        """Bytes of a device of the mesh."""
        params, rest = self.state()
        parameters = total_bytes(params, mesh)
        ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
        batch = jax.tree.leaves(self.batch(self.train.batch_size // ways))
        # Rows of the batch that the devices which share them work on at a time.
        rows = self.train.batch_size // (ways * self.train.microbatches)
        sizes = {**mesh.shape, **dict.fromkeys(sharding.BATCH, 1)}
        return Memory(
            parameters,
            total_bytes(rest, mesh),
            sum(array.size * array.dtype.itemsize for array in batch),
            parameters,  # gradients
            self.activations(mesh.update(axis_sizes=tuple(sizes.values())), rows),
        )

    def traced(self, **changes) -> "Training":
        """The training as the key of its traced programs: all meshes and microbatches share them.

        `changes` are of sections of the configuration.
        """
        return self.with_train(1, **{"mesh": config_lib.Mesh(), **changes})

    def with_train(self, microbatches: int, **changes) -> "Training":
        """The training with other microbatches, and `changes` of sections of the configuration."""
        section, _, inner = self.section.partition(".")
        train = dataclasses.replace(self.train, microbatches=microbatches)
        if inner:
            train = dataclasses.replace(getattr(self.config, section), **{inner: train})
        config = dataclasses.replace(self.config, **{section: train}, **changes)
        return dataclasses.replace(self, config=config)


@functools.cache
def state_of(training: Training, mesh: AbstractMesh) -> dict:
    """The first train state, as abstract arrays on the mesh."""
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.eval_shape(lambda: training.init(jax.random.key(0)))


@functools.cache
def residuals(training: Training, mesh: AbstractMesh, rows: int) -> list:
    """Abstract arrays, besides the arguments, that the forward pass keeps for the backward pass."""
    state, loss = state_of(training, mesh), training.loss
    frozen = {**(training.frozen() or {}), "critic": state.get("critic")}

    def backward(params, frozen, batch):
        random = jax.random.key(0), jnp.int32(training.train.steps)
        return jax.vjp(lambda p: loss(p, frozen, batch, *random), params, has_aux=True)[1]

    with jax.sharding.use_abstract_mesh(mesh):
        batch = training.batch(rows, jax.NamedSharding(mesh, sharding.BATCH_FIRST))
        jaxpr = jax.make_jaxpr(backward)(state["params"], frozen, batch).jaxpr
    given = {id(var) for var in jaxpr.invars}
    return list({id(v): v.aval for v in jaxpr.outvars if id(v) not in given}.values())


@functools.cache
def _encoder_flops(autoencoder: config_lib.Autoencoder, size: tuple[int, int], frames: int) -> int:
    return flops.of_autoencoder(autoencoder, size, frames)["encoder"]


@dataclasses.dataclass(frozen=True)
class Pretraining(Training):
    """The pretraining of a GPT."""

    section, sections = "train", ("model", "train")
    unit = "token"
    tunable = True

    @functools.cached_property
    def network(self) -> Network:
        return network_of(self.config)

    @property
    def draws(self) -> bool:
        return self.section == "train" and self.config.model.objective == "autoregressive"

    @property
    def units(self) -> int:
        """Number of tokens of an image or clip, the unit that FLOPs are counted for.

        The axis "sequence" can split them.
        """
        return self.network.length

    @property
    def encoding(self) -> int:
        """FLOPs of a learned tokenizer on the images or clips of a step; a cache has its codes."""
        data, tokens = self.config.data, self.config.tokens
        if tokens.kind != "learned":
            return 0
        of_one = _encoder_flops(tokens.autoencoder, data.size, data.frames)
        return self.train.batch_size * of_one

    @property
    def heads(self) -> int:
        """The most parts that the axis "tensor" can split weights into."""
        return self.config.model.heads

    @property
    def relative_width(self) -> float:
        return self.config.model.relative_width

    @property
    def flops(self) -> flops.Flops:
        return flops.training(self.network)

    @property
    def loss(self) -> Callable:
        return step.make_loss(self.network, steps=self.train.steps)

    def start(self, params: dict) -> dict:
        """The state before the first step, see `step.state_of`."""
        return step.state_of(params, self.optimizer[0], self.train.ema)

    @property
    def init(self) -> Callable:
        return step.make_init(self.network, self.optimizer[0], self.train.ema)

    def batch(self, rows: int, split: jax.NamedSharding | None = None) -> dict:
        """Abstract arrays of a batch of `rows` images."""
        shapes = {"tokens": (rows, self.network.length), "variant": (rows,)}
        if self.network.config.class_tokens:
            shapes["label"] = (rows,)
        found = {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=split) for k, s in shapes.items()}
        if self.config.data.still_share:
            found["still"] = jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=split)
        return found

    def executed(self, mesh: AbstractMesh) -> int:
        """FLOPs that a step executes, on all devices together."""
        rows = self.train.batch_size // self.train.microbatches
        parts = max((chunks for _, chunks in self._chunks(rows, mesh)), default=1)
        split, platform = mesh.shape["sequence"], mesh.abstract_device.platform
        of_token = flops.executed(self.network, platform, split, parts)
        return of_token.total * self.units * self.train.batch_size

    def activations(self, mesh: AbstractMesh, rows: int) -> int:
        """Bytes that a device holds besides state, batch and gradients.

        The bytes are of the arrays kept for the backward pass, and of the arrays of the layer or of
        the logits being computed. The devices of `mesh`, whose batch axes are 1, work on `rows`
        images at a time.
        """
        c = self.config.model
        dtype = stored_dtype(c.dtype, mesh.abstract_device.platform)
        count = functools.partial(total_bytes, mesh=mesh, head_size=c.width // c.heads)

        def kept(**changes) -> list:
            model = dataclasses.replace(c, dtype=dtype, **changes)
            return residuals(self.traced(model=model), mesh, rows)

        def of_layers(arrays: list, layers: int) -> list:
            """Arrays stacked over layers: this axis is never split, an axis of rows is."""
            return [a for a in arrays if a.shape[:1] == (layers,) and not (*spec_of(a), None)[0]]

        # While the backward pass works on a layer, all activations of the layer exist, and so also
        # those that rematerialisation does not keep.
        found, two_layers = kept(), kept(remat="none", layers=2, scan_layers=True)
        kept_of_layer = count(of_layers(found, c.layers)) // c.layers
        repeated = count(of_layers(two_layers, 2), one_layer=True) - kept_of_layer
        # Logits of one chunk and their gradient, if there are several chunks; else logits are kept.
        split = 1 if self.network.several else mesh.shape["sequence"]
        logits = [
            4 * part.vocabulary * (rows * part.size // (split * chunks)) * (chunks > 1)
            for part, chunks in self._chunks(rows, mesh)
        ]
        return count(found) + max([repeated, *(2 * each for each in logits)])

    def _chunks(self, rows: int, mesh: AbstractMesh) -> list[tuple[Part, int]]:
        """Every predicted part, and the number of chunks in which its logits are computed."""
        parts = [part for part in self.network.layout.parts if part.predicted]
        return [(p, objective.loss_chunks(self.network, rows, mesh.shape, p)) for p in parts]

    def collectives(self, sizes: dict[str, int]) -> Iterator[Call]:
        """The collectives that the sharding requires in a step on a mesh of these sizes."""
        c, network, parts = self.config.model, self.network, self.train.microbatches
        width, tensor, sequence = WIDTHS[c.dtype], sizes["tensor"], sizes["sequence"]
        # Columns of qkv, attention_out, and the MLP's first and second matrix.
        first = 2 * c.mlp_width if c.mlp == "swiglu" else c.mlp_width
        for columns in (3 * c.width, c.width, first, c.mlp_width):
            weight = columns * c.width * width / tensor
            yield Call("all-gather", ("fsdp",), c.layers * parts * 2, weight)  # forward, backward
            yield Call("reduce-scatter", ("fsdp",), c.layers * parts, weight)
            shard = weight / sizes["fsdp"]
            yield Call("all-reduce", ("data", "sequence"), c.layers * parts, shard)
        vectors = sum(part.vocabulary * (1 + part.predicted) for part in network.layout.parts)
        vectors += c.learned_positions * network.length
        tables = vectors * c.width * width
        yield Call("all-gather", ("fsdp",), parts, tables)
        yield Call("all-reduce", ("data", "fsdp", "sequence"), parts, tables)

        # Each layer has two products whose results are partial sums, in each direction.
        positions = self.train.batch_size * network.length
        positions /= parts * sizes["data"] * sizes["fsdp"] * sequence
        hidden = positions * c.width * width
        sums = 4 + (c.remat == "full")
        yield Call("all-reduce", ("tensor",), c.layers * parts * sums, hidden)
        # Keys and values of all positions, and their gradients.
        again, both = c.remat != "none", 2 * hidden * sequence / tensor
        yield Call("all-gather", ("sequence",), c.layers * parts * (1 + again), both)
        yield Call("reduce-scatter", ("sequence",), c.layers * parts, both)

    def weights_read(self, sizes: dict[str, int]) -> float | int:
        """Bytes of weights that a device reads and writes in a step, without the optimizer.

        The forward and the backward pass and repetition read weights; gradients are written.
        """
        c = self.config.model
        weights = flops.forward(self.network)["matmul"] // 2 * WIDTHS[c.dtype] / sizes["tensor"]
        return self.train.microbatches * (3 + (c.remat == "full")) * weights
