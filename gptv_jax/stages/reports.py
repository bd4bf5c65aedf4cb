"""The one-page report of a run: the parts of its stages, and the page around them.

Each stage has a function of its name, which returns the stage's content for a section of the page
and the tiles with its main numbers; both are HTML, and "" while there is nothing to show.
"""

import collections
import datetime
import math
from html import escape

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files, tasks
from gptv_jax.config import fields
from gptv_jax.data import inventory
from gptv_jax.errors import shorten
from gptv_jax.runs import accuracy, distilled, frames, html, layers, pictures
from gptv_jax.runs.context import Context
from gptv_jax.runs.rejection import typicality as typicality  # parts of the stages of these names
from gptv_jax.runs.results import Part, Results
from gptv_jax.runs.robustness import robustness as robustness
from gptv_jax.runs.samples import sample as sample
from gptv_jax.stages import STAGES

DRAWN = 25  # classes of the largest confusion matrix that is drawn; more are listed
LISTED = 12  # confusions that are listed where there are many classes


def tokenizer(results: Results) -> Part:
    """The training's curve, reconstructions, and how well the codes are used."""
    training, found = results.series("tokenizer", "batch_psnr_db"), results.numbers("tokenizer")
    if not training:
        return "", ""
    validation = results.series("tokenizer", "validation_psnr_db")
    curves = [
        (training, pictures.ORANGE, "training, of the batch's mean error"),
        (validation, pictures.BLUE, "validation, mean over images"),
    ]
    png = pictures.plot("PSNR, dB", "step", curves)
    content = html.figure(png, "Training of the encoder and decoder.")
    caption = "Test images, each followed by its reconstruction from tokens."
    content += results.picture("reconstructions", caption)
    if found:
        names = ("test_psnr_db", "test_ssim", "codes", "codes_used", "dead_codes", "perplexity")
        rows = [(n, html.number(found[n])) for n in (*names, "test_idempotence")]
        content += html.table(("on the test images", ""), rows)
    if found.get("collapsed"):
        used = f"{found['codes_used']:.2%} of the codes are in use"
        content += html.tile("The codebook has collapsed", used)
    return content, ""


def pretrain(results: Results) -> Part:
    """Curves of the loss and the probe, the test loss beside a uniform guess, and the speed."""
    tiles, v, found = "", results.config.tokens.vocabulary, results.numbers("pretrain")
    if found:
        beside = [f"uniform (ln {v}): {math.log(v):.3f} nats/token"]
        beside += [f"in bits: {found['test_bits_per_token']:.3f}, uniform {math.log2(v):.3f}"]
        if results.config.model.image_input == "pixels":
            beside += ["of each token given the pixels before it: no likelihood of the tokens"]
        elif (exact := found.get("test_bits_per_dimension")) is not None:
            beside += [f"lossless tokens: {exact:.3f} bits/dimension"]
        elif (psnr := found.get("test_distortion_psnr_db")) is not None:
            beside += [f"tokens lose detail ({psnr:.2f} dB): not comparable with bits/dimension"]
        tiles = html.tile("Test loss", f"{found['test_nats_per_token']:.3f} nats/token", *beside)
        speed, mfu = found["train_tokens_per_second"], found["mfu"]
        timed = "not timed" if speed is None else f"{speed:,.0f} tokens/s"
        beside = ["MFU: the devices' peak is unknown" if mfu is None else f"MFU {mfu:.1%}"]
        if (share := found.get("goodput")) is not None:
            beside += [f"goodput {share:.1%}, {found.get('restarts')} restarts"]
        tiles += html.tile("Pretraining speed", timed, *beside)
    evaluations = results.series("pretrain", "validation_nats_per_token")
    if not evaluations:
        return "", tiles
    curves = [
        (results.series("pretrain", "nats_per_token"), pictures.ORANGE, "training"),
        (evaluations, pictures.BLUE, "validation"),
        *distilled.curves(results.series, "pretrain", "validation_nats_per_token"),
    ]
    level = math.log(v), f"uniform, ln {v}"
    below = "learning rate", results.series("pretrain", "learning_rate")
    png = pictures.plot("loss, nats per token", "step", curves, level, below=below)
    content = html.figure(png, "Pretraining. The training loss is that of single batches.")
    if probed := results.series("pretrain", "ridge_validation_accuracy"):
        png = pictures.plot("probe accuracy", "step", [(probed, pictures.BLUE)], percent=True)
        content += html.figure(png, "The best layer of each step, by ridge regression, validation.")
    content += distilled.table(found, "nats_per_token")
    return content + frames.nats(found, results.config.tokens.cell[0]), tiles


def probe(results: Results) -> Part:
    """What is read of labels, and of label maps, by layer."""
    parts = (
        _probe_of_labels(results),
        layers.of_label_maps(results.folder / "probe", results.numbers("probe")),
    )
    return "".join(content for content, _ in parts), "".join(tiles for _, tiles in parts)


