"""Tries transforms and codec on the first training images, so that misfits are found early."""

import collections
import dataclasses
import logging

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import pipeline, transforms
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Depth
from gptv_jax.errors import InputError, cut, shorten
from gptv_jax.tokens import Codec, GreyCodec

LOG = logging.getLogger(__name__)
TRIED = 32  # images; as many files from all over the split where the first have more than 8 bits
# An image of a standard deviation below BLANK looks blank, one of no value above DARK dark; of 255.
BLANK, DARK = 4, 64
WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
OVERSHOOT = 1.2  # of floating-point values over white, as a resize makes it


def try_out(
    config: config_lib.Data,
    codec: Codec | None,
    shape: tuple[int, ...],
    entries: tuple[str, ...],
    annotated: bool = False,
) -> None:
    """Makes tokens of the first training images, so that misfits are found before any work.

    Without a codec, or if the codec encodes on devices, only `shape` is checked, [H, W, C], or
    [H, W] of grey and RGB images; of clips, these after [F]. Files of more than 8 bits are looked
    at before. After the transforms of evaluation, images that all look blank or dark are warned of.
    `annotated`: boxes and label maps are transformed as well.
    """
    example, rng = pipeline.open_examples(config, "train", entries), np.random.default_rng(0)
    example = dataclasses.replace(example, codec=codec, annotated=annotated)
    evaluated, warned = entries == config.eval_transforms, False
    # A list that decodes files exactly as the list for evaluation does is not looked at again.
    if getattr(example.source, "decode", None) and (
        evaluated or example.source.decode not in map(transforms.parse, config.eval_transforms[:1])
    ):
        warned = _check_depths(config, example.source)
    shown = []
    for index in range(min(TRIED, len(example.source))):
        record = example.record(index, rng)
        image = record.get("image")  # absent from a token cache
        if codec is None or (codec.on_devices and image is not None):
            grey_or_rgb = (*shape, 1 if image.shape[-1] == 1 else 3)
            known = len(shape) == len(config.size) + (config.frames > 0) + 1  # the channels too
            pipeline.check_shape(image, shape if known else grey_or_rgb)
        else:
            pipeline.to_tokens(codec, record)
        if image is not None:
            shown.append(codec.picture(image[None])[0] if codec else image)
    if not shown or not evaluated or warned:
        return
    every = tuple(range(shown[0].ndim - 1))  # axes but the channels; of clips the frames, too
    deviation = max(picture.std(axis=every).max() for picture in shown)
    low, high = min(picture.min() for picture in shown), max(picture.max() for picture in shown)
    if deviation >= BLANK and high > DARK:
        return
    look = "have nearly one value each" if deviation < BLANK else "are all dark"
    cure = ""
    if high <= DARK and not (isinstance(codec, GreyCodec) and codec.levels < 256):
        cure = ' The transform "normalize()" makes dark images bright.'
    LOG.warning(
        "images of %s (%d looked at) %s: values %d to %d of 255, deviating by %.1f at most. Look "
        "at the files and at the transforms.%s",
        *(config.path or config.name, len(shown), look, low, high, deviation, cure),
    )


def _check_depths(config: config_lib.Data, source: DecodedSource) -> bool:
    """Looks at the values in image files before work begins; returns whether it has warned.

    Raises InputError where files that do not say what is white would get several whites, each by
    its own values, or where too many have none; the message names the cure.
    """
    if source.decode.maximum:
        return False
    found = {n: source.depth(n) for n in range(min(TRIED, len(source)))}
    if any(found.values()):
        spread = np.linspace(0, len(source) - 1, TRIED).astype(int).tolist()
        found |= {n: source.depth(n) for n in spread if n not in found}
    warned = False
    for kind in dict.fromkeys(depth.kind for depth in found.values() if depth):
        # A black image is black, whatever is white.
        same = {n: d for n, d in found.items() if d and d.kind == kind and (d.low or d.high)}
        if sum(d.white is None for d in same.values()) <= max(1, config.max_damaged * len(same)):
            same = {n: d for n, d in same.items() if d.white}  # the others are damaged, by name
        whites = collections.Counter(d.white for d in same.values()).most_common()
        low, high = (pick([pick(d[1:3]) for d in same.values()], default=0) for pick in (min, max))
        if len(whites) == 1 and whites[0][0] == WHITES[-1] and high <= WHITES[-2]:
            cure = _cure(source, next(white for white in WHITES if high <= white), found)
            text = "the %s images of %s come out dark: their values are %g to %g of 65535. %s."
            LOG.warning(text, kind, config.path or config.name, low, high, cure)
            warned = True
        elif any(not d.sure for d in same.values()) and (len(whites) > 1 or not whites[0][0]):
            # A TIFF's own number of 16 bits may be the maximum of each image.
            white = 0 if kind == "16-bit" else max(white or 0 for white, _ in whites)
            if high > white:
                room = OVERSHOOT if kind == "floating-point" else 1
                most = 2 ** int(high).bit_length() - 1  # of whole numbers beyond 16 bits
                white = next((each for each in WHITES if high <= each * room), most)
                white = 1 if room > 1 and high < 16 else white
            seldom = source.name(next(n for n, d in same.items() if d.white == whites[-1][0]))
            shown = [f"{n} " + (f"as 0..{w}" if w else "in no usual range") for w, n in whites]
            cure = _cure(source, white, found)
            if low < (1 - OVERSHOOT) * white:
                cure = "Save them as numbers from 0 to 1"
            problem = f"the {kind} images have no common range: {shorten(shown, room=60)}"
            raise InputError(f"{problem}, such as {cut(seldom, 90, 45)}. {cure}.")
    return warned


def _cure(source: DecodedSource, white: int, depths: dict[int, Depth | None]) -> str:
    """A sentence that says how images become right whose white is this value."""
    deep_colours = any(depth and depth.kind == "16-bit colour" for depth in depths.values())
    # Then `maximum` would be refused, or would apply to images of 8 bits too.
    if deep_colours or (white == 1 and None in depths.values()):
        reason = "; of 16-bit colours Pillow reads only the upper 8" * deep_colours
        return f"Save all images with 8 bits{reason}"
    now = vars(source.decode) | {"maximum": white}
    changed = [f.name for f in dataclasses.fields(source.decode) if now[f.name] != f.default]
    entry = f"decode({', '.join(f'{name}={now[name]!r}' for name in changed)})"
    return f'If {white} is white in all of them, put "{entry}" in every list of transforms'
