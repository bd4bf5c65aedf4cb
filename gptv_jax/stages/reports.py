"""The one-page report of a run: the parts of its stages, and the page around them.

Each stage has a function of its name, which returns the stage's content for a section of the page
and the tiles with its main numbers; both are HTML, and "" while there is nothing to show.
"""

import base64
import collections
import dataclasses
import datetime
import math
import pathlib
from html import escape

import jax

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.decode.sampler import class_rows
from gptv_jax.runs import pictures
from gptv_jax.runs.context import Context
from gptv_jax.stages import STAGES

Part = tuple[str, str]  # content and tiles
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


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run has written so far."""

    config: config_lib.Config
    folder: pathlib.Path
    summary: dict
    events: list[dict]  # of metrics.jsonl

    def numbers(self, stage: str) -> dict:
        """The stage's numbers in the summary, none before the stage has finished."""
        prefix = f"{stage}/"
        return {k.removeprefix(prefix): v for k, v in self.summary.items() if k.startswith(prefix)}

    def series(self, stage: str, key: str) -> list[tuple]:
        """The (step, value) pairs that a stage logged under a key."""
        return [(e["step"], e[key]) for e in self.events if e["stage"] == stage and key in e]

    def picture(self, name: str, caption: str) -> str:
        """A picture of samples/, if it is there."""
        path = self.folder / "samples" / f"{name}.png"
        return _figure(path.read_bytes(), caption, "pixels") if path.exists() else ""


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
    content = _figure(png, "Training of the encoder and decoder.")
    caption = "Test images, each followed by its reconstruction from tokens."
    content += results.picture("reconstructions", caption)
    if found:
        names = ("test_psnr_db", "test_ssim", "codes", "codes_used", "dead_codes", "perplexity")
        rows = [(n, _number(found[n])) for n in (*names, "test_idempotence")]
        content += _table(("on the test images", ""), rows)
    if found.get("collapsed"):
        used = f"{found['codes_used']:.2%} of the codes are in use"
        content += _tile("The codebook has collapsed", used)
    return content, ""


def pretrain(results: Results) -> Part:
    """Loss curves; the test loss beside that of a uniform guess, and the speed."""
    tiles, v, found = "", results.config.tokens.vocabulary, results.numbers("pretrain")
    if found:
        beside = [f"uniform (ln {v}): {math.log(v):.3f} nats/token"]
        beside += [f"in bits: {found['test_bits_per_token']:.3f}, uniform {math.log2(v):.3f}"]
        if (exact := found.get("test_bits_per_dimension")) is not None:
            beside += [f"lossless tokens: {exact:.3f} bits/dimension"]
        elif (psnr := found.get("test_distortion_psnr_db")) is not None:
            beside += [f"tokens lose detail ({psnr:.2f} dB): not comparable with bits/dimension"]
        tiles = _tile("Test loss", f"{found['test_nats_per_token']:.3f} nats/token", *beside)
        speed, mfu = found["train_tokens_per_second"], found["mfu"]
        timed = "not timed" if speed is None else f"{speed:,.0f} tokens/s"
        beside = ["MFU: the devices' peak is unknown" if mfu is None else f"MFU {mfu:.1%}"]
        if (share := found.get("goodput")) is not None:
            beside += [f"goodput {share:.1%}, {found.get('restarts')} restarts"]
        tiles += _tile("Pretraining speed", timed, *beside)
    evaluations = results.series("pretrain", "validation_nats_per_token")
    if not evaluations:
        return "", tiles
    curves = [
        (results.series("pretrain", "nats_per_token"), pictures.ORANGE, "training"),
        (evaluations, pictures.BLUE, "validation"),
    ]
    level = math.log(v), f"uniform, ln {v}"
    below = "learning rate", results.series("pretrain", "learning_rate")
    png = pictures.plot("loss, nats per token", "step", curves, level, below=below)
    return _figure(png, "Pretraining. The training loss is that of single batches."), tiles


def probe(results: Results) -> Part:
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
    sgd = results.config.probe.method == "sgd"
    setting, named = ("learning_rate", "learning rate") if sgd else ("c", "best C")
    head = ("layer", named, "validation", "test", "random init, test", "ridge, test")
    keys = ("validation_accuracy", "test_accuracy", "random_init_test_accuracy")
    keys += ("ridge_test_accuracy",)
    cells = []
    for row in rows:
        chosen = f"{row[setting]:g}" if setting in row else ""
        shares = (f"{row[k]:.2%}" if row.get(k) is not None else "" for k in keys)
        cells.append((row["layer"], chosen, *shares))
    cells.append(("raw pixels", "", "", f"{raw:.2%}", "", ""))
    table = _table(head, cells, marked=[best])
    beside = f"raw pixels {raw:.2%}", f"random init {found['random_init_test_accuracy']:.2%}"
    tile = _tile("Probe, test accuracy", f"{found['test_accuracy']:.2%}", *beside)
    return f'{_figure(png, caption)}<div class="scroll">{table}</div>', tile


