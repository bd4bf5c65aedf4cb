"""Checkpoints: the only file that knows Orbax.

A checkpoint is {state, info}: the state's arrays under flat names such as `params.blocks.qkv`, and
a small JSON with the data position, the elapsed time, the evaluations so far and checksums. Saving
is asynchronous and atomic: a half-written folder is never taken for a checkpoint.
"""

import json
import logging
import pathlib
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from gptv_jax import files, hosts, sharding
from gptv_jax.errors import InputError, as_input_error, first_line, list_differences

LOG = logging.getLogger(__name__)


def found(place: epath.Path) -> bool:
    """Whether `place` holds a checkpoint of any stage."""
    return any(True for _ in place.glob("*/*/_CHECKPOINT_METADATA"))


def claim(place: epath.Path, run: str, workdir: pathlib.Path, *, moved: bool) -> None:
    """Makes a folder for checkpoints outside the run folder, and marks it as the run `run`'s.

    `workdir` is the run folder; `moved` says that the run's checkpoints may have been moved here.

    Raises:
      InputError: `place` cannot be written, or holds the checkpoints of another run.
    """
    mark, setting = place / "run.json", "config.checkpoint_dir"
    files.claim(place, setting)
    with as_input_error(f"{setting}={place} cannot be used", advice="; name another place"):
        owner = json.loads(mark.read_text()) if mark.exists() else {}
        # A start that was refused or killed may have left the mark, but no checkpoint.
        begun = owner.get("workdir") == str(workdir)
        if (moved and not owner) or ((begun or not owner) and not found(place)):
            owner = {"id": run, "workdir": str(workdir)}
            mark.write_text(json.dumps(owner))
    if owner.get("id") != run:
        whose = f"the run in {owner['workdir']}" if owner else "another run"
        raise InputError(f"{setting}={place} holds the checkpoints of {whose}; name another place.")


