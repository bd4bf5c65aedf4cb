"""The mesh, its axis names, and the one table of partition specs.

Three axes, always present so that specs never change:
  data    the batch is split, weights are replicated;
  fsdp    the batch is split, and so are weights and optimizer state (along D, the width); a layer
          gathers its weights just before it uses them;
  tensor  heads (H) and MLP width (F) are split; activations between layers are replicated.

Axes are explicit: a sharding is part of an array's type, a wrong one fails when the step is traced,
and moments made by `zeros_like(weight)` are sharded as the weight is.
"""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes that split the batch

# Letters: B batch, T tokens, D width, H heads, K head size, F mlp width, V vocabulary, L layers,
# C classes, S start vectors. A parameter without a row here cannot be created.
PARAMETERS: dict[str, P] = {
    "token_embedding": P(None, "fsdp"),  # V D   small V stays whole: integer cross-entropy is local
    "start": P(None, "fsdp"),  # S D
    "position": P(None, "fsdp"),  # T D
    "row": P(None, "fsdp"),  # image height, D
    "column": P(None, "fsdp"),  # image width, D
    "norm_1": P(None, None),  # L D   norms are tiny: splitting them would only add collectives
    "qkv": P(None, "fsdp", None, "tensor", None),  # L D 3 H K
    "attention_out": P(None, "tensor", None, "fsdp"),  # L H K D
    "norm_2": P(None, None),  # L D
    "mlp_in": P(None, "fsdp", "tensor"),  # L D F
    "mlp_out": P(None, "tensor", "fsdp"),  # L F D
    "final_norm": P(None),  # D
    "head": P(None, "fsdp"),  # V D
    "class_head": P(None, "fsdp"),  # C D
    "class_center": P(None),  # D
    "class_scale": P(None),  # D
}
HIDDEN = P(BATCH)  # activations [B, T, D], and everything else that leads with the batch


def make_mesh(config: config_lib.Mesh) -> jax.sharding.Mesh:
    """The mesh over all devices of all processes, -1 filled.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = [config.data, config.fsdp, config.tensor]
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    shown = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    elif known != count or -1 in sizes:
        raise InputError(
            f"{shown} does not divide the devices: there are {count}, the named sizes multiply to "
            f"{known}; choose sizes whose product is {count}, or one -1 to fill."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def check(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
    """Fails before any work where the mesh does not divide the batch or the network.

    Raises:
      InputError: names the field, its value and the number that must divide it.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    ways = mesh.shape["data"] * fsdp
    rows = [
        ("model.width", config.model.width, fsdp, "mesh.fsdp"),
        ("model.heads", config.model.heads, tensor, "mesh.tensor"),
        (
            "model.width * model.mlp_ratio",
            config.model.width * config.model.mlp_ratio,
            tensor,
            "mesh.tensor",
        ),
        ("probe.batch_size", config.probe.batch_size, ways, "mesh.data * mesh.fsdp"),
    ]
    if config.probe.method == "sgd":
        sgd = config.probe.sgd
        rows.append(("probe.sgd.batch_size", sgd.batch_size, ways, "mesh.data * mesh.fsdp"))
    for name, train in (("train", config.train), ("finetune.train", config.finetune.train)):
        rows.append(
            (
                f"{name}.batch_size",
                train.batch_size,
                ways * train.microbatches,
                f"mesh.data * mesh.fsdp * {name}.microbatches",
            )
        )
    for field, value, divisor, source in rows:
        if value % divisor:
            raise InputError(
                f"config.{field} is {value}, which {divisor} (config.{source}) does not divide; "
                f"take a multiple of {divisor} or another mesh."
            )


def gather(weight: jax.Array, dtype) -> jax.Array:
    """The weight in the compute dtype, whole along fsdp; its gradient is scattered back.

    Cast first: in bfloat16 half the bytes travel.
    """
    spec = jax.typeof(weight).sharding.spec
    return jax.sharding.reshard(
        weight.astype(dtype), P(*(None if a == "fsdp" else a for a in spec))
    )


def global_batch(batch: dict) -> dict:
    """This process's rows of a batch (NumPy, B / processes) as global arrays split over BATCH."""
    sharding = NamedSharding(jax.sharding.get_mesh(), HIDDEN)
    # A transfer that is meant, which JAX does not see where there are several processes.
    with jax.transfer_guard_host_to_device("allow"):
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def from_everywhere(rows) -> jax.Array:
    """Rows that every process holds whole (NumPy, [B, ...]) as one array split over BATCH."""
    sharding = NamedSharding(jax.sharding.get_mesh(), HIDDEN)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


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

    return jax.tree.map(fill, jax.eval_shape(init, jax.random.key(0)))
