"""What happens to an image before it becomes tokens, each step a named entry of the config.

An entry is written as a call with literal arguments, `"shift(pixels=1, keep=0.3)"`. A transform
takes an image, uint8 [H, W, C], and a generator of its own, so the result depends on the seed and
the element's position alone, not on workers or hosts. Those that move pixels about without mixing
them (`of_pixels` False) act on grids of tokens as well, uint16 [rows, columns, 1].
"""

import ast
import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageEnhance

from gptv_jax import config as config_lib
from gptv_jax.data.images import Decode

METHODS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@runtime_checkable
class Transform(Protocol):
    """A step of the list."""

    random: bool  # whether the generator is used; elsewhere than in training it must not be
    of_pixels: bool  # whether it needs pixels, where grids of tokens will not do

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """A new image."""


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves the image by up to `pixels` in each direction and fills with 0.

    With probability `keep` it stays where it is, else every shift (that one too) is equally
    likely. The variant names the shift, 0 being none: distribution augmentation (Jun et al. 2020)
    gives each a start vector of its own.
    """

    random: ClassVar = True
    of_pixels: ClassVar = False
    pixels: int = 1
    keep: float = 0.0

    def __post_init__(self):
        _require(self.pixels >= 1 and 0 <= self.keep <= 1, "pixels >= 1, keep a probability")

    @property
    def variants(self) -> int:
        """Number of shifts."""
        return (2 * self.pixels + 1) ** 2

    def draw(self, rng: np.random.Generator) -> int:
        """The variant to make of the next image."""
        return 0 if rng.random() < self.keep else int(rng.integers(self.variants))

    def variant(self, image: np.ndarray, variant: int) -> np.ndarray:
        """That variant of the image."""
        side = 2 * self.pixels + 1
        # Variants count from the middle of the square of shifts, so that 0 is no shift.
        down, right = divmod((variant + self.variants // 2) % self.variants, side)
        height, width = image.shape[:2]
        padded = _padded(image, self.pixels, mode="constant")
        top, left = 2 * self.pixels - down, 2 * self.pixels - right
        return padded[top : top + height, left : left + width]

    def __call__(self, image, rng):
        """The image moved; `draw` and `variant` also tell where to."""
        return self.variant(image, self.draw(rng))


@dataclasses.dataclass(frozen=True)
class Resize:
    """To `size` x `size` pixels, whatever the shape was; antialiased."""

    random: ClassVar = False
    of_pixels: ClassVar = True
    size: int
    method: str = "bilinear"

    def __post_init__(self):
        _require(self.size >= 1, "size >= 1")
        _require(self.method in METHODS, f"method one of {', '.join(METHODS)}")

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
        return _resized(image, self.size, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class ResizeShort:
    """The shorter side to `size` pixels, the other in proportion; antialiased."""

    random: ClassVar = False
    of_pixels: ClassVar = True
    size: int
    method: str = "bilinear"

    __post_init__ = Resize.__post_init__

    def __call__(self, image, rng):
        """Uint8 [H, W, C], min(H, W) being `size`."""
        return _resized_short(image, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class RandomResizeShort:
    """The shorter side to a size from `low` to `high`, both included (Chen et al. 2020)."""

    random: ClassVar = True
    of_pixels: ClassVar = True
    low: int = 256
    high: int = 384
    method: str = "bilinear"

    def __post_init__(self):
        _require(1 <= self.low <= self.high, "1 <= low <= high")
        _require(self.method in METHODS, f"method one of {', '.join(METHODS)}")

    def __call__(self, image, rng):
        """Uint8 [H, W, C]."""
        size = int(rng.integers(self.low, self.high, endpoint=True))
        return _resized_short(image, size, self.method)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """The middle `size` x `size` pixels."""

    random: ClassVar = False
    of_pixels: ClassVar = False
    size: int

    def __post_init__(self):
        _require(self.size >= 1, "size >= 1")

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
        height, width = image.shape[:2]
        return _cropped(image, (height - self.size) // 2, (width - self.size) // 2, self.size)


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Any `size` x `size` pixels, after `padding` pixels were added on each side by reflection."""

    random: ClassVar = True
    of_pixels: ClassVar = False
    size: int
    padding: int = 0

    def __post_init__(self):
        _require(self.size >= 1 and self.padding >= 0, "size >= 1, padding >= 0")

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
        image = _padded(image, self.padding, mode="reflect")
        top, left = (int(rng.integers(max(n - self.size, 0) + 1)) for n in image.shape[:2])
        return _cropped(image, top, left, self.size)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, `area` of it with sides in `ratio`, resized to `size` x `size`.

    Szegedy et al. 2015; where ten draws do not fit into the image, its middle square is taken.
    """

    random: ClassVar = True
    of_pixels: ClassVar = True
    size: int
    area: tuple[float, float] = (0.08, 1.0)  # share of the image, from .. to
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, from .. to
    method: str = "bilinear"

    def __post_init__(self):
        Resize.__post_init__(self)
        _require(len(self.area) == len(self.ratio) == 2, "area and ratio two numbers each")
        _require(0 < self.area[0] <= self.area[1] <= 1, "area two shares, the smaller first")
        _require(0 < self.ratio[0] <= self.ratio[1], "ratio two ratios, the smaller first")

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
        height, width = image.shape[:2]
        for _ in range(10):
            area = rng.uniform(*self.area) * height * width
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                break
        else:
            h = w = min(height, width)
            top, left = (height - h) // 2, (width - w) // 2
        return _resized(image[top : top + h, left : left + w], self.size, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirrors left and right, with a probability."""

    random: ClassVar = True
    of_pixels: ClassVar = False
    probability: float = 0.5

    def __post_init__(self):
        _require(0 <= self.probability <= 1, "probability from 0 to 1")

    def __call__(self, image, rng):
        """The image or its mirror image."""
        return image[:, ::-1] if rng.random() < self.probability else image


