"""One of several real processes, for test_data.py: writes its share of some batches.

Before that all tell each other something, which is checked here.

python hosts.py PORT INDEX COUNT FILE
"""

import itertools
import sys

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import hosts
from gptv_jax.data import pipeline
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
    np.savez(file, **arrays)


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
