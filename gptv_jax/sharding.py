"""The mesh, its axis names, and the only table of partition specs.

The mesh always has four axes, so that specs never change; the last axes communicate the most:
  data      splits the batch, weights are replicated; TPU slices and nodes lie along this axis,
            because it needs the least from the network between them;
  fsdp      splits the batch, and weights and optimizer state along the width D; a layer gathers its
            weights just before it uses them;
  sequence  splits positions (T), for sequences too long for one device; attention gathers keys and
            values;
  tensor    splits heads (H) and MLP width (F); activations between layers are replicated.

Axes are explicit: a sharding is part of an array's type, so a wrong sharding fails when the step is
traced, and moments made by `zeros_like(weight)` have the weight's sharding.
"""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptv_jax import config as config_lib
from gptv_jax import files, hardware
from gptv_jax.errors import InputError

AXES = ("data", "fsdp", "sequence", "tensor")
TYPES = (AxisType.Explicit,) * len(AXES)
BATCH = ("data", "fsdp")  # the mesh axes that split the batch

# Letters: B batch, T tokens, D width, H heads, K head size, F mlp width, V vocabulary, L layers,
# C classes, S start vectors. A parameter without a row here cannot be created.
PARAMETERS: dict[str, P] = {
    "token_embedding": P(None, "fsdp"),  # V D; V is small and whole, so cross-entropy is local
    "patch_embedding": P(None, "fsdp"),  # height, width and channels of a token's pixels; D
    "start": P(None, "fsdp"),  # S D
    "position": P(None, "fsdp"),  # T D; T+1 with target_position
    "target_position": P(None, "fsdp"),  # T D
    "frame": P(None, "fsdp"),  # frames of a clip, D
    "row": P(None, "fsdp"),  # image height, D
    "column": P(None, "fsdp"),  # image width, D
    "norm_1": P(None, None),  # L D; norms are tiny: splitting them would only add collectives
    "qkv": P(None, "fsdp", None, "tensor", None),  # L D 3 H K
    "q_norm": P(None, None),  # L K
    "k_norm": P(None, None),  # L K
    "attention_out": P(None, "tensor", None, "fsdp"),  # L H K D
    "norm_2": P(None, None),  # L D
    "mlp_in": P(None, "fsdp", "tensor"),  # L D F
    "mlp_gate_up": P(None, "fsdp", None, "tensor"),  # L D 2 F
    "mlp_out": P(None, "tensor", "fsdp"),  # L F D
    "final_norm": P(None),  # D
    "head": P(None, "fsdp"),  # V D
    "level_rows": P(None, "fsdp"),  # the levels of all dimensions of a code, D
    "prefix_scale": P(None, "fsdp"),  # the prefixes of all levels, D
    "embedding": P(None, "fsdp"),  # V D, of a part after the first one
    "place": P(None),  # D
    "place_head": P(None),  # D
    "stem_conv": P(None, None, None, "fsdp"),  # 3, 3, inputs, outputs; not one of Muon's matrices
    "from_stem": P(None, "fsdp"),  # channels, D
    "conv": P(None, None, None, "fsdp"),  # height, width, inputs, outputs
    "from_pixels": P(None, None, None, "fsdp"),
    "to_pixels": P(None, None, "fsdp", None),
    "from_code": P(None, None, None, "fsdp"),
    "to_code": P(None, None, "fsdp", None),
    "score": P(None, None, "fsdp", None),
    "bias": P(None),  # outputs
    "gain": P(None),  # channels
    "codebook": P(None, None),  # codes, dimensions
    "class_head": P(None, "fsdp"),  # C D
    "class_center": P(None),  # D
    "class_scale": P(None),  # D
    "feature_map": P(None, "fsdp"),  # D of the student, width of the teacher's features
}
BATCH_FIRST = P(BATCH)  # arrays [B, ...]
HIDDEN = P(BATCH, "sequence")  # activations [B, T, D] and other arrays [B, T, ...]


