"""How good the label maps of a video are: regions and boundaries as in DAVIS, constancy as in VSPW.

N frames of H x W pixels. Region similarity J and boundary accuracy F are those of Perazzi et al.
2016 ("A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation") in the form of
DAVIS 2017's semi-supervised task, where the first frame's map is given.
"""

import numpy as np
from etils import epy
from jaxtyping import Bool, Float, Integer

from gptv_jax.tasks import confusion
from gptv_jax.tokens.label_maps import has_class

with epy.lazy_imports():  # slow to import, and only scores of label maps need it
    from scipy import ndimage

TOLERANCE = 0.008  # share of the diagonal by which two boundaries may differ
WINDOWS = (8, 16)  # frames, over which VSPW measures consistency


def region_similarity(
    truth: Bool[np.ndarray, "N H W"], predicted: Bool[np.ndarray, "N H W"]
) -> Float[np.ndarray, " N"]:
    """J, the intersection over union of each frame's masks; 1 where both are empty."""
    both, either = ((f(truth, predicted)).sum(axis=(1, 2)) for f in (np.minimum, np.maximum))
    return np.where(either, both / np.maximum(either, 1), 1.0)


def boundary(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels that differ from their neighbour to the right, below, or below to the right."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    shifted = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.logical_or.reduce([mask != each for each in shifted])


def boundary_f(truth: Bool[np.ndarray, "H W"], predicted: Bool[np.ndarray, "H W"]) -> float:
    """F, the harmonic mean of precision and recall of the boundary's pixels.

    A pixel is found where the other boundary has a pixel within TOLERANCE of the diagonal, rounded
    up to whole pixels. 1 where both masks have no boundary, 0 where one has none.
    """
    lines, reach = [*map(boundary, (truth, predicted))], np.ceil(TOLERANCE * np.hypot(*truth.shape))
    if not all(line.any() for line in lines):
        return float(not any(line.any() for line in lines))
    near = [ndimage.distance_transform_edt(~line) <= reach for line in lines]
    recall, precision = near[1][lines[0]].mean(), near[0][lines[1]].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def davis(
    truth: Integer[np.ndarray, "N H W"], predicted: Integer[np.ndarray, "N H W"], classes: int
) -> dict[str, float]:
    """Means of J and of F over the classes of the first frame, and over all frames but its ends.

    The first frame's map is given, and the last frame is left out as in DAVIS. Pixels without a
    class count as background. {}: there are fewer than three frames, or the first has no class.
    """
    known, first = has_class(truth, classes), truth[0]
    objects = np.unique(first[known[0]])
    if len(truth) < 3 or not len(objects):
        return {}
    regions, lines = [], []
    for each in objects:
        masks = [(plane[1:-1] == each) & known[1:-1] for plane in (truth, predicted)]
        regions.append(region_similarity(*masks).mean())
        lines.append(np.mean([boundary_f(*pair) for pair in zip(*masks, strict=True)]))
    return {"region_similarity": float(np.mean(regions)), "boundary_f": float(np.mean(lines))}


def consistency(
    truth: Integer[np.ndarray, "N H W"],
    predicted: Integer[np.ndarray, "N H W"],
    classes: int,
    frames: int,
) -> float | None:
    """Video consistency VC_n of n `frames` (Miao et al. 2021, "VSPW", section 5).

    Of the pixels that have one true class in n successive frames, the share whose prediction is
    this class in all of the frames; the mean over all n successive frames. None: there are fewer
    frames, or no pixel keeps its class.
    """
    known, shares = has_class(truth, classes), []
    right = (predicted == truth) & known
    for start in range(len(truth) - frames + 1):
        window = slice(start, start + frames)
        stays = known[start] & (truth[window] == truth[start]).all(axis=0)
        if stays.any():
            shares.append(right[window].all(axis=0)[stays].mean())
    return float(np.mean(shares)) if shares else None


def scores(
    pairs: list[tuple[Integer[np.ndarray, "_ _ _"], Integer[np.ndarray, "_ _ _"]]], classes: int
) -> dict[str, float | list[float | None] | None]:
    """The numbers of several videos' true and predicted maps, without the first frame of each.

    The first map is given to some ways of segmenting a video, so no way's first map counts. "miou"
    counts all pixels of all videos, "miou_by_frame" the pixels of frame 1, 2, ... of all videos;
    "consistency_n" is the mean over videos.
    """
    longest, matrices = max(len(truth) for truth, _ in pairs), []
    for frame in range(1, longest):
        shown = [(truth[frame], found[frame]) for truth, found in pairs if frame < len(truth)]
        matrices.append(sum(confusion.count(*pair, classes) for pair in shown))
    found = {
        "miou": confusion.scores(sum(matrices))["miou"] if matrices else None,
        "miou_by_frame": [confusion.scores(matrix)["miou"] for matrix in matrices],
    }
    for n in WINDOWS:
        each = [consistency(truth[1:], maps[1:], classes, n) for truth, maps in pairs]
        each = [value for value in each if value is not None]
        if each:
            found[f"consistency_{n}"] = float(np.mean(each))
    return found
