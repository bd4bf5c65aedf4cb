"""The trainings of a run: what a stage runs, and what the planner knows of the costs.

For a plan the programs are traced, not run or compiled: JAX then says which arrays the backward
pass keeps and how each is split, under the rematerialisation of the config.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding, weights
from gptv_jax.data import cached_tokens
from gptv_jax.model import flops
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Part
from gptv_jax.planning import collectives
from gptv_jax.planning.memory import Memory, spec_of, stored_dtype, total_bytes
from gptv_jax.tasks.network import network_of
from gptv_jax.tokens import palette
from gptv_jax.train import cached_distillation, distillation, objective, optimizer, step


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
        """Abstract arrays that the loss reads and does not train, on the mesh in force."""

    def check(self, mesh: Mesh | AbstractMesh) -> None:
        """InputError: the mesh does not divide what is trained, see `sharding.check`."""
        length = self.units if self.unit == "token" else None
        sharding.check(self.config, mesh, self.sections, length)

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The stage's train step for the mesh, which is in force, on abstract arguments."""
        rows, whole = (jax.NamedSharding(mesh, spec) for spec in (sharding.BATCH_FIRST, jax.P()))
        batch = self.batch(self.train.batch_size, rows)
        return self.train_step.lower(sharding.abstract(self.init), batch, self.frozen(whole))

    def state(self) -> tuple[list, list, list]:
        """Abstract arrays: parameters, teachers' weights, what else lives from step to step."""
        with jax.sharding.use_abstract_mesh(sharding.one_device()):
            state = {**state_of(self.traced(), sharding.one_device()), **(self.frozen() or {})}
        del state["step"]
        apart = state.pop("params"), state.pop("teachers", ())
        return tuple(map(jax.tree.leaves, (*apart, state)))

    def memory(self, mesh: AbstractMesh) -> Memory:
        """Bytes of a device of the mesh."""
        params, taught, rest = self.state()
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
            total_bytes(taught, mesh),
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
    params = state["params"] | state.get(step.BESIDE, {})

    def backward(params, frozen, batch):
        random = jax.random.key(0), jnp.int32(training.train.steps)
        return jax.vjp(lambda p: loss(p, frozen, batch, *random), params, has_aux=True)[1]

    with jax.sharding.use_abstract_mesh(mesh):
        frozen = {**(training.frozen() or {}), "critic": state.get("critic")}
        batch = training.batch(rows, jax.NamedSharding(mesh, sharding.BATCH_FIRST))
        jaxpr = jax.make_jaxpr(backward)(params, frozen, batch).jaxpr
    given = {id(var) for var in jaxpr.invars}
    return list({id(v): v.aval for v in jaxpr.outvars if id(v) not in given}.values())