class Checkpoints:
    """The checkpoints of one stage, one folder a step."""

    def __init__(self, folder: epath.PathLike, keep: int = 1, *, read_only: bool = False):
        """Opens the folder, making it where needed.

        Args:
          folder: `<checkpoints>/<stage>` of a run, a path or an address such as gs://bucket/path.
          keep: number of newest checkpoints that stay; the checkpoint `best` stays as well.
          read_only: changes nothing on disk.
        """
        self.folder = epath.Path(folder).absolute()
        self._read_only = read_only
        self.best: int | None = None  # the step whose checkpoint always stays
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, self),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "info": ocp.JsonCheckpointHandler()}
        # Orbax warns where a folder is opened to be read only, as was asked for.
        absl_logger = logging.getLogger("absl")
        absl_logger.addFilter(_is_no_read_only_warning)
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        finally:
            absl_logger.removeFilter(_is_no_read_only_warning)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()  # waits for the checkpoint that is being written

    def steps(self) -> list[int]:
        """Steps with a checkpoint on disk, in order, as process 0 sees the folder."""
        return hosts.from_first(lambda: sorted(self._manager.all_steps()))

    def save(self, step: int, state, info: dict) -> None:
        """Starts to write a checkpoint, unless the step has one."""
        if step in self.steps():
            return
        arrays = sharding.by_name(state)
        content = {"info": info, "bit_sums": _bit_sums(arrays)}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            info=ocp.args.JsonSave({**content, "checksum": _checksum(content)}),
        )
        self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until every checkpoint is on disk."""
        self._manager.wait_until_finished()

    def restore_latest(self, abstract):
        """`(state, info)` of the newest readable checkpoint; None where there are no checkpoints.

        A damaged checkpoint is logged and moved to `damaged/` beside the stage's folder, and the
        previous checkpoint is restored.

        Args:
          abstract: `jax.ShapeDtypeStruct`s whose shardings decide the placement, so the mesh may
            differ from the mesh that saved.

        Raises:
          InputError: names or shapes differ (all are listed), or every checkpoint is damaged.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                found = self.restore(step, abstract)
            except DamagedError as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                moved = "" if self._read_only else f" Moved to {self.set_aside(bad)}."
                LOG.warning("%s%s Falling back to step %d.", error, moved, step)
            return found
        if damaged:
            raise InputError(
                f"no checkpoint in {self.folder} can be read: {damaged[max(damaged)]} Put a good "
                "copy back, or delete the folder to start this stage from its beginning."
            )
        return None

    def restore(self, step: int, abstract):
        """`(state, info)` of one checkpoint; `abstract` may be a part of the state, `params` say.

        Raises:
          InputError: names or shapes differ from the saved ones; all that differ are listed.
          DamagedError: a process cannot read the checkpoint; raised on all processes.
        """
        wanted = sharding.by_name(abstract)

        def shapes() -> dict:
            saved = self._manager.item_metadata(step)["state"]
            return {name: tuple(leaf.shape) for name, leaf in dict(saved.tree).items()}

        self._compare(
            step, {k: leaf.shape for k, leaf in wanted.items()}, self._together(step, shapes)
        )
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
            info=ocp.args.JsonRestore(),
        )
        restored = self._together(step, lambda: self._manager.restore(step, args=arguments))
        arrays, record = {name: restored["state"][name] for name in wanted}, restored["info"]
        sums = _bit_sums(arrays)
        self._together(step, lambda: _check(record, sums))
        state = jax.tree.unflatten(jax.tree.structure(abstract), list(arrays.values()))
        return state, record["info"]

    def _together(self, step: int, function: Callable):
        """The result of `function()`, which must contain no collective operation.

        Raises:
          DamagedError: `function()` fails on any process; raised on all processes.
        """
        result = damage = None
        try:
            result = function()
        except Exception as error:  # whatever the storage raises
            damage = DamagedError(self.folder / str(step), error)
        if any(hosts.from_all(damage is not None)):
            elsewhere = ValueError("another process cannot read it")
            raise damage or DamagedError(self.folder / str(step), elsewhere)
        return result

    def _compare(self, step: int, wanted: dict, saved: dict) -> None:
        tops = {name.split(".")[0] for name in wanted}  # a part of the state may be asked for
        saved = {name: shape for name, shape in saved.items() if name.split(".")[0] in tops}
        differing = list_differences({n: tuple(shape) for n, shape in wanted.items()}, saved)
        if differing:
            raise InputError(
                f"checkpoint {self.folder / str(step)} does not fit this network: "
                + "; ".join(differing)
                + "."
            )

    def set_aside(self, step: int) -> epath.Path:
        """Moves a damaged checkpoint to `damaged/` beside the stage's folder; returns the path."""
        target = self.folder.parent / "damaged" / f"{self.folder.name}-{step}"

        def move() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.rmtree(missing_ok=True)
            (self.folder / str(step)).rename(target)

        hosts.from_first(move)
        self._manager.reload()
        return target


class _NewestAndBest(preservation_policy.PreservationPolicy):
    """Tells Orbax to keep the newest checkpoints and the best checkpoint."""

    def __init__(self, newest: int, checkpoints: Checkpoints):
        self.newest, self.checkpoints = newest, checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = sorted(steps)[-self.newest :]
        return [step in newest or step == self.checkpoints.best for step in steps]


class DamagedError(InputError):
    """A checkpoint that cannot be read."""

    def __init__(self, path: epath.Path, cause: Exception):
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        super().__init__(f"checkpoint {path} is damaged ({reason}).")


def _is_no_read_only_warning(record: logging.LogRecord) -> bool:
    return "directory is read only" not in record.getMessage()


def _check(record: dict, sums: dict[str, int]) -> None:
    """Raises ValueError where the info or the arrays differ from what was saved."""
    content = {k: record[k] for k in ("info", "bit_sums") if k in record}
    if len(content) < 2 or record.get("checksum") != _checksum(content):
        raise ValueError("its info has changed")
    wrong = [name for name, total in sums.items() if total != record["bit_sums"].get(name)]
    if wrong:
        raise ValueError(f"the values of {', '.join(wrong)} are not those saved")


def _bit_sums(arrays: dict) -> dict[str, int]:
    """Every array's bit patterns summed modulo 2^32: a checksum that no sharding changes.

    The storage notices cut or missing files, but not a changed byte within an array.
    """
    return {name: int(total) for name, total in jax.device_get(_sum_bits(arrays)).items()}


@jax.jit
def _sum_bits(arrays: dict) -> dict:
    def total(x):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, unsigned)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(total, arrays)


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
