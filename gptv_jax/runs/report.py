"""The one-page report of a run: a page around the parts that its stages make."""

import dataclasses
import datetime
import pathlib
from collections.abc import Callable, Iterable
from html import escape

import jax

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.runs import html
from gptv_jax.runs.context import Context
from gptv_jax.runs.record import has_finished


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run has written so far."""

    config: config_lib.Config
    folder: pathlib.Path
    summary: dict
    events: list[dict]  # of metrics.jsonl

    def finished(self, stage: str) -> bool:
        return has_finished(self.summary, stage)

    def series(self, stage: str, key: str) -> list[tuple]:
        """The (step, value) pairs that a stage logged under a key."""
        return [(e["step"], e[key]) for e in self.events if e["stage"] == stage and key in e]


@dataclasses.dataclass(frozen=True)
class Part:
    """A stage's part of the report, in HTML; parts with the same title share a section."""

    title: str
    content: str = ""  # "": the stage has nothing to show yet
    tiles: str = ""  # its main numbers, at the top of the page


def write(context: Context, reports: Iterable[Callable[[Results], Part]]) -> None:
    """Writes report.html, on process 0 alone; each report makes the part of one stage."""
    if jax.process_index() != 0:
        return
    config, folder = context.config, context.folder.path
    results = Results(config, folder, context.folder.summary(), context.log.read())
    parts, sections = [report(results) for report in reports], {}
    for part in parts:
        sections[part.title] = sections.get(part.title, "") + part.content
    title, newline = _title(results), "\n"
    numbers = [(name, html.number(value)) for name, value in results.summary.items()]
    content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} ({escape(folder.name)})</title><style>{html.STYLE}</style></head>
<body><h1>{title}</h1>{_origin(folder)}
<div class="tiles">{"".join(part.tiles for part in parts)}</div>
{newline.join(html.section(*section) for section in sections.items())}
<div class="row"><div><h2>All numbers</h2>{html.table(("name", "value"), numbers)}</div>
<div><h2>Configuration</h2>{_configuration(config)}</div></div></body></html>
"""
    files.replace(folder / "report.html", content.encode())


def _title(results: Results) -> str:
    config, parts = results.config, [results.config.data.name]
    if "model/params" in results.summary:  # absent where another run did the pretraining
        parts.append(f"{results.summary['model/params']:,} parameters")
    parts += [f"{config.model.layers} layers", f"width {config.model.width}"]
    return escape(", ".join(parts))


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
    table = html.table(("field", "value"), list(flat.items()), marked=changed)
    summary = "All fields; marked fields differ from their defaults"
    return f"<details><summary>{summary}</summary>{table}</details>"
