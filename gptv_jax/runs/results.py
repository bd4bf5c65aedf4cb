"""What a run has written so far, as the parts of the report read it."""

import dataclasses
import functools
import pathlib

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.runs import accuracy, html

Part = tuple[str, str]  # content and tiles


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
        events = (e for e in self.events if e["stage"] == stage and e.get(key) is not None)
        return [(e["step"], e[key]) for e in events]

    @functools.cached_property
    def record(self) -> dict:
        """config.json, with the "images" of each split and the "classes", names or their number."""
        return files.read_json(self.folder / "config.json", {})

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where classes have no names."""
        classes = self.record.get("classes")
        named = isinstance(classes, list) and label < len(classes)
        return classes[label] if named else str(label)

    def share(self, stage: str, name: str) -> str:
        """An accuracy of the summary, with its standard error where the images were counted."""
        numbers = self.numbers(stage)
        return accuracy.share(numbers[name], accuracy.images_of(name, numbers))

    def picture(self, name: str, caption: str) -> str:
        """A picture of samples/ and its animation, where they are there."""
        paths = (self.folder / "samples" / f"{name}{end}" for end in (".webp", ".png"))
        return "".join(html.figure(p.read_bytes(), caption, "pixels") for p in paths if p.exists())