def _probe_of_labels(results: Results) -> Part:
    """Accuracy by layer, as a table and as a plot, which probe/layers.png keeps."""
    folder, found = results.folder / "probe", results.numbers("probe")
    rows = files.read_json(folder / "layers.json", [])
    if not rows or not found:
        return "", ""

    def points(key: str) -> list[tuple]:
        return [(row["layer"], row[key]) for row in rows if row.get(key) is not None]

    best, raw = found["best_layer"], found["raw_pixels_test_accuracy"]
    curves = [
        (points("validation_accuracy"), pictures.BLUE, "validation", ":", best),
        (points("test_accuracy"), pictures.BLUE, "test"),
        (points("ridge_test_accuracy"), pictures.QUIET, "ridge, test"),
        (points("random_init_test_accuracy"), pictures.ORANGE, "random init, test"),
    ]
    level = raw, "raw pixels, test"
    png = pictures.plot("probe accuracy", "layer", curves, level, percent=True)
    files.replace(folder / "layers.png", png)
    caption = "Layer 0 is the embeddings. Ringed: the layer chosen on validation."
    if (regions := results.config.probe.regions) > 1:
        caption += f" Of a layer are read the means over {regions} x {regions} parts of the image."
    sgd = results.config.probe.method == "sgd"
    setting, named = ("learning_rate", "learning rate") if sgd else ("c", "best C")
    head = ("layer", named, "validation", "test", "random init, test", "ridge, test")
    keys = ("validation_accuracy", "test_accuracy", "random_init_test_accuracy")
    keys += ("ridge_test_accuracy",)
    cells, beside = [], []
    for row in rows:
        chosen = f"{row[setting]:g}" if setting in row else ""
        shares = (accuracy.share(row.get(key), accuracy.images_of(key, found)) for key in keys)
        cells.append((row["layer"], chosen, *shares))
    if (first := found.get("concatenated_first_layer")) is not None:
        names = [f"concatenated_{key}" for key in keys[:3]]
        shares = [accuracy.share(found.get(n), accuracy.images_of(n, found)) for n in names]
        joined = f"{first} to {found['concatenated_last_layer']} together"
        cells.append((joined, "", *shares, ""))
        beside += [f"layers {joined} {results.share('probe', 'concatenated_test_accuracy')}"]
    cells.append(("raw pixels", "", "", accuracy.share(raw, found.get("test_images")), "", ""))
    table = html.table(head, cells, marked=[best])
    floors = {"raw pixels": "raw_pixels", "random init": "random_init"}
    beside += [f"{n} {results.share('probe', f'{k}_test_accuracy')}" for n, k in floors.items()]
    tile = _accuracy_tile(results, "probe", "Probe, test accuracy", *beside)
    content = f'{html.figure(png, caption)}<div class="scroll">{table}</div>'
    return content + _by_class(results, "probe", f"Linear probe of layer {best}"), tile


def finetune(results: Results) -> Part:
    """The task's main number by step, pretrained and from scratch; its numbers on test images."""
    tiles, found = "", results.numbers("finetune")
    task = tasks.kind(results.config.task.name)
    first = next(iter(task.primary))
    is_share, words = first in task.shares, first.replace("_", " ")
    if found:
        beside, scratch = [], f"scratch_test_{first}"
        if scratch in found:
            value = results.share("finetune", scratch) if is_share else html.number(found[scratch])
            beside = [f"from scratch {value}"]
        title = f"Fine-tuning, test {words}"
        if is_share:
            tiles = _accuracy_tile(results, "finetune", title, *beside, name=first)
        else:
            tiles = html.tile(title, html.number(found[f"test_{first}"]), *beside)
    key = f"validation_{first}"
    tuned, scratch = (results.series(f"finetune{name}", key) for name in ("", "_scratch"))
    if not tuned:
        return "", tiles
    begun = "from random weights" if results.config.tokens.kind == "none" else "pretrained"
    curves = [
        (tuned, pictures.BLUE, begun, "-", found.get("steps")),
        (scratch, pictures.ORANGE, "from scratch", "-", found.get("scratch_steps")),
    ]
    png = pictures.plot(f"validation {words}", "step", curves, percent=is_share)
    content = html.figure(png, "Fine-tuning. Ringed: the step whose weights were kept.")
    usual = {first, "nats_per_token", "class_nats", *distilled.COMPARED}
    content += distilled.table(found, first) + _test_numbers(found, usual)
    return content + _by_class(results, "finetune", "Fine-tuned network"), tiles


def _test_numbers(found: dict, usual: set[str]) -> str:
    """A table of the test numbers with floors and ceilings, if there are more than the usual."""
    numbers = {n: v for n, v in found.items() if "test_" in n and isinstance(v, float)}
    numbers = {n: html.number(v) for n, v in numbers.items() if not n.endswith("_standard_error")}
    names = [name.removeprefix("test_") for name in numbers if name.startswith("test_")]
    if not set(names) - usual:
        return ""
    before = dict.fromkeys(n.partition("test_")[0] for n in numbers)
    cells = [(n, *(numbers.get(f"{b}test_{n}", "") for b in before)) for n in names]
    head = ("on the test images", *(b.replace("_", " ").strip() or "fine-tuned" for b in before))
    return f'<div class="scroll">{html.table(head, cells)}</div>'


