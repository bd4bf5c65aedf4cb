"""The parts of the report, each by a function with the name of its stage."""

import math

from etils import epy

from gptv_jax import files
from gptv_jax.decode.sampler import class_rows
from gptv_jax.runs import html
from gptv_jax.runs.report import Part, Results

with epy.lazy_imports():  # matplotlib takes long to import
    from matplotlib import figure as figures
    from matplotlib import ticker


def tokenizer(results: Results) -> Part:
    """The training's curve, reconstructions, and how well the codes are used."""
    title, summary = "Tokenizer", results.summary
    training = results.series("tokenizer", "batch_psnr_db")
    if not training:
        return Part(title)
    figure = figures.Figure(html.SIZE, layout="constrained")
    axes = figure.subplots()
    html.line(axes, training, html.ORANGE, "training, of the batch's mean error")
    validation = results.series("tokenizer", "validation_psnr_db")
    html.line(axes, validation, html.BLUE, "validation, mean over images")
    html.finish(axes, "PSNR, dB", "step")
    content = html.figure(html.png(figure), "Training of the encoder and decoder.")
    caption = "Test images, each followed by its reconstruction from tokens."
    content += _picture(results, "reconstructions", caption)
    if results.finished("tokenizer"):
        names = ("test_psnr_db", "test_ssim", "codes", "codes_used", "dead_codes", "perplexity")
        rows = [(n, html.number(summary[f"tokenizer/{n}"])) for n in (*names, "test_idempotence")]
        content += html.table(("on the test images", ""), rows)
    if summary.get("tokenizer/collapsed"):
        used = summary["tokenizer/codes_used"]
        content += html.tile("The codebook has collapsed", f"{used:.2%} of the codes are in use")
    return Part(title, content)


def pretrain(results: Results) -> Part:
    """Loss curves; the test loss beside that of a uniform guess, and the speed."""
    tiles, v = "", results.config.tokens.vocabulary
    if results.finished("pretrain"):
        found = {k.removeprefix("pretrain/"): value for k, value in results.summary.items()}
        nats, bits = found["test_nats_per_token"], found["test_bits_per_token"]
        uniform = f"uniform (ln {v}): {math.log(v):.3f} nats/token"
        in_bits = f"in bits: {bits:.3f}, uniform {math.log2(v):.3f}"
        tiles += html.tile(
            "Test loss", f"{nats:.3f} nats/token", uniform, in_bits, *_image_loss(found)
        )
        speed, mfu = found["train_tokens_per_second"], found["mfu"]
        tiles += html.tile(
            "Pretraining speed",
            "not timed" if speed is None else f"{speed:,.0f} tokens/s",
            "MFU: the devices' peak is unknown" if mfu is None else f"MFU {mfu:.1%}",
            *_goodput(found),
        )
    evaluations = results.series("pretrain", "validation_nats_per_token")
    if not evaluations:
        return Part("Training", tiles=tiles)
    figure = figures.Figure(html.SIZE, layout="constrained")
    loss, rate = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    html.line(loss, results.series("pretrain", "nats_per_token"), html.ORANGE, "training")
    html.line(loss, evaluations, html.BLUE, "validation")
    loss.axhline(math.log(v), color=html.QUIET, ls="--", lw=1, label=f"uniform, ln {v}")
    html.line(rate, results.series("pretrain", "learning_rate"), html.QUIET)
    rate.yaxis.set_major_locator(ticker.MaxNLocator(2))
    rate.yaxis.set_major_formatter("{x:g}")
    html.finish(loss, "loss, nats per token")
    html.finish(rate, "learning rate", "step")
    caption = "Pretraining. The training loss is that of single batches."
    return Part("Training", html.figure(html.png(figure), caption), tiles)


def _image_loss(found: dict) -> list[str]:
    """Bits per dimension of lossless tokens; the distortion of other tokens."""
    exact, psnr = found.get("test_bits_per_dimension"), found.get("test_distortion_psnr_db")
    if exact is not None:
        return [f"lossless tokens: {exact:.3f} bits/dimension"]
    if psnr is not None:
        return [f"tokens lose detail ({psnr:.2f} dB): not comparable with bits/dimension"]
    return []


def _goodput(found: dict) -> list[str]:
    share, restarts = found.get("goodput"), found.get("restarts")
    return [] if share is None else [f"goodput {share:.1%}, {restarts} restarts"]


def probe(results: Results) -> Part:
    """Accuracy by layer, as a table and as a plot, which probe/layers.png keeps."""
    title, summary = "Linear probe by layer", results.summary
    rows = files.read_json(results.folder / "probe" / "layers.json", [])
    if not rows or not results.finished("probe"):
        return Part(title)
    best, raw = summary["probe/best_layer"], summary["probe/raw_pixels_test_accuracy"]
    png = _layers_plot(rows, best, raw)
    files.replace(results.folder / "probe" / "layers.png", png)
    caption = "Layer 0 is the embeddings. Ringed: the layer chosen on validation."
    sgd = results.config.probe.method == "sgd"
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
    tile = html.tile(
        "Probe, test accuracy",
        f"{summary['probe/test_accuracy']:.2%}",
        f"raw pixels {raw:.2%}",
        f"random init {summary['probe/random_init_test_accuracy']:.2%}",
    )
    return Part(title, f'{html.figure(png, caption)}<div class="scroll">{table}</div>', tile)


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


def finetune(results: Results) -> Part:
    """Validation accuracy by step, pretrained and from scratch."""
    tiles, summary = "", results.summary
    if results.finished("finetune"):
        scratch = f"from scratch {summary['finetune/scratch_test_accuracy']:.2%}"
        accuracy = f"{summary['finetune/test_accuracy']:.2%}"
        tiles = html.tile("Fine-tuning, test accuracy", accuracy, scratch)
    tuned = results.series("finetune", "validation_accuracy")
    if not tuned:
        return Part("Training", tiles=tiles)
    scratch = results.series("finetune_scratch", "validation_accuracy")
    figure = figures.Figure(html.SIZE, layout="constrained")
    axes = figure.subplots()
    html.line(axes, tuned, html.BLUE, "pretrained", ring=summary.get("finetune/steps"))
    kept = summary.get("finetune/scratch_steps")
    html.line(axes, scratch, html.ORANGE, "from scratch", ring=kept)
    axes.yaxis.set_major_formatter(html.percent_tick)
    html.finish(axes, "validation accuracy", "step")
    caption = "Fine-tuning. Ringed: the step whose weights were kept."
    return Part("Training", html.figure(html.png(figure), caption), tiles)


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
    pictures = (_picture(results, name, caption) for name, caption in captions.items())
    return Part("Samples", "".join(pictures))


def _picture(results: Results, name: str, caption: str) -> str:
    path = results.folder / "samples" / f"{name}.png"
    return html.figure(path.read_bytes(), caption, "pixels") if path.exists() else ""
