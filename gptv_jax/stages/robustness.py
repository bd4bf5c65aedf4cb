"""Robustness: what corruptions of the test images, and changed tokens, do to the fine-tuned task.

Without fine-tuning, the accuracy of the probe is measured.

The stage runs where --stages names it, and then every time. Scores are kept on disk as they are
found, so that a stage that was stopped goes on. The seed and the numbers of the images decide all
that is random, so another call finds equal numbers.
"""

import json
import logging
from collections.abc import Callable

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files, hosts, sharding
from gptv_jax.config import fields
from gptv_jax.data import pipeline, sources, transforms
from gptv_jax.data.corruptions import STRENGTHS
from gptv_jax.runs import robustness as pages
from gptv_jax.runs.context import Context
from gptv_jax.stages import finetuned, probed
from gptv_jax.stages.finetuned import FineTuned
from gptv_jax.tasks import token_attack
from gptv_jax.tasks.token_attack import Attacked, Budget
from gptv_jax.train.metrics import Progress
from gptv_jax.train.step import on_mesh

LOG = logging.getLogger(__name__)
CLEAN = "clean"  # in place of a corruption: the images as they are
PREFIXES = "", "compared_"  # of the numbers of this run's network, and of the other one's
EXAMPLES, SHOWN = 2, 12  # test images whose corruptions, and whose attacks, are shown


def run_stage(context: Context) -> dict:
    """Writes robustness.json and the pictures, and returns the summary's numbers."""
    settings, folder = context.config.robustness, context.folder.path
    images = len(sources.open_source(context.config.data, "test"))
    counts = {"test_images": min(settings.images or images, images)}
    networks: list[FineTuned] = []
    if context.folder.finished("finetune"):
        networks = [finetuned.own(context)]
        if settings.compare:
            networks.append(finetuned.compared(context))
        metric = next(iter(context.task.primary))
        tables = _scores(context, networks, metric)
    else:
        LOG.info("robustness measures the probe, as there is no finished fine-tuning.")
        metric, tables = "probe_accuracy", [_scores_of_probe(context)]
    if jax.process_index() == 0:
        pages.save_corruptions(folder, *_examples(context))
    attacked: list[list[Attacked]] = [[]]
    if reason := _no_attack(context, networks):
        LOG.info("robustness leaves the attack on tokens out: %s.", reason)
    else:
        counts["attacked_images"] = min(settings.attack_images, images)
        found = [_attack(context, network) for network in networks]
        for table, (numbers, _) in zip(tables, found, strict=True):
            table["attack"] = numbers
        attacked = [parts for _, parts in found]
    if jax.process_index() == 0:
        shown = _fallen(attacked[0])
        pages.save_attacked(folder, context.codec, context.task.classes, shown)
    numbers = {
        f"{prefix}{name}": value
        for prefix, table in zip(PREFIXES, tables, strict=False)
        for name, value in summarised(table, metric).items()
    }
    about = {"metric": metric, **counts, "seed": context.config.seed}
    files.write_json(folder / pages.FILE, about | {"networks": tables})
    if jax.process_index() == 0:
        (folder / pages.UNFINISHED).unlink(missing_ok=True)
    return counts | numbers


def summarised(table: dict, metric: str) -> dict[str, float | None]:
    """The summary's numbers of a network's table in robustness.json.

    A corruption's number is the mean over its strengths; "mean" and "worst" are over all
    corruptions and strengths.
    """
    by_kind = table["corruptions"]
    every = [value for row in by_kind.values() for value in row]
    found = {CLEAN: table[CLEAN]} | {kind: _mean(row) for kind, row in by_kind.items()}
    found |= {"mean": _mean(every), "worst": None if None in every else min(every)}
    attack = table.get("attack", {})
    for way in ("attacked", "random", "searched"):
        found |= {f"{way}_{k}": x for k, x in enumerate(attack.get(way, [])) if k}
    named = {f"test_{metric}_{name}": value for name, value in found.items()}
    return named | {
        f"attack_{name}": attack[name] for name in ("calls_mean", "calls_most") if attack
    }


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _scores(context: Context, networks: list[FineTuned], metric: str) -> list[dict]:
    """A table for each network: the metric of clean images, and of every corruption's strengths."""
    settings = context.config.robustness
    known = sources.open_source(context.config.data, "test").annotations
    once, tables = _keeper(context, networks), []
    count = len(networks) * (1 + len(settings.corruptions) * STRENGTHS)
    progress, done = Progress("robustness", count, unit="pass"), 0
    for place, network in enumerate(networks):
        scored = network.task.metric(network.network, known)

        def measure(kind: str, strength: int, network=network, scored=scored) -> float | None:
            entries = () if kind == CLEAN else _corrupted(network.task.config, kind, strength)
            clips = context.config.finetune.clips
            batches = network.batches(settings.images, entries, clips)
            return scored.measure(network.params, batches)[metric]

        table = {"source": network.source, "step": network.step, "corruptions": {}}
        for kind in (CLEAN, *settings.corruptions):
            row = []
            for strength in (0,) if kind == CLEAN else range(1, STRENGTHS + 1):
                row.append(once(f"{place} {kind} {strength}", measure, kind, strength))
                done += 1
                progress.advance()
                progress.report(done, {f"{kind}_{strength}_{metric}": row[-1]})
            if kind == CLEAN:
                table[CLEAN] = row[0]
            else:
                table["corruptions"][kind] = row
        tables.append(table)
    progress.close()
    return tables


