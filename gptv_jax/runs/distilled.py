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
ORIGINS = {  # what fine-tuning without the teacher begins with, by the summary's name
    "pretrain_equal_steps": "the weights of pretrain_equal_steps, pretraining without the teacher",
    "distilled pretrain": "this run's pretraining, which had a teacher: the rows isolate the "
    "teacher of fine-tuning",
    "pretrain": "this run's pretraining, which had no teacher",
    "init_from": "the weights of config.init_from, as the row with the teacher does",
    "random weights": "random weights, as the row with the teacher does",
}
COLORS = {"equal_steps": pictures.QUIET, "equal_time": pictures.INK}


def curves(series: Callable[[str, str], list], stage: str, key: str) -> list[tuple]:
    """Curves of the trainings without the teacher, for `pictures.plot`; empty without any.

    `series(training, key)` gives the points of a training's logged number.
    """
    found = ((series(f"{stage}_{way}", key), way) for way in COLORS)
    return [(p, COLORS[way], WAYS[f"{way}_"], "--") for p, way in found if p]


def table(found: dict, score: str) -> str:
    """A table of a stage's numbers with and without the teacher; "" where there is no teacher."""
    scores = [n for n in (score, "class_nats") if f"teacher_test_{n}" in found]
    if not scores:
        return ""
    rows = []
    for way, words in WAYS.items():
        names = [f"{way}test_{name}" for name in (*scores, *COMPARED)]
        if way in ("", "teacher_") or names[0] in found:
            # "steps" are those to the weights that were kept, "steps_taken" all of the student's.
            own = ["steps_taken" if "steps_taken" in found else "steps", "training_seconds"]
            names += own if way == "" else [f"{way}steps", f"{way}seconds"]
            known = map(found.get, names)
            rows.append((words, *("" if v is None else html.number(v) for v in known)))
    titles = [f"test {name.replace('_', ' ')}" for name in scores]
    head = ("", *titles, "KL, nats", "agreement at 1", "steps taken", "seconds of steps")
    content = f'<div class="scroll">{html.table(head, rows)}</div>'
    if begun := found.get("without_teacher_begins_with"):
        content += f"<small>Fine-tuning without the teacher begins with {ORIGINS[begun]}.</small>"
    for way in COLORS:
        if (closed := found.get(f"gap_closed_at_{way}")) is not None:
            line = f"Share of the gap to the teacher that is closed, at {way.replace('_', ' ')}"
            content += f"<small>{line}: {closed:.1%}.</small>"
    return content
