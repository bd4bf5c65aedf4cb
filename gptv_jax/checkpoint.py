"""Checkpoints: the only file that knows Orbax.

A checkpoint is {state, info}: the state's arrays under flat names such as `params.blocks.qkv`, and
a small JSON with the data position, the elapsed time, the evaluations so far and checksums. Saving
is asynchronous and atomic: a half-written folder is never taken for a checkpoint.
"""

import glob
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from gptv_jax import errors, files, hosts, sharding
from gptv_jax.errors import InputError, as_input_error, cut, naming, shorten

LOG = logging.getLogger(__name__)
# Orbax warns where a folder is opened to be read only, as is asked for here. Its errors come with
# tracebacks from several threads; each is an exception as well.
logging.getLogger("absl").addFilter(
    lambda r: (
        "directory is read only" not in r.getMessage()
        and not (r.levelno == logging.ERROR and "orbax" in r.pathname)
    )
)


class _LocalPath(type(epath.Path())):
    """A folder whose own name is no pattern, as in pathlib.

    The `glob` of etils takes [ ] * ? in the folder's name as a pattern too. Orbax would then miss
    the files that a checkpoint in such a folder is put together from.
    """

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return (self / name for name in glob.glob(pattern, root_dir=self))


def for_orbax(place: epath.PathLike) -> epath.Path:
    """The path of a folder, as Orbax can take it; an address such as gs://bucket/path stays one."""
    path = epath.Path(place)
    return path if "://" in str(path) else _LocalPath(path.absolute())


def found(place: epath.Path) -> bool:
    """Whether `place` holds a checkpoint of any stage."""
    return any(True for _ in for_orbax(place).glob("*/*/_CHECKPOINT_METADATA"))


def newest_step(folder: epath.Path) -> int:
    """The step of the newest checkpoint in the folder of a training; 0 where there is none."""
    made = (each for each in folder.iterdir() if (each / "_CHECKPOINT_METADATA").exists())
    return max((int(each.name) for each in made if each.name.isdecimal()), default=0)