def _scores_of_probe(context: Context) -> dict:
    """As `_scores`, of the probe of a run without fine-tuning."""
    kinds, strengths = context.config.robustness.corruptions, range(1, STRENGTHS + 1)
    lists = {CLEAN: ()}
    lists |= {f"{k} {n}": _corrupted(context.config, k, n) for k in kinds for n in strengths}
    progress = Progress("robustness", len(lists), unit="pass")
    found = probed.scores(context, lists, progress.advance)
    progress.close()
    rows = {kind: [found[f"{kind} {n}"] for n in strengths] for kind in kinds}
    return {"source": str(context.folder.path), "step": None, CLEAN: found[CLEAN]} | {
        "corruptions": rows
    }


def _corrupted(config: config_lib.Config, kind: str, strength: int) -> tuple[str, ...]:
    """The transforms of evaluation with a corruption, for images as the configuration has them."""
    levels = config.tokens.levels if config.tokens.kind == "grey" else 256
    entries = config.data.eval_transforms
    return transforms.corrupted(entries, kind, strength, levels, config.seed)


def _keeper(context: Context, networks: list[FineTuned]) -> Callable:
    """`once(name, find, *arguments)`: `find(*arguments)`, or what an earlier start has found."""
    path = context.folder.path / pages.UNFINISHED
    settings = json.loads(json.dumps(fields.flatten(context.config)))
    # A file that was replaced may be of an equal step.
    weights = [[network.step, sharding.hash_params(network.params)] for network in networks]
    identity = [settings, weights]
    kept = hosts.from_first(lambda: files.read_json(path, {}))
    found = kept["found"] if kept.get("of") == identity else {}

    def once(name: str, find: Callable, *arguments):
        if name not in found:
            found[name] = find(*arguments)
            files.write_json(path, {"of": identity, "found": found})
        return found[name]

    return once


def _examples(context: Context) -> tuple[list, list]:
    """Labels and rows of pictures: test images as they are, then at every strength."""
    config, labels, rows = context.config.data, [], []

    def picture(index: int, entries: tuple[str, ...]) -> np.ndarray:
        image = pipeline.open_examples(config, "test", entries).record(index)["image"]
        shown = context.codec.picture(image[None])[0] if context.codec else image
        shown = shown if shown.ndim == 3 else shown[len(shown) // 2]  # of a clip
        return np.broadcast_to(shown, (*shown.shape[:2], 3))

    for index in range(min(EXAMPLES, len(sources.open_source(config, "test")))):
        plain = picture(index, config.eval_transforms)
        for kind in context.config.robustness.corruptions:
            lists = [_corrupted(context.config, kind, n) for n in range(1, STRENGTHS + 1)]
            labels.append(kind)
            rows.append([plain, *(picture(index, entries) for entries in lists)])
    return labels, rows


def _no_attack(context: Context, networks: list[FineTuned]) -> str:
    """Why there is no attack on tokens, or ""."""
    if not networks:
        return "there is no fine-tuned network"
    if not context.config.robustness.attack_tokens:
        return "config.robustness.attack_tokens is 0"
    if context.task.config.task.name != "classify":
        name = context.task.config.task.name
        return f"config.task.name={name}, and the attack is on the class of an image"
    return next(filter(None, (token_attack.check(each.network) for each in networks)), "")


def _attack(context: Context, network: FineTuned) -> tuple[dict, list[Attacked]]:
    """The numbers of the attack and its floors, and what the attack found, batch by batch."""
    settings, seed = context.config.robustness, jax.random.key(context.config.seed)
    budget = token_attack.budget_of(settings.attack_tokens, settings.attack_calls)
    ways = {
        "attacked": budget,
        "random": Budget(budget.tokens, 1, guided=False),
        # As many passes as the attack, without the gradient.
        "searched": Budget(budget.tokens, budget.calls_of_step, guided=False),
    }
    found: dict[str, list[Attacked]] = {way: [] for way in ways}
    count = min(settings.attack_images, len(sources.open_source(network.data.config, "test")))
    progress, done = Progress("robustness attack", count, unit="image"), 0
    for batch in on_mesh(network.batches(settings.attack_images)):
        for way, each in ways.items():
            made = token_attack.attack(network.network, network.params, batch, each, seed)
            found[way].append(made)
        done += int(made.mask.sum())
        progress.advance(int(made.mask.sum()))
        progress.report(done, {})
    progress.close()
    table = {"tokens": budget.tokens, "calls": budget.calls, "candidates": budget.candidates}
    for way, parts in found.items():
        fell = np.concatenate([part.fell[part.mask > 0] for part in parts])
        # After so many changes the class is right where it was not wrong before.
        table[way] = [float((fell > changes).mean()) for changes in range(budget.tokens + 1)]
    calls = np.concatenate([part.calls[part.mask > 0] for part in found["attacked"]])
    return table | {"calls_mean": float(calls.mean()), "calls_most": int(calls.max())}, found[
        "attacked"
    ]


def _fallen(parts: list[Attacked]) -> list[dict]:
    """The first images whose class the attack has changed, for `pages.save_attacked`."""
    rows = [
        dict(zip(Attacked._fields, row, strict=True))
        for part in parts
        for row in zip(*part, strict=True)
    ]
    return [r for r in rows if r["mask"] and r["given"] != r["label"] and r["fell"]][:SHOWN]
