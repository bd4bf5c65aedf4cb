"""The run's plots and its one-page report, made of whatever stages have finished."""

import datetime
import math
from html import escape

import jax
from etils import epy

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.decode.sampler import class_rows
from gptv_jax.runs import html
from gptv_jax.runs.context import Context
from gptv_jax.runs.record import has_finished

with epy.lazy_imports():  # heavy, and not needed before there is something to plot
    from matplotlib import figure as figures
    from matplotlib import ticker


def write(context: Context) -> None:
    """Writes report.html and probe/layers.png; on process 0 alone."""
    if jax.process_index() != 0:
        return
    summary, events = context.folder.summary(), context.log.read()
    title = _title(context, summary)
    numbers = [(name, html.number(value)) for name, value in summary.items()]
    content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} ({escape(context.folder.path.name)})</title><style>{html.STYLE}</style></head>
<body><h1>{title}</h1>{_origin(context)}
<div class="tiles">{_headlines(context, summary)}</div>
{html.section("Tokenizer", _tokenizing(context, summary, events))}
{html.section("Training", _pretraining(context, events) + _finetuning(summary, events))}
{html.section("Linear probe by layer", _layers(context, summary))}
{html.section("Samples", _samples(context, summary))}
<div class="row"><div><h2>All numbers</h2>{html.table(("name", "value"), numbers)}</div>
<div><h2>Configuration</h2>{_configuration(context)}</div></div></body></html>
"""
    files.replace(context.folder.path / "report.html", content.encode())


def _title(context: Context, summary: dict) -> str:
    parts = [context.config.data.name]
    if "model/params" in summary:  # absent where another run did the pretraining
        parts.append(f"{summary['model/params']:,} parameters")
    parts += [f"{context.config.model.layers} layers", f"width {context.config.model.width}"]
    return escape(", ".join(parts))


def _origin(context: Context) -> str:
    """Where the numbers come from: folder, date, devices, command and versions."""
    record = files.read_json(context.folder.path / "config.json", {})
    versions = " · ".join(f"{name} {version}" for name, version in record["versions"].items())
    now = datetime.datetime.now(datetime.UTC)
    written = (
        f"{context.folder.path.name} · written {now:%Y-%m-%d %H:%M} UTC on {record['devices']}"
    )
    command = f'<code class="box">{escape(record["command"])}</code>'
    return f"<small>{escape(written)}</small>{command}<small>{escape(versions)}</small>"


def _headlines(context: Context, summary: dict) -> str:
    """The main numbers, each with what it is to be held against."""
    tiles, v = "", context.config.tokens.vocabulary
    if has_finished(summary, "pretrain"):
        nats, bits = (summary[f"pretrain/test_{unit}_per_token"] for unit in ("nats", "bits"))
        uniform = f"uniform (ln {v}): {math.log(v):.3f} nats/token"
        in_bits = f"in bits: {bits:.3f}, uniform {math.log2(v):.3f}"
        of_pixels = _against_pixels(summary)
        tiles += html.tile("Test loss", f"{nats:.3f} nats/token", uniform, in_bits, *of_pixels)
        speed, mfu = summary["pretrain/train_tokens_per_second"], summary["pretrain/mfu"]
        shown = "not timed" if speed is None else f"{speed:,.0f} tokens/s"
        share = "MFU: unknown peak" if mfu is None else f"MFU {mfu:.1%}"
        tiles += html.tile("Pretraining speed", shown, share, *_goodput(summary))
    if has_finished(summary, "probe"):
        raw = f"raw pixels {summary['probe/raw_pixels_test_accuracy']:.2%}"
        random = f"random init {summary['probe/random_init_test_accuracy']:.2%}"
        reached = f"{summary['probe/test_accuracy']:.2%}"
        tiles += html.tile("Probe, test accuracy", reached, raw, random)
    if has_finished(summary, "finetune"):
        tuned = f"{summary['finetune/test_accuracy']:.2%}"
        scratch = f"from scratch {summary['finetune/scratch_test_accuracy']:.2%}"
        tiles += html.tile("Fine-tuning, test accuracy", tuned, scratch)
    return tiles


def _against_pixels(summary: dict) -> list[str]:
    """What the loss says of the images themselves."""
    exact = summary.get("pretrain/test_bits_per_dimension")
    psnr = summary.get("pretrain/test_distortion_psnr_db")
    if exact is not None:
        return [f"lossless tokens: {exact:.3f} bits/dimension"]
    if psnr is not None:
        return [f"tokens lose detail ({psnr:.2f} dB): not comparable with bits/dimension"]
    return []


def _goodput(summary: dict) -> list[str]:
    """Of the time, how much was training."""
    share, restarts = (summary.get(f"pretrain/{name}") for name in ("goodput", "restarts"))
    return [] if share is None else [f"goodput {share:.1%}, {restarts} restarts"]


def _pretraining(context: Context, events: list[dict]) -> str:
    evaluations = _series(events, "pretrain", "validation_nats_per_token")
    if not evaluations:
        return ""
    figure = figures.Figure(html.SIZE, layout="constrained")
    loss, rate = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    html.line(loss, _series(events, "pretrain", "nats_per_token"), html.ORANGE, "training")
    html.line(loss, evaluations, html.BLUE, "validation")
    v = context.config.tokens.vocabulary
    loss.axhline(math.log(v), color=html.QUIET, ls="--", lw=1, label=f"uniform, ln {v}")
    html.line(rate, _series(events, "pretrain", "learning_rate"), html.QUIET)
    rate.yaxis.set_major_locator(ticker.MaxNLocator(2))
    rate.yaxis.set_major_formatter("{x:g}")
    html.finish(loss, "loss, nats per token")
    html.finish(rate, "learning rate", "step")
    caption = "Pretraining. The training loss is that of single batches."
    return html.figure(html.png(figure), caption)


def _tokenizing(context: Context, summary: dict, events: list[dict]) -> str:
    """The tokenizer's curve, its health and its reconstructions."""
    training = _series(events, "tokenizer", "batch_psnr_db")
    if not training:
        return ""
    figure = figures.Figure(html.SIZE, layout="constrained")
    axes = figure.subplots()
    html.line(axes, training, html.ORANGE, "training, of a batch's mean error")
    validation = _series(events, "tokenizer", "validation_psnr_db")
    html.line(axes, validation, html.BLUE, "validation, mean over images")
    html.finish(axes, "PSNR, dB", "step")
    shown = html.figure(html.png(figure), "Training of the encoder and decoder.")
    path = context.folder.path / "samples" / "reconstructions.png"
    if path.exists():
        caption = "Test images, each followed by what its tokens restore."
        shown += html.figure(path.read_bytes(), caption, "pixels")
    if has_finished(summary, "tokenizer"):
        names = ("test_psnr_db", "test_ssim", "codes", "codes_used", "dead_codes", "perplexity")
        rows = [(n, html.number(summary[f"tokenizer/{n}"])) for n in (*names, "test_idempotence")]
        shown += html.table(("health on the test images", ""), rows)
    if summary.get("tokenizer/collapsed"):
        used = summary["tokenizer/codes_used"]
        shown += html.tile("The codebook has collapsed", f"{used:.2%} of the codes are in use")
    return shown


