"""One of several real processes, for test_data.py: writes its share of some batches.

Before that all tell each other something, which is checked here. Two processes score a segmentation
together as well.

python hosts.py PORT INDEX COUNT FILE
"""

import dataclasses
import itertools
import sys

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding, tasks
from gptv_jax.data import pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.errors import InputError
from gptv_jax.tokens import GreyCodec


def main(port: str, index: str, count: str, file: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    talk(int(index), int(count))
    config = config_lib.Data(train_transforms=("shift(pixels=1, keep=0.3)", "flip()"))
    share = (int(index), int(count))
    data = pipeline.Pipeline(config, GreyCodec(levels=17, size=8), seed=3, share=share)
    batches = {
        "train": itertools.islice(data.train(60, position=18), 4),  # and over an epoch's end
        "test": data.evaluation("test", 60),
    }
    arrays = {
        f"{split} {number} {name}": array
        for split, found in batches.items()
        for number, batch in enumerate(found)
        for name, array in batch.items()
    }
    np.savez(file, **arrays, **(segmented(share) if count == "2" else {}))


def segmented(share: tuple[int, int] = (0, 1)) -> dict[str, np.ndarray]:
    """What a process knows in the end of 13 test scenes that random weights read and write."""
    segment = config_lib.Segment(labels="cells", cell=8, samples=2)
    config = config_lib.Config(
        data=config_lib.Data(name="digit_scenes", image_size=(32, 48), test_split="test[:13]"),
        tokens=config_lib.Tokens(kind="none"),
        model=config_lib.Model(layers=1, width=16, heads=2),
        task=config_lib.Task("segment", image_input="pixels", stem=(8, 8, 8), segment=segment),
    )
    known = pipeline.images(config.data, "train", DamageLog(config.data, None), 20, annotated=True)
    source = sources.open_source(config.data, "test")
    task = tasks.make(config, map_names=source.map_names)
    task = dataclasses.replace(task, measured=task.measure(lambda count: known))
    images = pipeline.Pipeline(config.data, None, seed=0, share=share)
    with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[: share[1]])):
        params = jax.jit(task.network().init)(jax.random.key(0))
        batches = images.evaluation("test", 4, example=task.example, pixels=True)
        total = task.test_metric(task.network(), source.annotations).sums(params, batches)
    counts = task.maps.counts(total, source.annotations, ("read", "written", "voted"))
    assert all(matrix.sum() == 13 * 32 * 48 for matrix in counts.values())
    nats = {name: total[name][total["mask"] > 0] for name in ("nats_per_pixel", "nats_per_map")}
    return {f"segmented {name}": array for name, array in (counts | nats).items()}


def talk(index: int, count: int) -> None:
    def only_first():
        assert index == 0
        return {"value": (1.5, None, "é" * 5000), "bytes": b"\1" + b"\0" * 3000}

    def refuse():
        raise InputError(f"{index} says no.")

    found = hosts.from_first(only_first)
    assert found == {"value": (1.5, None, "é" * 5000), "bytes": b"\1" + b"\0" * 3000}
    assert hosts.from_all("x" * index * 2000) == ["x" * i * 2000 for i in range(count)]
    try:
        hosts.from_first(refuse)
    except InputError as error:
        assert str(error) == "0 says no."
    else:
        raise AssertionError("it was not refused")


if __name__ == "__main__":
    main(*sys.argv[1:])
