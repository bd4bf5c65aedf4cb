"""Parts of a page as HTML: figures, tables, tiles with a main number, and the page's style."""

import base64
from html import escape

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
.warning { border-left: 4px solid #d9822b; }
.mark { background: #3d85c633; font-weight: 600; }
"""


def figure(picture: bytes, caption: str, kind: str = "plot") -> str:
    """A PNG or WebP file with a caption; the kind "pixels" is enlarged without smoothing."""
    form = "webp" if picture.startswith(b"RIFF") else "png"
    source = f"data:image/{form};base64,{base64.b64encode(picture).decode()}"
    image = f'<img class="{kind}" src="{source}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def tile(title: str, value: str, *beside: str) -> str:
    """A main number above lines with numbers to compare it with."""
    lines = "".join(f"<small>{escape(line)}</small>" for line in beside)
    return f'<div class="box">{escape(title)}<br><b>{escape(value)}</b>{lines}</div>'


def table(head: tuple, rows: list[tuple], marked=()) -> str:
    """A table; rows whose first cell is in `marked` are highlighted."""
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        kind = "mark" if row[0] in marked else "plain"
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def number(value) -> str:
    """A number, or a text, of the summary as text."""
    if value is None or isinstance(value, str):
        return value or "unknown"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:#.4g}"