def _finetuning(summary: dict, events: list[dict]) -> str:
    tuned = _series(events, "finetune", "validation_accuracy")
    scratch = _series(events, "finetune_scratch", "validation_accuracy")
    if not tuned:
        return ""
    figure = figures.Figure(html.SIZE, layout="constrained")
    axes = figure.subplots()
    html.line(axes, tuned, html.BLUE, "pretrained", ring=summary.get("finetune/steps"))
    kept = summary.get("finetune/scratch_steps")
    html.line(axes, scratch, html.ORANGE, "from scratch", ring=kept)
    axes.yaxis.set_major_formatter(html.percent_tick)
    html.finish(axes, "validation accuracy", "step")
    return html.figure(html.png(figure), "Fine-tuning. Ringed: the step whose weights were kept.")


def _layers(context: Context, summary: dict) -> str:
    """Accuracy by layer, as a plot, which is saved too, and as a table."""
    rows = files.read_json(context.folder.path / "probe" / "layers.json", [])
    if not rows or not has_finished(summary, "probe"):
        return ""
    best, raw = summary["probe/best_layer"], summary["probe/raw_pixels_test_accuracy"]
    png = _layers_plot(rows, best, raw)
    files.replace(context.folder.path / "probe" / "layers.png", png)
    caption = "Layer 0 is the embeddings. Ringed: the layer chosen on validation."
    sgd = context.config.probe.method == "sgd"
    setting, named = ("learning_rate", "learning rate") if sgd else ("c", "best C")
    head = ("layer", named, "validation", "test", "random init, test", "ridge, test")
    keys = ("validation_accuracy", "test_accuracy", "random_init_test_accuracy")
    cells = [
        (
            row["layer"],
            f"{row[setting]:g}" if setting in row else "",
            *(html.percent(row.get(key)) for key in (*keys, "ridge_test_accuracy")),
        )
        for row in rows
    ]
    cells.append(("raw pixels", "", "", html.percent(raw), "", ""))
    table = html.table(head, cells, marked=[best])
    return f'{html.figure(png, caption)}<div class="scroll">{table}</div>'


