"""Pictures of corrupted and attacked images, and what the report says of robustness."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from gptv_jax import files
from gptv_jax.runs import accuracy, html, pictures
from gptv_jax.runs.results import Part, Results
from gptv_jax.tasks.drawing import COLORS, FONT, text_font
from gptv_jax.tokens import Codec

FILE = "robustness.json"
UNFINISHED = "robustness.unfinished.json"  # scores of a stage that has not finished
CORRUPTED, ATTACKED = "corruptions", "attacked"  # pictures in samples/
GAP, INK = 6, "#606060"  # pixels; of texts
SIDE = 64  # pixels; images are enlarged while their shorter side is not longer than this
CAPTIONS = {
    CORRUPTED: "Test images as they are, and under every corruption at strengths 1 to 5.",
    ATTACKED: "Test images that the attack brings to a wrong class: as they are, with the true "
    "class, and to the right with the changed tokens outlined, and the class then given.",
}


def save_corruptions(
    folder: pathlib.Path, labels: Sequence[str], rows: Sequence[Sequence[np.ndarray]]
) -> None:
    """Writes samples/corruptions.png: rows of images as they are and at every strength."""
    cells = [[_enlarged(image) for image in row] for row in rows]
    titles = ["as it is", *(f"strength {n}" for n in range(1, len(rows[0])))]
    pictures.save(_sheet(cells, titles, labels), _path(folder, CORRUPTED))


def save_attacked(
    folder: pathlib.Path, codec: Codec | None, names: Sequence[str], found: Sequence[dict]
) -> None:
    """Writes samples/attacked.png, or removes it where the attack has changed no image's class.

    `found` has rows of `token_attack.Attacked`, as dicts.
    """
    path = _path(folder, ATTACKED)
    if not found:
        path.unlink(missing_ok=True)
        return
    cells, titles = [], []
    for row in found:
        both = codec.picture(codec.decode(np.stack([row["original"], row["tokens"]])))
        places = np.flatnonzero(row["original"] != row["tokens"])
        if both.ndim == 5:  # of a clip, the frame of the first change
            at = np.unravel_index(places, codec.grid)[0]
            both, places = both[:, codec.sides[0][: at[0]].sum()], places[at == at[0]]
        original, attacked = (_enlarged(image) for image in both)
        _outline(attacked, codec, places, both.shape[1:3])
        cells += [original, attacked]
        titles += [names[row["label"]], f"{names[row['given']]} ({row['fell']})"]
    columns = min(8, len(cells))
    grid = [cells[at : at + columns] for at in range(0, len(cells), columns)]
    texts = [titles[at : at + columns] for at in range(0, len(cells), columns)]
    pictures.save(_sheet(grid, texts), path)


def robustness(results: Results) -> Part:
    """The report's content and tile; "" before the stage has finished."""
    folder = results.folder
    about = files.read_json(folder / FILE, {})
    if not about:
        return "", ""
    metric, networks, images = about["metric"], about["networks"], about["test_images"]
    named = dict(zip(("this run", "compared"), networks, strict=False))
    words, is_share = metric.replace("_", " "), metric.endswith("accuracy")
    content = ""
    for name, table in named.items():
        curves = [
            ([(0, table["clean"]), *enumerate(row, start=1)], color, kind)
            for (kind, row), color in zip(table["corruptions"].items(), COLORS, strict=False)
            if None not in (table["clean"], *row)
        ]
        title = f"test {words}" + f", {name}" * (len(named) > 1)
        png = pictures.plot(title, "strength", curves, percent=is_share)
        caption = f"{table['source']}: {images:,} test images under corruptions; 0 is as they are."
        content += html.figure(png, caption)
        content += f'<div class="scroll">{_table(title, table, images if is_share else None)}</div>'
    if all("attack" in table for table in networks):
        content += _attack(named, about["attacked_images"])
    for name, caption in CAPTIONS.items():
        if _path(folder, name).exists():
            content += html.figure(_path(folder, name).read_bytes(), caption, "pixels")
    return content, _tile(named, words, is_share)


def _shown(value: float | None, is_share: bool) -> str:
    return f"{value:.2%}" if is_share and value is not None else html.number(value)


