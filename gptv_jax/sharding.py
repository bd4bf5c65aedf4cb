"""The mesh, its axis names, and the one table of partition specs.

Four axes, always present so that specs never change, those that talk most the closest together:
  data      the batch is split, weights are replicated; of several TPU slices or nodes, this is the
            axis that crosses them, as it needs the least from the network between them;
  fsdp      the batch is split, and so are weights and optimizer state (along D, the width); a layer
            gathers its weights just before it uses them;
  sequence  positions (T) are split, for sequences too long for one device; attention gathers keys
            and values;
  tensor    heads (H) and MLP width (F) are split; activations between layers are replicated.

Axes are explicit: a sharding is part of an array's type, a wrong one fails when the step is traced,
and moments made by `zeros_like(weight)` are sharded as the weight is.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes that split the batch

# Letters: B batch, T tokens, D width, H heads, K head size, F mlp width, V vocabulary, L layers,
# C classes, S start vectors. A parameter without a row here cannot be created.
PARAMETERS: dict[str, P] = {
    "token_embedding": P(None, "fsdp"),  # V D   small V stays whole: integer cross-entropy is local
    "start": P(None, "fsdp"),  # S D
    "position": P(None, "fsdp"),  # T D; T+1 with target_position
    "target_position": P(None, "fsdp"),  # T D
    "row": P(None, "fsdp"),  # image height, D
    "column": P(None, "fsdp"),  # image width, D
    "norm_1": P(None, None),  # L D   norms are tiny: splitting them would only add collectives
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
    "conv": P(None, None, None, "fsdp"),  # height, width, inputs, outputs; one of these is a width
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
}
BATCH_FIRST = P(BATCH)  # what leads with the batch
HIDDEN = P(BATCH, "sequence")  # activations [B, T, D], and what else there is of every position

_LENGTH = {  # T, in words of the fields
    False: "data.image_size ** 2",
    True: "(data.image_size / tokens.autoencoder.downsample) ** 2",
}
_MLP_WIDTH = {  # in words of the fields
    "gelu": "model.width * model.mlp_ratio",
    "swiglu": "model.width * model.mlp_ratio * 2/3, rounded,",
}


def make_mesh(config: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over devices, -1 filled.

    Args:
      config: the sizes of its axes.
      devices: those of a TPU topology, say; None: all of all processes.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or several slices cannot be
        laid along "data" and "fsdp".
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Explicit,) * len(AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(sizes, AXES, types, devices=devices)
    # An axis of the mesh may take a part of one of the torus's: 16 devices of a 4x4x4, say.
    if slices == 1:
        laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        across = over_slices(sizes, slices)
        within = [size // count for size, count in zip(sizes, across, strict=True)]
        laid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return Mesh(laid, AXES, axis_types=types)


def over_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """How many slices lie along each of AXES: as many as go along "data", the rest along "fsdp".

    Raises:
      InputError: these two do not take all of them.
    """
    along_data = math.gcd(slices, sizes[0])
    along_fsdp = slices // along_data
    if sizes[1] % along_fsdp:
        raise InputError(
            f"config.mesh.data={sizes[0]} and config.mesh.fsdp={sizes[1]} cannot be laid over "
            f"{slices} slices; take a multiple of {slices} for data, or for both together."
        )
    return along_data, along_fsdp, *(1 for _ in sizes[2:])


def axis_sizes(config: config_lib.Mesh, count: int) -> tuple[int, ...]:
    """Sizes of AXES over `count` devices, -1 filled.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    shown = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    elif known != count or -1 in sizes:
        raise InputError(
            f"{shown} does not divide the devices: there are {count}, the named sizes multiply to "
            f"{known}; choose sizes whose product is {count}, or one -1 to fill."
        )
    return tuple(sizes)


