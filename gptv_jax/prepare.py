"""Stores a data set as tokens, with the palette or tokenizer, to train without decoding images.

python -m gptv_jax.prepare --config=configs/cifar10.py --out=caches/cifar10
python -m gptv_jax.prepare --config=runs/mine --out=caches/mine  # the data and tokens of a run

With --teacher, each position of an image gets ids drawn from a trained network's distribution, by
which config.distill.cached=True trains a smaller network without the teacher in memory:

python -m gptv_jax.prepare --config=configs/cifar10.py --out=caches/taught --teacher=runs/large

With --videos, turns video files into folders of frames, which config.data.name=folder reads:

python -m gptv_jax.prepare --videos=videos --out=frames --rate=8 --short_side=128
"""

import contextlib
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags
from etils import epy

from gptv_jax import command, config, files, hardware
from gptv_jax.config import fields
from gptv_jax.data import video_files
from gptv_jax.data.teacher_draws import MOST_SAMPLES
from gptv_jax.data.teacher_draws import SAMPLES as DEFAULT_SAMPLES
from gptv_jax.errors import InputError, list_differences, shorten

with epy.lazy_imports():  # see `command`
    import jax

    from gptv_jax import sharding
    from gptv_jax.data import cache, damage, inventory, pipeline, sources, transforms
    from gptv_jax.data import folder as folder_lib
    from gptv_jax.stages import setup, teacher_cache
    from gptv_jax.tokens import codec
    from gptv_jax.train import metrics

LOG = logging.getLogger("gptv_jax.prepare")
OUT = flags.DEFINE_string("out", None, "New folder for the token cache, or for frames.")
VIDEOS = flags.DEFINE_string(
    "videos", None, "Folder of video files to turn into frames, in place of --config."
)
TEACHER = flags.DEFINE_list(
    "teacher",
    [],
    "Run folder or weights of a trained network, whose distribution ids are drawn from at every "
    "position; with commas between several, from the mean of their distributions.",
)
SAMPLES = flags.DEFINE_integer(
    "teacher_samples",
    DEFAULT_SAMPLES,
    "With --teacher: ids drawn at every position.",
    lower_bound=1,
    upper_bound=MOST_SAMPLES,
)
TEMPERATURE = flags.DEFINE_float(
    "teacher_temperature",
    1.0,
    "With --teacher: divides the teacher's logits; that of config.distill.temperature in training.",
    lower_bound=1e-6,
)
_VIDEO_FLAGS = {
    "rate": "With --videos: frames a second; 0: the mean rate of each file.",
    "short_side": "With --videos: pixels of a frame's shorter side; 0: as in the file.",
    "form": "With --videos: files of frames, jpg or png.",
    "max_seconds": "With --videos: a longer video is left out.",
    "max_frames": "With --videos: a video of more frames, at --rate, is left out.",
    "max_pixels": "With --videos: a video of larger frames, height times width, is left out.",
    "max_streams": "With --videos: a file of more streams is left out.",
    "min_share": "With --videos: a file that ends before this share of its duration is left out.",
}
for _name, _help in _VIDEO_FLAGS.items():
    _default = getattr(video_files.Settings, _name)
    if _name == "form":
        flags.DEFINE_enum(_name, _default, ["jpg", "png"], _help)
    elif isinstance(_default, int):
        flags.DEFINE_integer(_name, _default, _help, lower_bound=0)
    else:
        flags.DEFINE_float(_name, _default, _help, lower_bound=0)


def main(settings: config.Config) -> None:
    """Tokenises every split of the data set and prints statistics of the tokens."""
    hardware.devices()  # InputError where there are none
    for name in ("teacher_samples", "teacher_temperature"):
        if flags.FLAGS[name].present and not TEACHER.value:
            raise InputError(f"--{name} is for --teacher, which names no teacher; name one.")
    # Without a teacher nothing is computed on a mesh, and this machine need not have one.
    mesh = jax.set_mesh(sharding.make_mesh(settings.mesh)) if TEACHER.value else None
    with mesh or contextlib.nullcontext():
        _prepare(settings)


