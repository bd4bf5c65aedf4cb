"""What is gained by rejecting images: accuracy by coverage, and the report's part of typicality."""

import numpy as np
from jaxtyping import Float, Int

from gptv_jax import files
from gptv_jax.runs import html, pictures

FILE = "typicality/coverage.json"
WAYS = {"typicality": pictures.BLUE, "confidence": pictures.ORANGE}
SHOWN = (0.95, 0.8)  # coverages whose accuracies are numbers of the summary


def curves(
    probabilities: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, " N"],
    typicality: Float[np.ndarray, " N"],
) -> dict[str, list[float]]:
    """Accuracy of the images that are kept, by coverage, the share of the images that are kept.

    Kept are the most typical images, or the images whose most likely class is most probable. The
    "risk_coverage_area_by_..." is the mean share of errors over all coverages (1 / N, 2 / N to 1);
    "best_risk_coverage_area" is that of an order in which all wrong images come last.
    """
    right = probabilities.argmax(axis=1) == labels
    count = np.arange(1, len(right) + 1)
    orders = {"typicality": typicality, "confidence": probabilities.max(axis=1)}
    shares = np.arange(1, 101)
    kept = np.ceil(shares * len(right) / 100).astype(int)
    found = {"coverage": (kept / len(right)).tolist()}
    for way, score in orders.items():
        accuracy = right[np.argsort(-score, kind="stable")].cumsum() / count
        found[f"accuracy_by_{way}"] = accuracy[kept - 1].tolist()
        found[f"risk_coverage_area_by_{way}"] = float((1 - accuracy).mean())
    best = np.sort(right)[::-1].cumsum() / count
    return found | {"best_risk_coverage_area": float((1 - best).mean())}


def numbers(found: dict) -> dict[str, float]:
    """The summary's numbers of `curves`."""
    named = {name: value for name, value in found.items() if isinstance(value, float)}
    for share in SHOWN:
        at = int(np.searchsorted(found["coverage"], share))
        for way in WAYS:
            named[f"accuracy_at_{share:g}_coverage_by_{way}"] = found[f"accuracy_by_{way}"][at]
    return named


def typicality(results) -> tuple[str, str]:
    """Content and tile of the report, of the `stages.reports.Results`; "" before the stage."""
    numbers = results.numbers("typicality")
    if not numbers:
        return "", ""
    content = results.picture("unusual", "The least usual test images, the most unusual one first.")
    found = files.read_json(results.folder / FILE, {})
    if found:
        percent = [100 * share for share in found["coverage"]]
        lines = [
            (list(zip(percent, found[f"accuracy_by_{way}"], strict=True)), color, f"by {way}")
            for way, color in WAYS.items()
        ]
        whole = found["accuracy_by_confidence"][-1]
        level = whole, "nothing rejected"
        png = pictures.plot(
            "test accuracy of the rest", "kept images, %", lines, level, percent=True
        )
        caption = "Accuracy where the least typical, or the least confident, images are rejected."
        content += html.figure(png, caption)
    rows = [(name.replace("_", " "), html.number(value)) for name, value in numbers.items()]
    content += f'<div class="scroll">{html.table(("typicality", ""), rows)}</div>'
    return content, ""
