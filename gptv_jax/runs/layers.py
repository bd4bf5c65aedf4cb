"""The report's figure of what the probe reads of label maps, by layer."""

import pathlib

from gptv_jax import files
from gptv_jax.runs import html, pictures

FILE = "dense_layers.json"


def of_label_maps(folder: pathlib.Path, found: dict) -> tuple[str, str]:
    """Mean IoU by layer, as a plot, which dense_layers.png keeps; and the tile of the best layer.

    `folder` is the probe's, `found` are the probe's numbers; ("", "") without label maps.
    """
    rows = files.read_json(folder / FILE, [])
    if not rows or "dense_best_layer" not in found:
        return "", ""

    def points(key: str) -> list[tuple]:
        return [(row["layer"], row[key]) for row in rows if row[key] is not None]

    curves = [
        (points("validation_miou"), pictures.BLUE, "validation", ":", found["dense_best_layer"]),
        (points("test_miou"), pictures.BLUE, "test"),
        (points("random_init_test_miou"), pictures.ORANGE, "random init, test"),
    ]
    level = found["raw_pixels_test_miou"], "raw pixels, test"
    png = pictures.plot("mean IoU of label maps", "layer", curves, level)
    files.replace(folder / "dense_layers.png", png)
    caption = "Classes of pixels, read linearly from each position. Ringed: the best on validation."
    floors = {"raw pixels": "raw_pixels_test_miou", "random init": "random_init_test_miou"}
    beside = [f"{name} {html.number(found[key])}" for name, key in floors.items()]
    tile = html.tile("Probe, test mean IoU", html.number(found["test_miou"]), *beside)
    return html.figure(png, caption), tile