def make_mesh(config: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, by default all devices of all processes.

    InputError if the sizes of the axes do not multiply to the number of devices, or if several
    slices cannot be laid along "data" and "fsdp".
    """
    devices = hardware.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        return jax.make_mesh(sizes, AXES, TYPES, devices=devices)
    # An axis of the mesh may take a part of an axis of the torus, such as 16 devices of a 4x4x4.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        laid = mesh_utils.create_device_mesh(sizes, devices, **split)
    else:
        across = over_slices(sizes, slices)
        within = [size // count for size, count in zip(sizes, across, strict=True)]
        laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)
    return Mesh(laid, AXES, axis_types=TYPES)


def over_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """How many slices lie along each of AXES: as many as possible along "data", then "fsdp".

    InputError if the two cannot take all slices.
    """
    along_data = math.gcd(slices, sizes[0])
    along_fsdp = slices // along_data
    if sizes[1] % along_fsdp:
        raise InputError(
            f"config.mesh.data={sizes[0]} and config.mesh.fsdp={sizes[1]} cannot be laid over "
            f"{slices} slices; take a multiple of {slices} for data, or for both together."
        )
    return along_data, along_fsdp, 1, 1


def axis_sizes(config: config_lib.Mesh, count: int) -> tuple[int, ...]:
    """Sizes of AXES over `count` devices, with -1 replaced by what the other sizes leave.

    InputError if the sizes do not multiply to `count`.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    shown = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    elif known != count or -1 in sizes:
        raise InputError(
            f"{shown} does not divide the devices: there are {count}, the named sizes multiply to "
            f"{known}; choose sizes whose product is {count}, or one -1 to fill; "
            f"on a CPU, JAX_NUM_CPU_DEVICES={known} makes {known} devices."
        )
    return tuple(sizes)


def check(
    config: config_lib.Config,
    mesh: Mesh | AbstractMesh,
    sections: Sequence[str],
    length: int | None = None,
) -> None:
    """Checks that the mesh divides what these sections of the config are about.

    The sections are "model", "tokenizer", "train", "probe" and "finetune"; other sections
    have nothing to divide. `length` is the number of positions of the network's sequence; None: an
    image's tokens, or a clip's. The InputError names the field, its value and the number that must
    divide it.
    """
    fsdp, sequence, tensor = ((mesh.shape[axis], f"mesh.{axis}") for axis in AXES[1:])
    ways, split = mesh.shape["data"] * mesh.shape["fsdp"], "mesh.data * mesh.fsdp"
    model, probe, tokenizer = config.model, config.probe, config.tokenizer

    def batches(name: str, train: config_lib.Train) -> tuple[str, int, int, str]:
        parts, source = ways * train.microbatches, f"{split} * {name}.microbatches"
        return f"config.{name}.batch_size", train.batch_size, parts, source

    mlp = "the width of the MLP, from config.model.width and config.model.mlp_ratio,"
    learned = config.tokens.kind == "learned"
    frames, example = ("config.data.frames, ", "a clip") if config.data.frames else ("", "an image")
    sizes = frames + "config.data.image_size"
    sizes += " and config.tokens.autoencoder.downsample" * learned
    positions = f"the number of tokens of {example}, from {sizes},", math.prod(config.grid)
    if length not in (None, positions[1]):
        positions = f"the number of positions of a sequence, from {sizes} and config.task,", length
    widths = enumerate(config.tokens.autoencoder.widths)
    stem = config.task.stem if config.task.image_input == "pixels" else ()
    probed = ("config.probe.batch_size", probe.batch_size, ways, split)
    rows = {  # the field or the name of a number, the number, what must divide it, from where
        "model": [
            ("config.model.width", model.width, *fsdp),
            ("config.model.heads", model.heads, *tensor),
            (mlp, model.mlp_width, *tensor),
            (*positions, *sequence),
        ],
        "tokenizer": [
            *((f"config.tokens.autoencoder.widths[{i}]", width, *fsdp) for i, width in widths),
            ("config.tokenizer.train.batch_size", tokenizer.train.batch_size, ways, split),
        ],
        "train": [batches("train", config.train), *([probed] if probe.every else [])],
        "probe": [probed],
        "finetune": [
            batches("finetune.train", config.finetune.train),
            *((f"config.task.stem[{i}]", width, *fsdp) for i, width in enumerate(stem)),
        ],
    }
    if tokenizer.adversarial:
        width = tokenizer.discriminator_width
        rows["tokenizer"].append(("config.tokenizer.discriminator_width", width, *fsdp))
    if probe.method == "sgd":
        rows["probe"].append(("config.probe.sgd.batch_size", probe.sgd.batch_size, ways, split))
    for field, value, divisor, source in (row for name in sections for row in rows.get(name, ())):
        if value % divisor:
            raise InputError(
                f"{field} is {value}, which {divisor} (config.{source}) does not divide; "
                f"take a multiple of {divisor} or another mesh."
            )


def platform() -> str:
    """The platform of the mesh in force, whose devices this process need not have."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def one_device() -> AbstractMesh:
    """A mesh of one CPU, for tracing programs in their plain form."""
    return abstract_mesh((1,) * len(AXES), "cpu", "cpu")


def abstract_mesh(sizes: Sequence[int], kind: str, platform: str) -> AbstractMesh:
    """A mesh of these sizes of AXES, for tracing programs as they are for a kind of device."""
    device = AbstractDevice(kind, None, platform)
    return AbstractMesh(tuple(sizes), AXES, axis_types=TYPES, abstract_device=device)


def batch_ways() -> int:
    """Number of parts into which the mesh in force splits the batch."""
    return math.prod(jax.sharding.get_mesh().shape[axis] for axis in BATCH)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """`(i, n)`: this process reads part i of n equal parts of every global batch.

    Processes whose devices hold the same rows read the same part, which happens where "tensor" or
    "sequence" crosses processes. InputError if processes have different numbers of rows, or share a
    part of their rows.
    """
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    process_of = np.array([[device.process_index for device in row] for row in rows])
    processes = np.unique(process_of)
    held = {p: tuple(np.flatnonzero((process_of == p).any(axis=1))) for p in processes}
    shares = sorted(set(held.values()))
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(rows):
        raise InputError(
            f"config.mesh splits the batch over {len(rows)} groups of devices, which "
            f"{len(held)} processes cannot share evenly; take other sizes of mesh.tensor and "
            "mesh.sequence."
        )
    return shares.index(held[jax.process_index()]), len(shares)


def gather(weight: jax.Array, dtype) -> jax.Array:
    """The weight in the compute dtype, gathered over fsdp; its gradient is scattered back.

    The weight is cast before it is gathered: in bfloat16 half the bytes travel.
    """
    axes = (None if axis == "fsdp" else axis for axis in jax.typeof(weight).sharding.spec)
    return jax.sharding.reshard(weight.astype(dtype), P(*axes))


def global_batch(batch: dict) -> dict:
    """This process's rows of a batch (NumPy, `batch_share`) as global arrays split over BATCH."""
    sharding = NamedSharding(jax.sharding.get_mesh(), BATCH_FIRST)
    # An explicit transfer, which JAX takes for an implicit one with several processes.
    with jax.transfer_guard_host_to_device("allow"):
        make = functools.partial(jax.make_array_from_process_local_data, sharding)
        return jax.tree.map(make, batch)


def shard_rows(rows) -> jax.Array:
    """NumPy rows [B, ...], of which every process has all, as one array split over BATCH.

    The last row is repeated until the mesh divides the number of rows.
    """
    rows = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch_ways(), axis=0)])
    sharding = NamedSharding(jax.sharding.get_mesh(), BATCH_FIRST)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def by_name(tree) -> dict:
    """Leaves of nested dicts and states by flat name, such as "params.blocks.qkv", in order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def hash_params(params) -> str:
    """`files.hash_arrays` of parameters on the current mesh, equal on every mesh and process.

    Every process calls this function; a parameter is whole on every device for as long as its bytes
    are read.
    """
    whole = jax.jit(lambda x: jax.sharding.reshard(x, P()))
    arrays = {
        name: np.asarray(leaf if leaf.is_fully_addressable else whole(leaf))
        for name, leaf in by_name(params).items()
    }
    return files.hash_arrays(arrays)


def abstract(init):
    """Abstract arrays, with shardings, of the tree that `init(key)` makes.

    Raises InputError where no mesh is set, as when a user calls a stage without one.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        raise InputError(
            "no device mesh is set; call a stage within `with jax.set_mesh(context.mesh)`, or call "
            "gptv_jax.train(config, workdir, stages), which sets the mesh."
        )

    def fill(leaf):
        spec = getattr(leaf.sharding, "spec", P())  # scalars have no spec and are replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    # The key is made inside the traced function: this machine may not have the mesh's devices.
    return jax.tree.map(fill, jax.eval_shape(lambda: init(jax.random.key(0))))