def _tile(named: dict[str, dict], words: str, is_share: bool) -> str:
    values = {}
    for name, table in named.items():
        every = [value for row in table["corruptions"].values() for value in row]
        known = None not in every
        values[name] = (np.mean(every), min(every)) if known else (None, None)
    (mean, worst), *others = values.values()
    lines = [
        f"as they are {_shown(named['this run']['clean'], is_share)}",
        f"worst {_shown(worst, is_share)}",
        *(f"compared: mean {_shown(x, is_share)}, worst {_shown(y, is_share)}" for x, y in others),
    ]
    return html.tile(f"Corrupted images, mean {words}", _shown(mean, is_share), *lines)


def _table(title: str, table: dict, images: int | None) -> str:
    """Rows of corruptions; `images` where the numbers are shares of so many images."""
    rows = []
    for kind, row in table["corruptions"].items():
        mean = None if None in row else float(np.mean(row))
        rows.append((kind, *(_shown(x, images is not None) for x in (*row, mean))))
    clean = accuracy.share(table["clean"], images) if images else html.number(table["clean"])
    rows.append(("as they are", clean, *[""] * 5))
    return html.table((title, *(f"strength {n}" for n in range(1, 6)), "mean"), rows)


def _attack(named: dict[str, dict], images: int) -> str:
    """Accuracy by the number of changed tokens."""
    curves = []
    for (name, table), style in zip(named.items(), ("-", "--"), strict=False):
        of = f", {name}" * (len(named) > 1)
        colors = {"attacked": pictures.ORANGE, "searched": pictures.BLUE, "random": pictures.QUIET}
        words = {"attacked": "greedy attack", "searched": "random search", "random": "random"}
        curves += [
            ([*enumerate(table["attack"][way])], color, f"{words[way]}{of}", style)
            for way, color in colors.items()
        ]
    attack = named["this run"]["attack"]
    png = pictures.plot("test accuracy", "changed tokens", curves, percent=True)
    caption = (
        f"{images:,} test images, of which at most so many tokens are changed. The greedy attack "
        f"takes at most {attack['calls']} passes of the network over an image "
        f"({attack['calls_mean']:.1f} on average), random search as many without a gradient; "
        "random: any token becomes any other."
    )
    return html.figure(png, caption)


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "samples" / f"{name}.png"


def _enlarged(image: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """The image, enlarged by a whole factor where it is small."""
    scale = max(1, -(-SIDE // min(image.shape[:2])))
    return Image.fromarray(np.ascontiguousarray(image.repeat(scale, axis=0).repeat(scale, axis=1)))


def _outline(
    picture: Image.Image, codec: Codec, places: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Draws a frame around the pixels of the tokens at these places of the sequence."""
    scale, canvas = picture.height // shape[0], ImageDraw.Draw(picture)
    ends = [np.concatenate([[0], np.cumsum(sides)]) * scale for sides in codec.sides[-2:]]
    for place in places:
        row, column = np.unravel_index(place, codec.grid)[-2:]
        (top, bottom), (left, right) = ends[0][row : row + 2], ends[1][column : column + 2]
        canvas.rectangle((left, top, right - 1, bottom - 1), outline="#e6194b", width=2)


def _sheet(
    cells: Sequence[Sequence[Image.Image]], titles: Sequence, labels: Sequence[str] = ()
) -> UInt8[np.ndarray, "height width 3"]:
    """Images in rows, under titles (of the columns, or a list for each row), beside labels."""
    font, by_row = text_font(), bool(titles) and not isinstance(titles[0], str)
    texts = titles if by_row else [titles, *[()] * (len(cells) - 1)]
    every = [text for row in texts for text in row]
    width = max([cells[0][0].width, *(round(font.getlength(text)) for text in every)]) + GAP
    left = max((round(font.getlength(label)) for label in labels), default=0) + GAP
    heights = [cells[0][0].height + GAP + (FONT + 4 if row else 0) for row in texts]
    size = (left + width * max(map(len, cells)), sum(heights) + GAP)
    sheet = Image.new("RGB", size, "white")
    canvas, top = ImageDraw.Draw(sheet), GAP
    for number, (row, titled, height) in enumerate(zip(cells, texts, heights, strict=True)):
        below = top + (FONT + 4 if titled else 0)
        for column, text in enumerate(titled):
            canvas.text((left + column * width, top), text, fill=INK, font=font)
        if labels:
            canvas.text((GAP // 2, below), labels[number], fill=INK, font=font)
        for column, cell in enumerate(row):
            sheet.paste(cell, (left + column * width, below))
        top += height
    return np.asarray(sheet)
