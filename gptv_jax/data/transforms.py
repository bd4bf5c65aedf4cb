"""The transforms that a configuration can name, and the reading of its lists of transforms.

An entry of a list is a call with literal arguments, `"shift(pixels=1, keep=0.3)"`. To add a
transform, write a subclass of `Transform` and name it in `TRANSFORMS`.
"""

import ast
import dataclasses
import inspect

from gptv_jax.config import fields
from gptv_jax.data import color, geometry
from gptv_jax.data.images import Decode
from gptv_jax.data.transform import Transform
from gptv_jax.errors import InputError, first_line

TRANSFORMS = {
    "decode": Decode,
    "resize": geometry.Resize,
    "resize_short": geometry.ResizeShort,
    "random_resize_short": geometry.RandomResizeShort,
    "center_crop": geometry.CenterCrop,
    "random_crop": geometry.RandomCrop,
    "random_resized_crop": geometry.RandomResizedCrop,
    "flip": geometry.Flip,
    "shift": geometry.Shift,
    "brightness": color.Brightness,
    "contrast": color.Contrast,
    "color_balance": color.ColorBalance,
    "normalize": color.Normalize,
}


def parse(entry: str) -> Transform:
    """The transform that an entry names.

    Raises:
      InputError: the entry is no call of a known transform with accepted literal arguments.
    """
    try:
        call = ast.parse(entry, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if call.func.id not in TRANSFORMS:
            raise ValueError("there is no such transform")
        transform = TRANSFORMS[call.func.id]
        arguments = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        given = inspect.signature(transform).bind(*arguments, **named).arguments
        known = fields.by_name(transform)
        return transform(**{n: fields.checked(v, known[n], n) for n, v in given.items()})
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        accepted = "; ".join(f"{name}({_arguments(t)})" for name, t in TRANSFORMS.items())
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"a list of transforms has {entry!r} ({reason}); an entry is one of: {accepted}."
        ) from error


def written_out(entry: str) -> str:
    """The entry with the values of all its arguments, defaults included."""
    values = vars(parse(entry)).items()
    name = entry.partition("(")[0].strip()
    return f"{name}({', '.join(f'{field}={value!r}' for field, value in values)})"


def check(training: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    """Checks that both lists can be read and that the list for evaluation is not random.

    Raises:
      InputError: an entry cannot be read, or is random in evaluation.
    """
    variants(training)
    random = [entry for entry in evaluation if parse(entry).random]
    if random:
        raise InputError(
            f"config.data.eval_transforms has {', '.join(random)}, which is random; evaluation "
            "takes transforms that give the same image every time."
        )


def variants(entries: tuple[str, ...]) -> int:
    """Number of variants of an image that the transforms make: 1, or those of one `shift`.

    Raises:
      InputError: more than one of the transforms has variants.
    """
    counts = [getattr(parse(entry), "variants", 1) for entry in entries]
    if sum(count > 1 for count in counts) > 1:
        raise InputError(
            f"the transforms are {', '.join(entries)}; only one of them may have variants."
        )
    return max(counts, default=1)


def _arguments(transform: type) -> str:
    return ", ".join(
        f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
        for f in dataclasses.fields(transform)
    )