@dataclasses.dataclass(frozen=True)
class Pretraining(Training):
    """The pretraining of a GPT."""

    # Networks of the teachers; None: the teachers that the configuration names are read.
    teachers: tuple[Network, ...] | None = None

    section, sections = "train", ("model", "train")
    unit = "token"
    tunable = True
    stage: ClassVar[str] = "pretrain"  # whose weights are teachers

    def __post_init__(self):
        """InputError: the configuration names a teacher that cannot be read."""
        if self.teachers is None:
            names, colours = self.distill.teacher, self.config.tokens.palette
            colours = palette.load(weights.locate(colours)) if names and colours else None
            object.__setattr__(self, "teachers", weights.networks(names, self.stage, colours))

    @property
    def distill(self) -> config_lib.Distill:
        return self.config.distill

    @functools.cached_property
    def network(self) -> Network:
        return network_of(self.config)

    def check(self, mesh: Mesh | AbstractMesh) -> None:
        super().check(mesh)
        for teacher in self.teachers:
            config = dataclasses.replace(self.config, model=teacher.config)
            sharding.check(config, mesh, ("model",), self.units)

    def frozen(self, split: jax.NamedSharding | None = None) -> dict | None:
        def shapes(init: Callable) -> dict:
            return jax.eval_shape(lambda: init(jax.random.key(0)))

        arrays = sharding.abstract if split else shapes
        found = tuple(arrays(teacher.init) for teacher in self.teachers)
        return {"teachers": found} if found else None

    @property
    def draws(self) -> bool:
        drawn = self.config.model.objective == "autoregressive" and not self.network.patch
        return self.section == "train" and drawn

    @property
    def units(self) -> int:
        """Tokens of an image or clip: FLOPs are counted for each, and "sequence" splits them."""
        return self.network.length

    @property
    def encoding(self) -> int:
        """FLOPs of a learned tokenizer on the images or clips of a step; a cache has its codes."""
        data, tokens = self.config.data, self.config.tokens
        if tokens.kind != "learned":
            return 0
        of_one = flops.of_autoencoder(tokens.autoencoder, data.size, data.frames)
        return self.train.batch_size * of_one["encoder"]

    @property
    def heads(self) -> int:
        """The most parts that the axis "tensor" can split weights into."""
        return self.config.model.heads

    @property
    def relative_width(self) -> float:
        return self.config.model.relative_width

    @property
    def whole_logits(self) -> bool:
        """Whether the loss takes the probabilities of all codes from a head by levels, too."""
        return not self.network.classes and bool(self.teachers or self.distill.cached)

    @property
    def flops(self) -> flops.Flops:
        return flops.training(self.network, self.teachers, self.whole_logits)

    @property
    def loss(self) -> Callable:
        if self.teachers:
            given = self.network, self.teachers, self.distill
            return distillation.make_loss(*given, steps=self.train.steps)
        if self.distill.cached:
            return cached_distillation.make_loss(self.network, self.distill, self.train.steps)
        return step.make_loss(self.network, steps=self.train.steps)

    def start(self, params: dict) -> dict:
        """The state before the first step, see `step.state_of`."""
        key = jax.random.key(self.config.seed)
        maps = distillation.init_maps(self.network, self.teachers, self.distill, key)
        return step.state_of(params, self.optimizer[0], self.train.ema, maps)

    @property
    def init(self) -> Callable:
        """`key -> state`, see `start`; every leaf is created in its sharding."""
        return lambda key: self.start(self.network.init(key))

    def batch(self, rows: int, split: jax.NamedSharding | None = None) -> dict:
        """Abstract arrays of a batch of `rows` images."""
        array = functools.partial(jax.ShapeDtypeStruct, sharding=split)
        length, data = self.network.length, self.config.data
        found = {"tokens": array((rows, length), jnp.int32), "variant": array((rows,), jnp.int32)}
        found |= {"label": array((rows,), jnp.int32)} if self.network.config.class_tokens else {}
        found |= {"still": array((rows,), jnp.bool_)} if data.still_share else {}
        if self.distill.cached:
            drawn = array((rows, length, cached_tokens.most_distinct(data)), jnp.uint16)
            found |= {"teacher_ids": drawn, "teacher_counts": drawn}
        if self.network.patch:
            found["image"] = array((rows, *data.size, self.network.patch[-1]), jnp.uint8)
        return found

    def executed(self, mesh: AbstractMesh) -> int:
        """FLOPs that a step executes, on all devices together."""
        rows = self.train.batch_size // self.train.microbatches
        parts = max((chunks for _, chunks in self._chunks(rows, mesh)), default=1)
        given = mesh.abstract_device.platform, mesh.shape["sequence"], parts, self.teachers
        of_token = flops.executed(self.network, *given, self.whole_logits)
        return of_token.total * self.units * self.train.batch_size

    def activations(self, mesh: AbstractMesh, rows: int) -> int:
        """Bytes that a device of `mesh`, whose batch axes are 1, holds for `rows` images at a time.

        Counted are arrays kept for the backward pass, and arrays of the layer or of the logits that
        are being computed; state, batch and gradients are not counted.
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
        found, two = kept(), of_layers(kept(remat="none", layers=2, scan_layers=True), 2)
        repeated = count(two, one_layer=True) - count(of_layers(found, c.layers)) // c.layers
        # Logits of one chunk and their gradient, if there are several chunks; else logits are kept.
        split = 1 if self.network.several else mesh.shape["sequence"]
        networks = 1 + len(self.teachers)
        logits = [
            4 * networks * p.vocabulary * (rows * p.size // (split * chunks)) * (chunks > 1)
            for p, chunks in self._chunks(rows, mesh)
        ]
        taught = (self._of_teacher(each, mesh, rows) for each in self.teachers)
        return count(found) + max([repeated, *(2 * each for each in logits), *taught])

    def _of_teacher(self, teacher: Network, mesh: AbstractMesh, rows: int) -> int:
        """Bytes, at most, of the arrays that a layer of a teacher's forward pass holds at once."""
        # They are the inputs and the output of one operation: the layer's three largest arrays.
        c, alone = teacher.config, dataclasses.replace(self.config, distill=config_lib.Distill())
        model = dataclasses.replace(c, layers=2, scan_layers=True, remat="none")
        found = residuals(Pretraining(alone).traced(model=model), mesh, rows)
        stacked = [a for a in found if a.shape[:1] == (2,) and not (*spec_of(a), None)[0]]
        size = functools.partial(total_bytes, mesh=mesh, head_size=c.width // c.heads)
        return sum(sorted(size([each], one_layer=True) for each in stacked)[-3:])

    def _chunks(self, rows: int, mesh: AbstractMesh) -> list[tuple[Part, int]]:
        """Every predicted part, and the number of chunks in which its logits are computed."""
        parts = [part for part in self.network.layout.parts if part.predicted]
        networks = 1 + len(self.teachers)
        chunks = functools.partial(objective.loss_chunks, self.network, rows, mesh.shape)
        return [(p, chunks(p, networks) if self.whole_logits or not p.levels else 1) for p in parts]

    def collectives(self, sizes: dict[str, int]) -> Iterator[collectives.Call]:
        """The collectives that the sharding requires in a step on a mesh of these sizes."""
        rows = self.train.batch_size, self.train.microbatches
        yield from collectives.of_training(self.network, *rows, sizes)
        for teacher in self.teachers:
            yield from collectives.of_forward(teacher, *rows, sizes)

    def weights_read(self, sizes: dict[str, int]) -> float | int:
        """Bytes of weights that a device reads and writes in a step, without the optimizer.

        The forward and the backward pass and repetition read weights; gradients are written.
        """
        c = self.config.model
        read = (3 + (c.remat == "full")) * collectives.matrix_bytes(self.network)
        read += sum(map(collectives.matrix_bytes, self.teachers))
        return self.train.microbatches * read / sizes["tensor"]
