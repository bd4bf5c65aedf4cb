"""Building blocks of the report: plots, tables, tiles, and the style of the page."""

import base64
import html
import io

from etils import epy

with epy.lazy_imports():  # heavy, and not needed before there is something to plot
    from matplotlib import figure as figures
    from matplotlib import ticker

# Plots are transparent, in tones that are readable on white and on black.
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


def plot(
    title: str, x_label: str, curves: list[tuple], level=(), *, percent=False, below=()
) -> bytes:
    """A plot of curves (the arguments of `_line` after the axes) as a PNG file.

    `level` is the y and the label of a dashed line; y is a share if `percent`; `below` is the title
    and the points of a low plot under the first one.
    """
    figure, ratios = figures.Figure(SIZE, layout="constrained"), (4, 1) if below else (1,)
    grid = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)
    axes, last = grid[0, 0], grid[-1, 0]
    for curve in curves:
        _line(axes, *curve)
    if level:
        axes.axhline(level[0], color=QUIET, ls="--", lw=1, label=level[1])
    if percent:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    if below:
        _line(last, below[1], QUIET)
        last.yaxis.set_major_locator(ticker.MaxNLocator(2))
        last.yaxis.set_major_formatter("{x:g}")
        _finish(last, below[0])
    _finish(axes, title)
    last.set_xlabel(x_label, fontsize=9, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return buffer.getvalue()


def _line(axes: "matplotlib.axes.Axes", points, color, label="", style="-", ring=None) -> None:
    """Draws one curve, with a ring around the point at x = `ring`."""
    if not points:
        return
    marker = "." if len(points) < 30 else None  # more of them would hide the line
    axes.plot(*zip(*points, strict=True), style, marker=marker, ms=4, lw=1.3, c=color, label=label)
    for x, y in points:
        if x == ring:
            axes.plot(x, y, "o", ms=10, mfc="none", mec=color)


def _finish(axes: "matplotlib.axes.Axes", title: str) -> None:
    """A light frame, whole numbers on x, y's meaning in the title, and a legend."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(axis="y", color=INK, alpha=0.2, lw=0.6)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def percent(share: float | None) -> str:
    """A share as a percentage for a table; "" for None."""
    return "" if share is None else f"{share:.2%}"


def section(title: str, content: str) -> str:
    """A section of the page under a heading; "" without content."""
    return f'<h2>{title}</h2><div class="row">{content}</div>' if content else ""


def figure(png: bytes, caption: str, kind: str = "plot") -> str:
    """A PNG file with a caption; the kind "pixels" is enlarged without smoothing."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f'<img class="{kind}" src="{source}" alt="{html.escape(caption)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def tile(title: str, value: str, *beside: str) -> str:
    """A main number above lines with numbers to compare it with."""
    lines = "".join(f"<small>{html.escape(line)}</small>" for line in beside)
    return f'<div class="box">{html.escape(title)}<br><b>{html.escape(value)}</b>{lines}</div>'


def table(head: tuple, rows: list[tuple], marked=()) -> str:
    """A table; rows whose first cell is in `marked` are highlighted."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        kind = "mark" if row[0] in marked else "plain"
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def number(value) -> str:
    """A number of the summary as text."""
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:#.4g}"
