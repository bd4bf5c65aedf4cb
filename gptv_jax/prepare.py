"""Writes a data set once as tokens, with its palette, for training without images or decoder.

python -m gptv_jax.prepare --config=configs/cifar10.py --out=caches/cifar10
"""

import dataclasses
import itertools
import json
import logging
import pathlib

from absl import flags

from gptv_jax import command, config
from gptv_jax.config import fields
from gptv_jax.data import cache, pipeline, sources, transforms
from gptv_jax.data.damage import Ledger
from gptv_jax.errors import InputError
from gptv_jax.stages import codec
from gptv_jax.tokens.statistics import TokenStatistics
from gptv_jax.train.metrics import Progress

OUT = flags.DEFINE_string("out", None, "Folder for the token cache; a new one.")
LOG = logging.getLogger("gptv_jax.prepare")


def main(settings: config.Config) -> None:
    """Tokenises every split of the data set and prints what the tokens are like."""
    folder = pathlib.Path(OUT.value).absolute()
    transforms.check((), settings.data.eval_transforms)
    data_set = sources.open_data_set(settings.data)
    if data_set.form == "tokens":
        raise InputError(f"config.data.path={settings.data.path} holds tokens already.")
    cache.claim(folder)
    ledger = Ledger(settings.data, folder)
    chosen = codec.find_codec(settings) or codec.build_codec(settings, ledger)
    # Split expressions choose among what is cached, when it is read.
    whole = dataclasses.replace(settings.data, **{f"{s}_split": s for s in sources.SPLITS})
    statistics = {split: TokenStatistics(chosen) for split in data_set.lengths}

    def examples(split: str):
        progress = Progress(f"prepare {split}", data_set.lengths[split], unit="image")
        for batch in pipeline.tokenized(chosen, pipeline.images(whole, split, ledger)):
            statistics[split].add(batch["image"], batch["tokens"])
            labels = batch.get("label", itertools.repeat(None))
            for tokens, label in zip(batch["tokens"], labels, strict=False):
                yield tokens, label
                progress.advance()
        progress.close()

    header = {
        "source": {k: getattr(settings.data, k) for k in ("name", "dir", "path")},
        "lexicon": chosen.lexicon and chosen.lexicon.provenance,
        "tokens": fields.flatten(settings.tokens) | {"palette": None, "tokenizer": None},
        "image_size": settings.data.image_size,
        "transforms": settings.data.eval_transforms,
        "classes": data_set.classes if settings.data.labels else 0,
    }
    cache.write(folder, chosen, {split: examples(split) for split in data_set.lengths}, header)
    size = sum(path.stat().st_size for path in folder.iterdir())
    report = {split: found.numbers() for split, found in statistics.items()}
    summary = {"folder": str(folder), "bytes": size, "damaged": ledger.count, **report}
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    command.start(main)