def _accuracy_tile(
    results: Results, stage: str, title: str, *beside: str, name: str = "accuracy"
) -> str:
    lines, images = list(beside), accuracy.images_of(f"test_{name}", results.numbers(stage))
    if images:
        lines.append(f"{images:,} test images; ± is one standard error")
    return html.tile(title, results.share(stage, f"test_{name}"), *lines)


def _by_class(results: Results, stage: str, title: str) -> str:
    """Accuracy by class, and the test images' confusions: all or, of many classes, the worst."""
    found = accuracy.read(results.folder / stage)
    if not found:
        return ""
    rows, matrix = found["classes"], np.array(found["confusion"])
    names = [row["name"] for row in rows]
    cells = [
        (
            row["name"],
            "" if row["training_images"] is None else f"{row['training_images']:,}",
            f"{row['test_images']:,}",
            accuracy.share(row["test_accuracy"], row["test_images"]),
        )
        for row in rows
    ]
    content = html.table(("class", "training images", "test images", "test accuracy"), cells)
    content = f'<div class="scroll"><small>{escape(title)}, by class.</small>{content}</div>'
    if len(rows) <= DRAWN:
        png = pictures.confusion(matrix, names)
        return content + html.figure(png, f"{title}: test images by true and predicted class.")
    wrong = matrix * (1 - np.eye(len(matrix), dtype=int))
    worst = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None)[:LISTED]]
    pairs = [(names[i], names[j], f"{wrong[i, j]:,}") for i, j in worst if wrong[i, j]]
    return content + html.table(("most frequent confusions: class", "taken for", "images"), pairs)


def write(context: Context) -> None:
    """Writes report.html, on process 0 alone."""
    if jax.process_index() != 0:
        return
    config, folder = context.config, context.folder.path
    results = Results(config, folder, context.folder.summary(), context.log.read())
    sections, tiles = collections.defaultdict(str), ""
    for stage in STAGES.values():
        if stage.heading:
            content, more = stage.report(results)
            sections[stage.heading] += content
            tiles += more
    for name, caption in tasks.kind(config.task.name).pictures.items():
        sections[name.replace("_", " ").capitalize()] += results.picture(name, caption)
    parts = [config.data.name]
    if "model/params" in results.summary:  # absent where another run did the pretraining
        parts.append(f"{results.summary['model/params']:,} parameters")
    parts += [f"{config.model.layers} layers", f"width {config.model.width}"]
    title = escape(", ".join(parts))
    cautions = accuracy.cautions(results.summary, accuracy.classes(folder))
    warned = "".join(f'<div class="box warning">{escape(each)}</div>' for each in cautions)
    shown = (f'<h2>{t}</h2><div class="row">{part}</div>' for t, part in sections.items() if part)
    numbers = [(name, html.number(value)) for name, value in results.summary.items()]
    content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} ({escape(folder.name)})</title><style>{html.STYLE}</style></head>
<body><h1>{title}</h1>{_origin(results)}
{warned}<div class="tiles">{tiles}</div>
{"".join(shown)}
<div class="row"><div><h2>All numbers</h2>{html.table(("name", "value"), numbers)}</div>
<div><h2>Configuration</h2>{_configuration(config)}</div></div></body></html>
"""
    files.replace(folder / "report.html", content.encode())


def _origin(results: Results) -> str:
    """Folder, date, devices, data, command and versions."""
    folder, record = results.folder, results.record
    versions = " · ".join(f"{name} {version}" for name, version in record["versions"].items())
    now = datetime.datetime.now(datetime.UTC)
    written = f"{folder.name} · written {now:%Y-%m-%d %H:%M} UTC on {record['devices']}"
    command = f'<code class="box">{escape(record["command"])}</code>'
    splits = ", ".join(f"{count:,} {split}" for split, count in record.get("images", {}).items())
    others = record.get("objects") or record.get("maps")
    named = record.get("classes") or ("" if others else "none")
    if isinstance(named, list):
        named = f"{len(named)} ({shorten(named, room=300)})"
    images = "clips" if results.config.data.frames else "images"
    data = f"{images}: {splits or 'not recorded'}" + (f" · classes: {named}" if named else "")
    held = record.get("found", {})  # absent in folders of older versions
    told = inventory.objects_in_words(record.get("objects", ()), held.get("objects", {}))
    told += inventory.maps_in_words(record.get("maps", ()), held.get("maps"))
    told += [*(f"left out: {each}" for each in held.get("left_out", ())), *held.get("notes", ())]
    lines = (f"<small>{escape(line)}</small>" for line in (written, data, *told))
    return f"{''.join(lines)}{command}<small>{escape(versions)}</small>"


def _configuration(config: config_lib.Config) -> str:
    flat, default = fields.flatten(config), fields.flatten(config_lib.Config())
    changed = [name for name in flat if flat[name] != default[name]]
    table = html.table(("field", "value"), list(flat.items()), marked=changed)
    summary = "All fields; marked fields differ from their defaults"
    return f"<details><summary>{summary}</summary>{table}</details>"
