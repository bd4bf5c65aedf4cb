"""The linear probe of a run, on test images under other transforms."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from gptv_jax import hosts
from gptv_jax.probe import features
from gptv_jax.probe.logistic import fit_probe
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained
from gptv_jax.tasks.network import network_of


def scores(
    context: Context, lists: dict[str, tuple[str, ...]], done: Callable[[], None]
) -> dict[str, float]:
    """The accuracy of the best layer's probe under each list of transforms; () for the config's.

    The probe is fitted as the stage probe fits it by L-BFGS. Of the test split the first
    `config.robustness.images` images are read; `done()` is called after each pass over them.
    """
    config, images = context.config.probe, context.config.robustness.images
    network, params = network_of(context.config, read=config), pretrained.load(context).params
    layer = hosts.from_first(lambda: context.folder.summary()["probe/best_layer"])

    def read(batches: features.Batches, split: str) -> features.Split:
        every = features.of_network(network, params, batches, raw=config.features == "raw")
        kept = features.Kept(every, [layer])
        for x, _ in kept(split):
            jax.block_until_ready(x)
        return kept.taken([layer])[split]

    def corrupted(entries: tuple[str, ...]) -> Callable[[str], Iterator[dict]]:
        return lambda split: context.data.evaluation(
            split, config.batch_size, images, entries=entries
        )

    plain = features.batches(context.data, config)
    splits = {split: read(plain, split) for split in ("train", "validation")}
    tests = {}
    for name, entries in lists.items():
        tests[name] = read(corrupted(entries), "test")
        done()
    # One fit serves all lists: their images are one test split.
    every = tuple(np.concatenate(parts) for parts in zip(*tests.values(), strict=True))
    right = fit_probe(config, splits | {"test": every})["predicted"] == every[1]
    ends = np.cumsum([len(labels) for _, labels in tests.values()])
    return {
        name: float(part.mean())
        for name, part in zip(tests, np.split(right, ends[:-1]), strict=True)
    }