def check(config: config_lib.Config, mesh: Mesh | AbstractMesh, sections: Sequence[str]) -> None:
    """Checks that the mesh divides what these sections of the config are about.

    Args:
      config: of the run.
      mesh: of the run.
      sections: "model", "tokenizer", "train", "probe", "finetune"; others have nothing to divide.

    Raises:
      InputError: names the field, its value and the number that must divide it.
    """
    fsdp, sequence, tensor = (mesh.shape[axis] for axis in AXES[1:])
    ways, split = mesh.shape["data"] * fsdp, "mesh.data * mesh.fsdp"
    model, probe, tokenizer = config.model, config.probe, config.tokenizer
    grid, learned = config.tokens.grid(config.data.image_size), config.tokens.kind == "learned"

    def batches(name: str, train: config_lib.Train) -> tuple[str, int, int, str]:
        parts, source = ways * train.microbatches, f"{split} * {name}.microbatches"
        return f"{name}.batch_size", train.batch_size, parts, source

    widths = enumerate(config.tokens.autoencoder.widths)
    probed = ("probe.batch_size", probe.batch_size, ways, split)
    rows = {
        "model": [
            ("model.width", model.width, fsdp, "mesh.fsdp"),
            ("model.heads", model.heads, tensor, "mesh.tensor"),
            (_MLP_WIDTH[model.mlp], model.mlp_width, tensor, "mesh.tensor"),
            (_LENGTH[learned], math.prod(grid), sequence, "mesh.sequence"),
        ],
        "tokenizer": [
            *((f"tokens.autoencoder.widths[{i}]", w, fsdp, "mesh.fsdp") for i, w in widths),
            ("tokenizer.train.batch_size", tokenizer.train.batch_size, ways, split),
        ],
        "train": [batches("train", config.train), *([probed] if probe.every else [])],
        "probe": [probed],
        "finetune": [batches("finetune.train", config.finetune.train)],
    }
    if tokenizer.adversarial:
        width = tokenizer.discriminator_width
        rows["tokenizer"].append(("tokenizer.discriminator_width", width, fsdp, "mesh.fsdp"))
    if probe.method == "sgd":
        rows["probe"].append(("probe.sgd.batch_size", probe.sgd.batch_size, ways, split))
    _must_divide([row for section in sections for row in rows.get(section, ())])


def _must_divide(rows: list[tuple[str, int, int, str]]) -> None:
    """Of each row the field, its value, and what must divide it, from which setting."""
    for field, value, divisor, source in rows:
        if value % divisor:
            raise InputError(
                f"config.{field} is {value}, which {divisor} (config.{source}) does not divide; "
                f"take a multiple of {divisor} or another mesh."
            )


def platform() -> str:
    """Of the mesh in force, not of this process: programs are compiled for absent devices, too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def one_device() -> AbstractMesh:
    """A mesh of one CPU, to trace a program under in its plain form."""
    return abstract_mesh((1,) * len(AXES), "cpu", "cpu")


def abstract_mesh(sizes: Sequence[int], kind: str, platform: str) -> AbstractMesh:
    """A mesh of these sizes of AXES, to trace programs under as they are for a kind of device."""
    return AbstractMesh(
        tuple(sizes),
        AXES,
        axis_types=(AxisType.Explicit,) * len(AXES),
        abstract_device=AbstractDevice(kind, None, platform),
    )


def batch_ways() -> int:
    """Parts that the mesh in force splits the batch into."""
    return math.prod(jax.sharding.get_mesh().shape[axis] for axis in BATCH)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """`(i, n)`: this process reads the i-th n-th of every global batch.

    Processes whose devices hold the same rows, as where "tensor" or "sequence" crosses them, read
    the same share.

    Raises:
      InputError: some processes have more rows than others, or hold them partly in common.
    """
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(each)) for each in held.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(rows):
        raise InputError(
            f"config.mesh splits the batch over {len(rows)} groups of devices, which "
            f"{len(held)} processes cannot share evenly; take other sizes of mesh.tensor and "
            "mesh.sequence."
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def gather(weight: jax.Array, dtype) -> jax.Array:
    """The weight in the compute dtype, whole along fsdp; its gradient is scattered back.

    Cast first: in bfloat16 half the bytes travel.
    """
    spec = jax.typeof(weight).sharding.spec
    return jax.sharding.reshard(
        weight.astype(dtype), P(*(None if a == "fsdp" else a for a in spec))
    )


def global_batch(batch: dict) -> dict:
    """This process's rows of a batch (NumPy, `batch_share`) as global arrays split over BATCH."""
    sharding = NamedSharding(jax.sharding.get_mesh(), BATCH_FIRST)
    # A transfer that is meant, which JAX does not see where there are several processes.
    with jax.transfer_guard_host_to_device("allow"):
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def from_everywhere(rows) -> jax.Array:
    """Rows that every process holds whole (NumPy, [B, ...]) as one array split over BATCH."""
    sharding = NamedSharding(jax.sharding.get_mesh(), BATCH_FIRST)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def filled(rows) -> jax.Array:
    """The same of any number of rows but none; the last is repeated where they do not divide."""
    missing = -len(rows) % batch_ways()
    return from_everywhere(np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]))


def by_name(tree) -> dict:
    """`{"params.blocks.qkv": leaf, ...}` of nested dicts and states, in the order of leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def abstract(init):
    """Shapes and shardings of what `init(key)` makes, without making it: a restore's skeleton."""
    mesh = jax.sharding.get_mesh()

    def fill(leaf):
        spec = getattr(leaf.sharding, "spec", P())  # scalars come without one: replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    # The key is made as it is traced: the mesh may be of devices that this machine does not have.
    return jax.tree.map(fill, jax.eval_shape(lambda: init(jax.random.key(0))))
