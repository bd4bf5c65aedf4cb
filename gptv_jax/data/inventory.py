"""What the data of a run hold: the splits, the classes, and what was left out."""

import logging
from collections.abc import Sequence

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.errors import counted, shorten

LOG = logging.getLogger(__name__)
MAPS = 128  # label maps whose pixels are counted


def describe(data_set: sources.DataSet, opened: dict[str, sources.Selected]) -> dict:
    """What the data set holds, for config.json; `opened` are the splits of the run.

    images    {split: number}: all splits of the data set, whether the run uses them or not
    by_class  {split of the run: [number of images of class 0, of class 1, ...]}; a split whose
              labels cannot be counted without reading its images is absent
    objects   {split of the run: `Selected.object_counts`}; a split whose boxes cannot be counted
              without reading its images is absent
    maps      `Selected.map_counts` of up to `MAPS` training examples, or None
    left_out  [text, ...]: files and folders that are not read
    notes     [text, ...]: what was made of unusual data, such as labels numbered anew
    """
    counts = {split: source.label_counts() for split, source in opened.items()}
    objects = {split: source.object_counts() for split, source in opened.items()}
    found = {"images": dict(data_set.lengths)}
    found["by_class"] = {s: each.tolist() for s, each in counts.items() if each is not None}
    found["objects"] = {split: each for split, each in objects.items() if each}
    found["maps"] = (opened.get("train") or next(iter(opened.values()))).map_counts(MAPS)
    for name, texts in {"left_out": data_set.left_out, "notes": data_set.notes}.items():
        # Names of files of an old system may not be UTF-8.
        found[name] = [text.encode(errors="backslashreplace").decode() for text in texts]
    return found


def log(config: config_lib.Data, found: dict, opened: dict[str, sources.Selected]) -> None:
    """Logs one line on the splits and classes of a run, and warns of what users may not expect."""
    images = [
        f"{split} {len(source)}" + f" ({source.expression})" * (source.expression != split)
        for split, source in opened.items()
    ]
    source = opened.get("train") or next(iter(opened.values()))
    names = source.class_names or tuple(map(str, range(source.classes)))
    counts = found["by_class"].get("train")
    classes, listed = f"{source.classes} classes", names
    if counts:
        classes += " with training images"
        listed = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    parts = [
        f"images: {', '.join(images)}",
        f"{classes}: {shorten(listed)}" if names else "no labels",
        *objects_in_words(source.object_names, found["objects"]),
        *maps_in_words(source.map_names, found["maps"]),
        *(f"left out: {each}" for each in found["left_out"]),
    ]
    LOG.info("data %s: %s", config.path or config.name, "; ".join(parts))
    warnings, used = list(found["notes"]), set().union(*(s.splits for s in opened.values()))
    if unused := [s for s in ("validation", "test") if s in found["images"] and s not in used]:
        flags = " ".join(f"--config.data.{split}_split={split}" for split in ("train", *unused))
        own = " and ".join(unused)
        warnings.append(
            f"the run does not use the data's own {own} images; they are taken by {flags}"
        )
    maps = found["maps"] or {"pixels": (), "maps": 0}
    seen = any(maps["pixels"])
    if maps["pixels"] and not seen:
        warnings.append("no pixel of the label maps has a class; see config.data.map_names")
    boxes = found["objects"].get("train", {}).get("by_class", ())
    for what, known, numbers in (
        ("classes without a training image", names, counts or ()),
        ("classes of objects without a training box", source.object_names, boxes),
        (
            f"classes without a pixel in {maps['maps']} label maps",
            source.map_names,
            maps["pixels"] * seen,
        ),
    ):
        if absent := [name for name, n in zip(known, numbers, strict=False) if not n]:
            warnings.append(f"{what}: {shorten(absent)}")
    for warning in warnings:
        LOG.warning("data: %s.", warning)


def objects_in_words(names: Sequence[str], counts: dict[str, dict]) -> list[str]:
    """A phrase on the classes of objects and one on the boxes by split; none without objects.

    `counts` are the "objects" of `describe`.
    """
    boxes = [
        f"{split} {each['boxes']} ({each['crowd']} of crowds, "
        f"{counted(each['empty'], 'image')} without)"
        for split, each in counts.items()
    ]
    classes = [f"{len(names)} classes of objects: {shorten(names)}"] if names else []
    return classes + ([f"boxes: {', '.join(boxes)}"] if boxes else [])


def maps_in_words(names: Sequence[str], counts: dict | None) -> list[str]:
    """A phrase on the classes of label maps with their shares; none without label maps.

    `counts` are the "maps" of `describe`.
    """
    if not counts:
        return []
    total = max(sum(counts["pixels"]) + counts["none"], 1)
    shares = [f"{n} {count / total:.1%}" for n, count in zip(names, counts["pixels"], strict=True)]
    empty = f", {counts['empty']} without any" if counts["empty"] else ""
    return [
        f"{len(names)} classes of label maps: {shorten(shares, room=200)}; pixels without a class: "
        f"{counts['none'] / total:.1%} ({counts['maps']} maps read{empty})"
    ]