def claim(place: epath.Path, run: str, workdir: pathlib.Path, *, moved: bool) -> None:
    """Makes a folder for checkpoints outside the run folder, and marks it as the run `run`'s.

    `workdir` is the run folder; `moved` says that the run's checkpoints may have been moved here.
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


class DamagedError(InputError):
    """A checkpoint that cannot be read."""


LONGEST_PATH = 4096 - 300  # bytes; Orbax adds up to 250 to the path of the folder


def check_place(place: epath.Path, setting: str) -> None:
    """Raises InputError where Orbax or tensorstore cannot take the path of a local folder."""
    path, problem = str(place), None
    if "\\" in path and os.name != "nt":
        problem = "has a backslash, which tensorstore takes for a slash"
    elif "://" not in path and len(os.fsencode(path)) > LONGEST_PATH:
        problem = f"is longer than the {LONGEST_PATH} bytes that leave room for checkpoints"
    if problem:
        raise InputError(f"{setting}={cut(path, 100)} {problem}; name another folder.")


class Checkpoints:
    """The checkpoints of one stage, one folder a step."""

    def __init__(self, folder: epath.PathLike, keep: int = 1, *, read_only: bool = False):
        """Opens `<checkpoints>/<stage>` of a run, and makes it unless `read_only`.

        The `keep` newest checkpoints stay, and the checkpoint of the step `best`.
        """
        self.folder, self._keep, self._read_only = for_orbax(folder), keep, read_only
        self.best: int | None = None
        # The step of the first checkpoint, and its smallest array, until they are read back.
        self._unread: tuple[int, dict] | None = None
        access = {"cleanup_tmp_directories": not read_only, "create": not read_only}
        access |= {"read_only": read_only, "save_interval_steps": int(not read_only)}
        options = ocp.CheckpointManagerOptions(preservation_policy=self, **access)
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "info": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with naming(self.folder):
            self._manager.close()  # waits for the checkpoint that is being written

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Tells Orbax, whose `PreservationPolicy` this is, which checkpoints stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = {*sorted(steps)[-self._keep :], self.best}
        return [step in stay for step in steps]

    def steps(self) -> list[int]:
        """Steps with a checkpoint on disk, in order, as process 0 sees the folder."""
        return hosts.from_first(lambda: sorted(self._manager.all_steps()))

    def save(self, step: int, state, info: dict) -> None:
        """Starts to write a checkpoint, unless the step has one."""
        self._read_back()
        if step in (steps := self.steps()):
            return
        arrays = sharding.by_name(state)
        if not steps:
            name, least = min(arrays.items(), key=lambda item: item[1].size)
            least = jax.ShapeDtypeStruct(least.shape, least.dtype, sharding=least.sharding)
            self._unread = step, {name: least}
        content = {"info": info, "bit_sums": _bit_sums(arrays)}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            info=ocp.args.JsonSave({**content, "checksum": _checksum(content)}),
        )
        with naming(self.folder):
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        with naming(self.folder):
            self._manager.wait_until_finished()
        self._read_back()

    def _read_back(self) -> None:
        """Reads an array of the first checkpoint, so that a place that keeps nothing is found."""
        if self._unread is None:
            return
        (step, array), self._unread = self._unread, None
        with naming(self.folder):
            self._manager.wait_until_finished()
        try:
            self._read(step, array)
        except DamagedError as error:
            problem = f"{cut(str(error).rstrip('.'), 200)}, although it was just written"
            advice = "name another folder or disk for the checkpoints"
            raise InputError(f"{problem}; {advice}.") from error

    def restore_latest(self, abstract):
        """`(state, info)` of the newest readable checkpoint; None where there are no checkpoints.

        `abstract` is as for `restore`. A damaged checkpoint is logged and moved to `damaged/`
        beside the stage's folder, and the previous checkpoint is restored.
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
        if not damaged:
            return None
        raise InputError(
            f"no checkpoint in {self.folder} can be read: {damaged[max(damaged)]} Put a good copy "
            "back, or delete the folder to start this stage from its beginning."
        )

    def restore(self, step: int, abstract):
        """`(state, info)` of one checkpoint.

        `abstract` are the `jax.ShapeDtypeStruct`s of the state or of a part of it, `params` say.
        Their shardings decide the placement, so the mesh may differ from the mesh that saved.
        Raises InputError, with a list, where names or shapes differ from the saved ones, and on all
        processes DamagedError where one of them cannot read the checkpoint.
        """
        wanted = sharding.by_name(abstract)
        parts = {name.split(".")[0] for name in wanted}

        def saved_shapes() -> dict:
            tree = dict(self._manager.item_metadata(step)["state"].tree)
            return {n: tuple(leaf.shape) for n, leaf in tree.items() if n.split(".")[0] in parts}

        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        if differing := errors.list_differences(shapes, self._together(step, saved_shapes)):
            given, shown = self.folder / str(step), shorten(differing, "; ")
            raise InputError(f"checkpoint {given} does not fit this network: {shown}.")
        arrays, info = self._read(step, wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), list(arrays.values())), info

    def _read(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict, dict]:
        """The named arrays and the info, after their checksums were compared."""
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True),
            info=ocp.args.JsonRestore(),
        )
        restored = self._together(step, lambda: self._manager.restore(step, args=items))
        arrays, record = {name: restored["state"][name] for name in wanted}, restored["info"]
        sums = _bit_sums(arrays)
        self._together(step, lambda: _check(record, sums))
        return arrays, record["info"]

    def _together(self, step: int, function: Callable):
        """The result of `function()`, which contains no collective operation.

        Where it fails on one process, all processes raise DamagedError.
        """
        result = reason = None
        try:
            result = function()
        except Exception as error:  # whatever the storage raises
            reason = f"{type(error).__name__}: {errors.first_line(error)}"
        if any(hosts.from_all(reason is not None)):
            reason = reason or "another process cannot read it"
            raise DamagedError(f"checkpoint {self.folder / str(step)} is damaged ({reason}).")
        return result

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


def _check(record: dict, sums: dict[str, int]) -> None:
    content = {key: record.get(key) for key in ("info", "bit_sums")}
    if record.get("checksum") != _checksum(content):
        raise ValueError("its info has changed")
    if wrong := [n for n, total in sums.items() if total != record["bit_sums"].get(n)]:
        raise ValueError(f"the values of {shorten(wrong)} are not those saved")


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _bit_sums(arrays: dict) -> dict[str, int]:
    """Every array's bit patterns summed modulo 2^32: a checksum that no sharding changes.

    The storage notices cut or missing files, but not a changed byte within an array.
    """
    return {name: int(total) for name, total in jax.device_get(_sum_bits(arrays)).items()}


@jax.jit
def _sum_bits(arrays: dict) -> dict:
    bits = {name: x.view(f"uint{8 * x.dtype.itemsize}") for name, x in arrays.items()}
    return {name: jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32) for name, x in bits.items()}