def _prepare(settings: config.Config) -> None:
    folder = files.user_path(OUT.value)
    settings = setup.take_tokenizer_settings(settings)
    folder_lib.refuse_inside(settings.data, {"--out": OUT.value})
    transforms.check((), settings.data.eval_transforms)
    data_set = sources.open_data_set(settings.data)
    if isinstance(data_set, cache.TokenCache):
        given = f"config.data.path={settings.data.path}"
        raise InputError(f"{given} is a token cache already; name a data set of images.")
    opened = {s: sources.Selected(data_set, s, settings.data.labels) for s in data_set.lengths}
    inventory.log(settings.data, inventory.describe(data_set, opened), opened)
    # The teachers of --teacher replace the teachers that the configuration names.
    chosen = setup.find_codec(settings, taught=() if TEACHER.value else ("pretrain",))
    teachers = []
    if TEACHER.value:
        classes = data_set.classes if settings.data.labels else 0
        teachers, chosen = teacher_cache.load(tuple(TEACHER.value), settings, chosen, classes)
    split = "train" if "train" in data_set.lengths else next(iter(data_set.lengths))
    first = dataclasses.replace(settings.data, train_split=split)
    setup.try_out(dataclasses.replace(settings, data=first), None, chosen)
    cache.claim(folder, holder=settings)
    damage_log = damage.DamageLog(settings.data, folder)
    chosen = chosen or setup.build_codec(settings, damage_log)
    taught = drawer = None
    if teachers:
        given = SAMPLES.value, TEMPERATURE.value, settings.seed
        taught = teacher_cache.describe(tuple(TEACHER.value), teachers, *given)
        drawer = teacher_cache.Drawer(teachers, taught, folder)
    # The cache holds whole splits; split expressions select from them when the cache is read.
    whole = dataclasses.replace(settings.data, **{f"{s}_split": s for s in sources.SPLITS})
    statistics = {split: codec.TokenStatistics(chosen) for split in data_set.lengths}

    def examples(split: str) -> Iterator[dict]:
        progress = metrics.Progress(f"prepare {split}", data_set.lengths[split], unit="image")
        images = pipeline.images(whole, split, damage_log, annotated=True)
        for chunk in pipeline.tokenized(chosen, images):
            statistics[split].add(
                *(np.stack([r[key] for r in chunk]) for key in ("image", "tokens"))
            )
            for record in chunk:
                yield {name: value for name, value in record.items() if name != "image"}
                progress.advance()
        progress.close()

    splits = {split: examples(split) for split in data_set.lengths}
    if drawer:
        splits = {split: drawer.add(split, each) for split, each in splits.items()}
    header = {
        "source": {k: getattr(settings.data, k) for k in ("name", "dir", "path", "label")},
        "provenance": chosen.definition and chosen.definition.provenance,
        "tokens": fields.flatten(settings.tokens) | {"palette": None, "tokenizer": None},
        "image_size": settings.data.image_size,
        "frames": settings.data.frames,
        "frame_stride": settings.data.frame_stride,
        "transforms": settings.data.eval_transforms,
        "classes": data_set.classes if settings.data.labels else 0,
        "class_names": data_set.class_names if settings.data.labels else (),
    }
    # Absent where there are no boxes and no label maps.
    for name in ("object_names", "object_ids", "map_names"):
        if known := getattr(data_set, name):
            header[name] = known
    if taught:
        header["teacher"] = taught
    cache.write(folder, chosen, splits, header)
    if drawer and drawer.found:
        LOG.info(
            "%d of %d images have the draws of an earlier command.", drawer.found, drawer.drawn
        )
    size = sum(path.stat().st_size for path in folder.iterdir())
    summary = {"folder": str(folder), "bytes": size, "damaged": damage_log.count}
    summary |= {"dropped": len(damage_log.dropped)} if damage_log.dropped else {}
    summary |= {split: found.numbers() for split, found in statistics.items()}
    print(json.dumps(summary, indent=2))


def prepare_videos() -> None:
    """Writes a folder of frames for every video file, and the list of files that are left out."""
    videos, out = files.user_path(VIDEOS.value), files.user_path(OUT.value)
    settings = video_files.Settings(**{n: flags.FLAGS[n].value for n in _VIDEO_FLAGS})
    if not videos.is_dir():
        raise InputError(f"--videos={videos} is not a folder.")
    found = video_files.find(videos)
    files.claim(out, "--out")
    unlock = files.lock(out, "--out", settings)
    made, settings_file = dataclasses.asdict(settings), out / video_files.SETTINGS_FILE
    if differences := list_differences(made, files.read_json(settings_file, made)):
        raise InputError(
            f"--out={out} has frames that were made otherwise: {shorten(differences, '; ')}. Name "
            "another folder, or set these flags as before."
        )
    files.write_json(settings_file, made)
    progress = metrics.Progress("prepare", len(found), unit="video")
    counts = dict(videos=0, frames=0)
    with (out / video_files.SKIPPED_FILE).open("w") as lines:
        for result in video_files.convert(videos, found, out, settings):
            progress.advance()
            counts["videos"] += result.reason is None
            counts["frames"] += result.frames
            if result.reason is not None:
                LOG.warning("%s is left out: %s.", videos / result.file, result.reason)
                line = {"name": str(videos / result.file), "reason": result.reason}
                lines.write(json.dumps(line) + "\n")
                lines.flush()
    progress.close()
    unlock()
    counts["skipped"] = len(found) - counts["videos"]
    print(json.dumps({"folder": str(out), **counts}, indent=2))


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    if any(re.match("--?videos(=|$)", argument) for argument in sys.argv[1:]):
        command.run(prepare_videos, again="the same command continues")
    else:
        command.start(main, [setup, teacher_cache])