def finetune(results: Results) -> Part:
    """Validation accuracy by step, pretrained and from scratch."""
    tiles, found = "", results.numbers("finetune")
    if found:
        scratch = f"from scratch {found['scratch_test_accuracy']:.2%}"
        tiles = _tile("Fine-tuning, test accuracy", f"{found['test_accuracy']:.2%}", scratch)
    tuned, scratch = (
        results.series(name, "validation_accuracy") for name in ("finetune", "finetune_scratch")
    )
    if not tuned:
        return "", tiles
    curves = [
        (tuned, pictures.BLUE, "pretrained", "-", found.get("steps")),
        (scratch, pictures.ORANGE, "from scratch", "-", found.get("scratch_steps")),
    ]
    png = pictures.plot("validation accuracy", "step", curves, percent=True)
    return _figure(png, "Fine-tuning. Ringed: the step whose weights were kept."), tiles


def sample(results: Results) -> Part:
    """The pictures of samples/."""
    config, classes = results.config.sample, results.config.model.class_tokens
    rows = results.config.tokens.grid(results.config.data.image_size)[0]
    drawn = f"drawn at temperature {config.temperature:g}"
    if config.guidance != 1:
        drawn += f", {config.guidance_schedule} guidance {config.guidance:g}"
    shown = class_rows(config.count, classes)[:, 0].tolist() if classes else ()
    brightest = results.summary.get("sample/surprise_brightest_nats", math.nan)
    captions = {
        "unconditional": f"New images, {drawn}.",
        "classes": f"New images, {drawn}; each row shows one class: {', '.join(map(str, shown))}.",
        "completions": "Test images, each followed by its completion: the upper "
        f"{round(config.keep * rows)} of {rows} rows of tokens are given, the rest is drawn.",
        "inpainted": "Test images, each followed by a copy whose middle is drawn anew; a drawn "
        "token depends only on tokens above it and to its left.",
        "surprise": "Test images, each followed by the nats of its pixels, given the pixels before "
        f"them: black is 0, the brightest colour {brightest:.2f}.",
    }
    return "".join(results.picture(*named) for named in captions.items()), ""


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
    parts = [config.data.name]
    if "model/params" in results.summary:  # absent where another run did the pretraining
        parts.append(f"{results.summary['model/params']:,} parameters")
    parts += [f"{config.model.layers} layers", f"width {config.model.width}"]
    title = escape(", ".join(parts))
    shown = (f'<h2>{t}</h2><div class="row">{part}</div>' for t, part in sections.items() if part)
    numbers = [(name, _number(value)) for name, value in results.summary.items()]
    content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} ({escape(folder.name)})</title><style>{STYLE}</style></head>
<body><h1>{title}</h1>{_origin(folder)}
<div class="tiles">{tiles}</div>
{"".join(shown)}
<div class="row"><div><h2>All numbers</h2>{_table(("name", "value"), numbers)}</div>
<div><h2>Configuration</h2>{_configuration(config)}</div></div></body></html>
"""
    files.replace(folder / "report.html", content.encode())


def _origin(folder: pathlib.Path) -> str:
    """Folder, date, devices, command and versions."""
    record = files.read_json(folder / "config.json", {})
    versions = " · ".join(f"{name} {version}" for name, version in record["versions"].items())
    now = datetime.datetime.now(datetime.UTC)
    written = f"{folder.name} · written {now:%Y-%m-%d %H:%M} UTC on {record['devices']}"
    command = f'<code class="box">{escape(record["command"])}</code>'
    return f"<small>{escape(written)}</small>{command}<small>{escape(versions)}</small>"


def _configuration(config: config_lib.Config) -> str:
    flat, default = fields.flatten(config), fields.flatten(config_lib.Config())
    changed = [name for name in flat if flat[name] != default[name]]
    table = _table(("field", "value"), list(flat.items()), marked=changed)
    summary = "All fields; marked fields differ from their defaults"
    return f"<details><summary>{summary}</summary>{table}</details>"


def _figure(png: bytes, caption: str, kind: str = "plot") -> str:
    """A PNG file with a caption; the kind "pixels" is enlarged without smoothing."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f'<img class="{kind}" src="{source}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _tile(title: str, value: str, *beside: str) -> str:
    """A main number above lines with numbers to compare it with."""
    lines = "".join(f"<small>{escape(line)}</small>" for line in beside)
    return f'<div class="box">{escape(title)}<br><b>{escape(value)}</b>{lines}</div>'


def _table(head: tuple, rows: list[tuple], marked=()) -> str:
    """A table; rows whose first cell is in `marked` are highlighted."""
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        kind = "mark" if row[0] in marked else "plain"
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def _number(value) -> str:
    """A number of the summary as text."""
    if value is None or isinstance(value, str):
        return value or "unknown"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:#.4g}"