def _layers_plot(rows: list[dict], best: int, raw_pixels: float) -> bytes:
    figure = figures.Figure(html.SIZE, layout="constrained")
    axes = figure.subplots()

    def points(key: str) -> list[tuple]:
        return [(row["layer"], row[key]) for row in rows if row.get(key) is not None]

    html.line(axes, points("validation_accuracy"), html.BLUE, "validation", style=":", ring=best)
    html.line(axes, points("test_accuracy"), html.BLUE, "test")
    html.line(axes, points("ridge_test_accuracy"), html.QUIET, "ridge, test")
    html.line(axes, points("random_init_test_accuracy"), html.ORANGE, "random init, test")
    axes.axhline(raw_pixels, color=html.QUIET, ls="--", lw=1, label="raw pixels, test")
    axes.yaxis.set_major_formatter(html.percent_tick)
    html.finish(axes, "probe accuracy", "layer")
    return html.png(figure)


def _samples(context: Context, summary: dict) -> str:
    config, classes = context.config.sample, context.config.model.class_tokens
    rows = context.config.tokens.grid(context.config.data.image_size)[0]
    drawn = f"drawn at temperature {config.temperature:g}"
    if config.guidance != 1:
        drawn += f", {config.guidance_schedule} guidance {config.guidance:g}"
    of_classes = class_rows(config.count, classes)[:, 0].tolist() if classes else ()
    captions = {
        "unconditional": f"New images, {drawn}.",
        "classes": f"New images, {drawn}; a row each of class {', '.join(map(str, of_classes))}.",
        "completions": "Test images, each followed by its completion: the upper "
        f"{round(config.keep * rows)} of {rows} rows of tokens are given, the rest is drawn.",
        "inpainted": "The same, each followed by itself with the middle drawn anew, of which only "
        "what is above or to the left is known when a token is drawn.",
        "surprise": "The same, each followed by the nats of its pixels, given those before: black "
        f"0, brightest {summary.get('sample/surprise_brightest_nats', math.nan):.2f}.",
    }
    figures = ""
    for name, caption in captions.items():
        path = context.folder.path / "samples" / f"{name}.png"
        if path.exists():
            figures += html.figure(path.read_bytes(), caption, "pixels")
    return figures


def _configuration(context: Context) -> str:
    flat, default = fields.flatten(context.config), fields.flatten(config_lib.Config())
    changed = [name for name in flat if flat[name] != default[name]]
    table = html.table(("field", "value"), list(flat.items()), marked=changed)
    return f"<details><summary>All fields; marked: not the default</summary>{table}</details>"


def _series(events: list[dict], stage: str, key: str) -> list[tuple]:
    """The (step, value) pairs that a stage logged under a key."""
    return [(e["step"], e[key]) for e in events if e["stage"] == stage and key in e]
