"""The run's plots and its one-page report, made of whatever stages have finished."""

import base64
import datetime
import html
import io
import math

import jax
from etils import epy

from gptv_jax import config as config_lib
from gptv_jax import fields, files
from gptv_jax.record import finished_stages
from gptv_jax.run import Run
from gptv_jax.sampler import class_rows

with epy.lazy_imports():  # heavy, and not needed before there is something to plot
    from matplotlib import figure as figures
    from matplotlib import ticker

# Plots are transparent, in tones that read on white and on black, so that one picture serves both.
BLUE, ORANGE, QUIET, INK = "#3d85c6", "#d9822b", "#9a9a9a", "#808080"
SIZE = (5.4, 3.3)  # inches, of a plot
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1060px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
small, figcaption, summary, th { opacity: .7; } small { display: block; }
.box { display: block; margin: .8rem 0; padding: .7rem .9rem; background: #8882; border-radius: 8px;
       overflow-wrap: anywhere; } .box b { font-size: 1.35rem; }
code { font-size: .82rem; }
.tiles, .row { display: grid; gap: .4rem 1.5rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); column-gap: .8rem; }
.row { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; } img { width: 100%; } .pixels { image-rendering: pixelated; }
.scroll { max-height: 24rem; overflow: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { font-weight: 500; }
.mark { background: #3d85c633; font-weight: 600; }
"""


def write(run: Run) -> None:
    """Writes report.html and probe/layers.png; on process 0 alone."""
    if jax.process_index() != 0:
        return
    summary, events = run.summary(), run.metrics.read()
    title = _title(run, summary)
    numbers = [(name, _number(value)) for name, value in summary.items()]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} ({html.escape(run.folder.name)})</title><style>{STYLE}</style></head>
<body><h1>{title}</h1>{_origin(run)}
<div class="tiles">{_headlines(run, summary)}</div>
{_section("Training", _pretraining(run, events) + _finetuning(summary, events))}
{_section("Linear probe by layer", _layers(run, summary))}
{_section("Samples", _samples(run, summary))}
<div class="row"><div><h2>All numbers</h2>{_table(("name", "value"), numbers)}</div>
<div><h2>Configuration</h2>{_configuration(run)}</div></div></body></html>
"""
    files.replace(run.folder / "report.html", page.encode())


def _title(run: Run, summary: dict) -> str:
    parts = [run.config.data.name]
    if "model/params" in summary:  # absent where another run did the pretraining
        parts.append(f"{summary['model/params']:,} parameters")
    parts += [f"{run.config.model.layers} layers", f"width {run.config.model.width}"]
    return html.escape(", ".join(parts))


def _origin(run: Run) -> str:
    """Where the numbers come from: folder, date, devices, command and versions."""
    record = files.read_json(run.folder / "config.json", {})
    versions = " · ".join(f"{name} {version}" for name, version in record["versions"].items())
    now = datetime.datetime.now(datetime.UTC)
    written = f"{run.folder.name} · written {now:%Y-%m-%d %H:%M} UTC on {record['devices']}"
    command = f'<code class="box">{html.escape(record["command"])}</code>'
    return f"<small>{html.escape(written)}</small>{command}<small>{html.escape(versions)}</small>"


def _headlines(run: Run, summary: dict) -> str:
    """The main numbers, each with what it is to be held against."""
    tiles, done, v = "", finished_stages(summary), run.codec.vocabulary
    if "pretrain" in done:
        nats, bits = (summary[f"pretrain/test_{unit}_per_token"] for unit in ("nats", "bits"))
        uniform = f"uniform (ln {v}): {math.log(v):.3f} nats/token"
        in_bits = f"in bits: {bits:.3f}, uniform {math.log2(v):.3f}"
        of_pixels = _against_pixels(summary)
        tiles += _tile("Test loss", f"{nats:.3f} nats/token", uniform, in_bits, *of_pixels)
        speed, mfu = summary["pretrain/train_tokens_per_second"], summary["pretrain/mfu"]
        shown = "not timed" if speed is None else f"{speed:,.0f} tokens/s"
        share = "MFU: unknown peak" if mfu is None else f"MFU {mfu:.1%}"
        tiles += _tile("Pretraining speed", shown, share, *_goodput(summary))
    if "probe" in done:
        raw = f"raw pixels {summary['probe/raw_pixels_test_accuracy']:.2%}"
        random = f"random init {summary['probe/random_init_test_accuracy']:.2%}"
        tiles += _tile("Probe, test accuracy", f"{summary['probe/test_accuracy']:.2%}", raw, random)
    if "finetune" in done:
        tuned = f"{summary['finetune/test_accuracy']:.2%}"
        scratch = f"from scratch {summary['finetune/scratch_test_accuracy']:.2%}"
        tiles += _tile("Fine-tuning, test accuracy", tuned, scratch)
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


def _pretraining(run: Run, events: list[dict]) -> str:
    evaluations = _series(events, "pretrain", "validation_nats_per_token")
    if not evaluations:
        return ""
    figure = figures.Figure(SIZE, layout="constrained")
    loss, rate = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    _line(loss, _series(events, "pretrain", "nats_per_token"), ORANGE, "training")
    _line(loss, evaluations, BLUE, "validation")
    v = run.codec.vocabulary
    loss.axhline(math.log(v), color=QUIET, ls="--", lw=1, label=f"uniform, ln {v}")
    _line(rate, _series(events, "pretrain", "learning_rate"), QUIET)
    rate.yaxis.set_major_locator(ticker.MaxNLocator(2))
    rate.yaxis.set_major_formatter("{x:g}")
    _finish(loss, "loss, nats per token")
    _finish(rate, "learning rate", "step")
    return _figure(_png(figure), "Pretraining. The training loss is that of single batches.")


def _finetuning(summary: dict, events: list[dict]) -> str:
    tuned = _series(events, "finetune", "validation_accuracy")
    scratch = _series(events, "finetune_scratch", "validation_accuracy")
    if not tuned:
        return ""
    figure = figures.Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    _line(axes, tuned, BLUE, "pretrained", ring=summary.get("finetune/steps"))
    _line(axes, scratch, ORANGE, "from scratch", ring=summary.get("finetune/scratch_steps"))
    axes.yaxis.set_major_formatter(_percent_tick)
    _finish(axes, "validation accuracy", "step")
    return _figure(_png(figure), "Fine-tuning. Ringed: the step whose weights were kept.")


def _layers(run: Run, summary: dict) -> str:
    """Accuracy by layer, as a plot, which is saved too, and as a table."""
    rows = files.read_json(run.folder / "probe" / "layers.json", [])
    if not rows or "probe" not in finished_stages(summary):
        return ""
    best, raw = summary["probe/best_layer"], summary["probe/raw_pixels_test_accuracy"]
    png = _layers_plot(rows, best, raw)
    files.replace(run.folder / "probe" / "layers.png", png)
    caption = "Layer 0 is the embeddings. Ringed: the layer chosen on validation."
    sgd = run.config.probe.method == "sgd"
    setting, named = ("learning_rate", "learning rate") if sgd else ("c", "best C")
    head = ("layer", named, "validation", "test", "random init, test", "ridge, test")
    keys = ("validation_accuracy", "test_accuracy", "random_init_test_accuracy")
    cells = [
        (
            row["layer"],
            f"{row[setting]:g}" if setting in row else "",
            *(_percent(row.get(key)) for key in (*keys, "ridge_test_accuracy")),
        )
        for row in rows
    ]
    cells.append(("raw pixels", "", "", _percent(raw), "", ""))
    table = _table(head, cells, marked=[best])
    return f'{_figure(png, caption)}<div class="scroll">{table}</div>'


def _layers_plot(rows: list[dict], best: int, raw_pixels: float) -> bytes:
    figure = figures.Figure(SIZE, layout="constrained")
    axes = figure.subplots()

    def points(key: str) -> list[tuple]:
        return [(row["layer"], row[key]) for row in rows if row.get(key) is not None]

    _line(axes, points("validation_accuracy"), BLUE, "validation", style=":", ring=best)
    _line(axes, points("test_accuracy"), BLUE, "test")
    _line(axes, points("ridge_test_accuracy"), QUIET, "ridge, test")
    _line(axes, points("random_init_test_accuracy"), ORANGE, "random init, test")
    axes.axhline(raw_pixels, color=QUIET, ls="--", lw=1, label="raw pixels, test")
    axes.yaxis.set_major_formatter(_percent_tick)
    _finish(axes, "probe accuracy", "layer")
    return _png(figure)


def _samples(run: Run, summary: dict) -> str:
    config, rows, classes = run.config.sample, run.codec.grid[0], run.config.model.class_tokens
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
        path = run.folder / "samples" / f"{name}.png"
        if path.exists():
            figures += _figure(path.read_bytes(), caption, "pixels")
    return figures


def _configuration(run: Run) -> str:
    flat, default = fields.flatten(run.config), fields.flatten(config_lib.Config())
    changed = [name for name in flat if flat[name] != default[name]]
    table = _table(("field", "value"), list(flat.items()), marked=changed)
    return f"<details><summary>All fields; marked: not the default</summary>{table}</details>"


def _series(events: list[dict], stage: str, key: str) -> list[tuple]:
    """The (step, value) pairs that a stage logged under a key."""
    return [(e["step"], e[key]) for e in events if e["stage"] == stage and key in e]


def _line(
    axes: "matplotlib.axes.Axes", points: list[tuple], color: str, label="", style="-", ring=None
) -> None:
    """One curve; the point at x = `ring` is ringed."""
    if not points:
        return
    marker = "." if len(points) < 30 else None  # more of them would hide the line
    axes.plot(*zip(*points, strict=True), style, marker=marker, ms=4, lw=1.3, c=color, label=label)
    for x, y in points:
        if x == ring:
            axes.plot(x, y, "o", ms=10, mfc="none", mec=color)


def _finish(axes: "matplotlib.axes.Axes", title: str, x_label: str = "") -> None:
    """Quiet frame, whole numbers on x; the title says what y is, so that no text is sideways."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(axis="y", color=INK, alpha=0.2, lw=0.6)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _percent_tick(share: float, _) -> str:
    return f"{100 * share:g}%"


def _png(figure: "matplotlib.figure.Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return buffer.getvalue()


def _section(title: str, content: str) -> str:
    return f'<h2>{title}</h2><div class="row">{content}</div>' if content else ""


def _figure(png: bytes, caption: str, kind: str = "plot") -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f'<img class="{kind}" src="{source}" alt="{html.escape(caption)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _tile(title: str, value: str, *beside: str) -> str:
    lines = "".join(f"<small>{html.escape(line)}</small>" for line in beside)
    return f'<div class="box">{html.escape(title)}<br><b>{html.escape(value)}</b>{lines}</div>'


def _table(head: tuple, rows: list[tuple], marked=()) -> str:
    """A table; the rows whose first cell is among `marked` stand out."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        kind = "mark" if row[0] in marked else "plain"
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def _number(value) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:#.4g}"