@dataclasses.dataclass(frozen=True)
class _Jitter:
    random: ClassVar = True
    of_pixels: ClassVar = True
    enhance: ClassVar = None
    amount: float = 0.4

    def __post_init__(self):
        _require(0 <= self.amount <= 1, "amount from 0 to 1")

    def __call__(self, image, rng):
        """The image between `1 - amount` and `1 + amount` times as strong; 1 is unchanged."""
        factor = rng.uniform(1 - self.amount, 1 + self.amount)
        return _array(self.enhance(_picture(image)).enhance(factor), image)


class Brightness(_Jitter):
    """Makes the image darker or brighter by up to `amount`; 0 would be black."""

    enhance = ImageEnhance.Brightness


class Contrast(_Jitter):
    """Weakens or strengthens contrast by up to `amount`; 0 would be the mean grey."""

    enhance = ImageEnhance.Contrast


class ColorBalance(_Jitter):
    """Weakens or strengthens colour by up to `amount`; 0 would be a grey image."""

    enhance = ImageEnhance.Color


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Stretches each image so that the share `clip` of its values lies at 0 and at 255 each.

    The scale that a network would want, [-1, 1], is the palette's affair: tokens have no scale.
    """

    random: ClassVar = False
    of_pixels: ClassVar = True
    clip: float = 0.0

    def __post_init__(self):
        _require(0 <= self.clip < 0.5, "clip at least 0 and below 0.5")

    def __call__(self, image, rng):
        """Uint8 [H, W, C]; an image of one value is left as it is."""
        low, high = np.quantile(image, [self.clip, 1 - self.clip])
        if low == high:
            return image
        return np.rint((np.clip(image, low, high) - low) * (255 / (high - low))).astype(np.uint8)


TRANSFORMS = {
    "decode": Decode,
    "resize": Resize,
    "resize_short": ResizeShort,
    "random_resize_short": RandomResizeShort,
    "center_crop": CenterCrop,
    "random_crop": RandomCrop,
    "random_resized_crop": RandomResizedCrop,
    "flip": Flip,
    "shift": Shift,
    "brightness": Brightness,
    "contrast": Contrast,
    "color_balance": ColorBalance,
    "normalize": Normalize,
}


def parse(entry: str) -> Transform | Decode:
    """The transform that an entry of a list describes.

    Raises:
      InputError: not a call of a known transform with literal arguments that it takes.
    """
    try:
        call = ast.parse(entry, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        transform = TRANSFORMS[call.func.id]
        arguments = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        fields = {field.name: field for field in dataclasses.fields(transform)}
        for name, value in [*zip(fields, arguments, strict=False), *named.items()]:
            if name in fields:  # what is no field, the class itself refuses
                _check_type(value, fields[name])
        return transform(*arguments, **named)
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        accepted = "; ".join(f"{name}({_arguments(t)})" for name, t in TRANSFORMS.items())
        raise config_lib.InputError(
            f"a list of transforms has {entry!r} ({error}); an entry is one of: {accepted}."
        ) from error


def _check_type(value, field: dataclasses.Field) -> None:
    try:
        config_lib.typed(value, field.type)
    except TypeError:
        words = config_lib.type_words(field)
        raise TypeError(f"{field.name} is {value!r}; it takes {words}") from None


def check(training: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    """Whether the lists can be read, and evaluation sees the same images every time.

    Raises:
      InputError: they cannot, or it does not.
    """
    variants(training)
    random = [entry for entry in evaluation if parse(entry).random]
    if random:
        raise config_lib.InputError(
            f"config.data.eval_transforms has {', '.join(random)}, which is random; it takes what "
            "gives the same image every time."
        )


def variants(entries: tuple[str, ...]) -> int:
    """Start vectors that a list of entries can tell apart.

    Raises:
      InputError: more than one entry has variants.
    """
    counts = [getattr(parse(entry), "variants", 1) for entry in entries]
    if sum(count > 1 for count in counts) > 1:
        raise config_lib.InputError(
            f"the transforms are {', '.join(entries)}; only one of them may have variants."
        )
    return max(counts, default=1)


def _arguments(transform: type) -> str:
    shown = []
    for field in dataclasses.fields(transform):
        needed = field.default is dataclasses.MISSING
        shown.append(field.name if needed else f"{field.name}={field.default!r}")
    return ", ".join(shown)


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(f"it takes {words}")


def _padded(image: np.ndarray, margin: int, mode: str) -> np.ndarray:
    return np.pad(image, [(margin, margin), (margin, margin), (0, 0)], mode=mode)


def _cropped(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    if min(image.shape[:2]) < size:
        shape = " x ".join(map(str, image.shape[:2]))
        raise config_lib.InputError(
            f"an image has {shape} pixels where a crop takes {size} x {size}; "
            f'put "resize_short({size})" before the crop.'
        )
    return image[top : top + size, left : left + size]


def _resized_short(image: np.ndarray, size: int, method: str) -> np.ndarray:
    height, width = image.shape[:2]
    scale = size / min(height, width)
    return _resized(
        image, max(round(height * scale), size), max(round(width * scale), size), method
    )


def _resized(image: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    resized = _picture(image).resize((width, height), METHODS[method], reducing_gap=None)
    return _array(resized, image)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image))


def _array(picture: Image.Image, like: np.ndarray) -> np.ndarray:
    return np.asarray(picture).reshape(picture.height, picture.width, like.shape[-1])
