"""The report's part of a distillation: the student beside its teacher, and without the teacher."""

from collections.abc import Callable

from gptv_jax.runs import html, pictures

WAYS = {  # of training, by the beginning of their numbers' names
    "": "with the teacher",
    "equal_steps_": "without the teacher, equal steps",
    "equal_time_": "without the teacher, equal time",
    "teacher_": "the teacher",
}
COMPARED = ("kl", "agreement")  # numbers of a split that compare the student with the teacher
COLORS = {"equal_steps": pictures.QUIET, "equal_time": pictures.INK}


def curves(series: Callable[[str, str], list], stage: str, key: str) -> list[tuple]:
    """Curves of the trainings without the teacher, for `pictures.plot`; empty without any.

    `series(training, key)` gives the points of a training's logged number.
    """
    found = ((series(f"{stage}_{way}", key), way) for way in COLORS)
    return [(p, COLORS[way], WAYS[f"{way}_"], "--") for p, way in found if p]


def table(found: dict, score: str) -> str:
    """A table of a stage's numbers with and without the teacher; "" where there is no teacher."""
    names = [f"test_{name}" for name in (score, *COMPARED)] + ["steps"]
    if f"teacher_{names[0]}" not in found:
        return ""
    rows = []
    for way, words in WAYS.items():
        known = (found.get(f"{way}{name}") for name in names)
        if way in ("", "teacher_") or f"{way}{names[0]}" in found:
            rows.append((words, *("" if v is None else html.number(v) for v in known)))
    head = ("", f"test {score.replace('_', ' ')}", "KL, nats", "agreement at 1", "steps")
    content = f'<div class="scroll">{html.table(head, rows)}</div>'
    for way in COLORS:
        if (closed := found.get(f"gap_closed_at_{way}")) is not None:
            line = f"Share of the gap to the teacher that is closed, at {way.replace('_', ' ')}"
            content += f"<small>{line}: {closed:.1%}.</small>"
    return content
