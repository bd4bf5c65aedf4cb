"""Drawing as stages and users ask for it: NumPy in and out, any number of rows, on any mesh."""

import dataclasses
import itertools
import math

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode import generation
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A network and how it is drawn from; settings as in `config.Sample`."""

    network: Network
    params: dict
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    guidance_schedule: str = "constant"
    guidance_power: float = 1.0

    def __post_init__(self):
        """Raises InputError where there is guidance, but not the network for it."""
        if self.guidance != 1:
            check_guidable(self.network.config, f"guidance is {self.guidance}")

    @classmethod
    def of(cls, config: config_lib.Sample, network: Network, params: dict) -> "Sampler":
        """As the config says."""
        return cls(network, params, **{name: getattr(config, name) for name in cls.settings()})

    @classmethod
    def settings(cls) -> set[str]:
        """Names of what says how tokens are drawn."""
        return {each.name for each in dataclasses.fields(cls)} - {"network", "params"}

    def draw(
        self,
        given: Int[np.ndarray, "G T"],
        key: PRNGKeyArray,
        labels: Int[np.ndarray, "G"] | None = None,
        samples: int = 1,
    ) -> Int[np.ndarray, "rows T"]:
        """Whole sequences; every process gets all of them. Call it under the mesh of `params`.

        Args:
          given: tokens, the same in every process, `generation.UNKNOWN` where one is to be drawn.
          key: of the draws, which depend on neither the mesh nor on how many rows come after.
          labels: class of each row; None: none is told, and there is nothing to guide.
          samples: sequences of each row, next to each other.
        """
        unknown, columns = (given == generation.UNKNOWN).any(axis=0), self.network.grid[1]
        whole = np.repeat(given, samples, axis=0)
        if not unknown.any():
            return whole
        # In whole rows of the grid, so that few programs serve all masks.
        rows = np.flatnonzero(unknown.reshape(-1, columns).any(axis=1))
        first, end = rows[0] * columns, (rows[-1] + 1) * columns
        if len(given) % sharding.batch_ways():
            # Rather more prompts than more samples of each that only fill.
            labels = None if labels is None else np.repeat(labels, samples)
            given, samples = whole, 1
        shape = (self.guidance_schedule, self.guidance, self.guidance_power, self.network.length)
        drawn = generation.generate(
            self.network,
            self.params,
            sharding.filled(given[:, :end]),
            key,
            prefix=int(first),
            variant=None if labels is None else sharding.filled(labels),
            guidance=None if labels is None else generation.guidance_scales(*shape),
            samples=samples,
            steps=0,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        drawn = multihost_utils.process_allgather(drawn, tiled=True)[: len(whole)]
        return np.concatenate([drawn, whole[:, end:]], axis=1)

    def outpaint(
        self,
        tokens: Int[np.ndarray, "B T"],
        margins: tuple[int, int, int, int],
        key: PRNGKeyArray,
        labels: Int[np.ndarray, "B"] | None = None,
    ) -> Int[np.ndarray, "B rows columns"]:
        """Sequences as grids, with more drawn around them; they themselves stay as they are.

        The network's window moves over the larger grid, outward from the image, row by row of
        windows, by half its side at most; what it finds unknown it draws in raster order.

        Args:
          tokens: of the images in the middle.
          margins: rows above and below, columns to the left and to the right.
          key: see `draw`.
          labels: the same.
        """
        (rows, columns), (top, bottom, left, right) = self.network.grid, margins
        grid = tokens.reshape(-1, rows, columns)
        around = ((0, 0), (top, bottom), (left, right))
        grid = np.pad(grid, around, constant_values=generation.UNKNOWN)
        windows = itertools.product(_outward(top, bottom, rows), _outward(left, right, columns))
        for number, (row, column) in enumerate(windows):
            window = grid[:, row : row + rows, column : column + columns]
            given, of_window = window.reshape(len(grid), -1), jax.random.fold_in(key, number)
            window[:] = self.draw(given, of_window, labels).reshape(window.shape)
        return grid


def _outward(before: int, after: int, side: int) -> list[int]:
    """Where windows begin: the middle one, those after it, those before it, half a side apart."""
    step, end = max(side // 2, 1), before + after
    later = [min(start, end) for start in range(before + step, end + step, step)]
    earlier = [max(start, 0) for start in range(before - step, -step, -step)]
    return [before, *later, *earlier]


def check_guidable(config: config_lib.Model, what: str) -> None:
    """Raises InputError, which begins with `what`, where no network was trained for guidance."""
    if not (config.class_tokens and config.label_dropout):
        raise InputError(
            f"{what}, but guidance takes a network that knows images with and without their class: "
            f"config.model.class_tokens is {config.class_tokens} and config.model.label_dropout "
            f"{config.label_dropout:g}; train one with both above 0, or take guidance 1."
        )


def known_tokens(
    mask: Bool[np.ndarray, "*B height width"], grid: tuple[int, int]
) -> Bool[np.ndarray, "*B T"]:
    """Which tokens of a grid are known, where these pixels are: those with all of theirs."""
    (rows, columns), (*batch, height, width) = grid, mask.shape
    patches = mask.reshape(*batch, rows, height // rows, columns, width // columns)
    return patches.all(axis=(-3, -1)).reshape(*batch, rows * columns)


def class_rows(count: int, classes: int) -> Int[np.ndarray, "rows columns"]:
    """Labels of about `count` images: a row for each class, or for some where they are too many."""
    rows = classes if classes <= count else math.isqrt(count)
    labels = np.arange(rows, dtype=np.int32) * classes // rows
    return np.repeat(labels[:, None], count // rows, axis=1)
