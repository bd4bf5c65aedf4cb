"""The reference runs on CIFAR-10 for a machine with a GPU that is lent for minutes at a time.

Command: python -m benchmarks.reference_runs --cache=caches/cifar10 [--runs=10m,10m_modern]
             [--limit=570] [--out=runs/reference] [--config.a.b=value ...]

Each is the real command, `python -m gptv_jax.main --config=configs/cifar10.py:RUN` with the stages
pretrain, probe and finetune, on a token cache of `python -m gptv_jax.prepare`. When the time is
nearly over the command is stopped by SIGTERM, on which it saves; a SIGTERM to this process does the
same. The exit code is then 143, and the same command continues. When all are done their numbers are
printed beside the published ones and their floors, and written to OUT/reference.json and
OUT/reference.md.
--miniature does all of it in about a minute on a CPU: a tiny network on scikit-learn's digits,
whose numbers mean nothing.
"""

import argparse
import json
import math
import pathlib
import runpy
import shlex
import signal
import subprocess
import sys
import time

from benchmarks import harness
from benchmarks.turns import ROOT
from gptv_jax.hosts import stopping

POLL = 0.1  # seconds between two looks at a run
STAGES = ("pretrain", "probe", "finetune")
# Published: minGPT (Karpathy 2020, play_image.ipynb), whose palette differs from ours; and an Image
# GPT of yourauroral/mdl-deep-image-compression, pretrained on CIFAR-10 alone.
PUBLISHED = {
    "pretrain/test_nats_per_token": "2.0378 (minGPT, 16 of 20 epochs)",
    "probe/test_accuracy": "0.669 (24 layers, width 512, 50 epochs)",
    "probe/raw_pixels_test_accuracy": "about 0.40",
}
KEYS = (
    "model/params",
    "pretrain/steps",
    "pretrain/test_nats_per_token",
    "pretrain/train_tokens_per_second",
    "pretrain/mfu",
    "probe/best_layer",
    "probe/test_accuracy",
    "probe/raw_pixels_test_accuracy",
    "probe/random_init_test_accuracy",
    "finetune/test_accuracy",
    "finetune/scratch_test_accuracy",
)
MINIATURE = {
    "data.image_size": 8,
    "data.train_split": "train",
    "data.validation_split": "validation",
    "data.train_transforms": (),
    "data.eval_transforms": (),
    "finetune.train_transforms": (),
    "tokens.kind": "grey",
    "tokens.levels": 17,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.dtype": "float32",
    "train.steps": 60,
    "train.batch_size": 16,
    "train.eval_every": 30,
    "train.checkpoint_every": 10,
    "train.optimizer.warmup_steps": 5,
    "finetune.train.steps": 20,
    "finetune.train.batch_size": 16,
    "finetune.train.eval_every": 10,
    "finetune.train.checkpoint_every": 10,
    "finetune.train.optimizer.warmup_steps": 5,
}


def command(name: str, folder: pathlib.Path, cache: pathlib.Path, settings: list[str]) -> list[str]:
    """The command of a run."""
    data = ["--config.data.name=tokens", f"--config.data.path={cache}"]
    config = [f"--config={ROOT / 'configs' / 'cifar10.py'}:{name}", f"--workdir={folder}"]
    module = [sys.executable, "-m", "gptv_jax.main"]
    return [*module, *config, f"--stages={','.join(STAGES)}", *data, *settings]


def advance(command: list[str], deadline: float, reserve: float, asked: list) -> bool:
    """Runs a command until it has finished or must stop; returns whether it has finished.

    Args:
      command: the command and its flags.
      deadline: time when the command gets SIGTERM, in seconds of `time.monotonic`.
      reserve: seconds that the command then has to save and end.
      asked: a list that is not empty after this process itself got SIGTERM.

    Raises:
      SystemExit: the command failed.
    """
    if asked or time.monotonic() >= deadline:
        return False
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None and not asked and time.monotonic() < deadline:
        time.sleep(POLL)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(reserve)
    except subprocess.TimeoutExpired:
        process.kill()  # what was saved before stays
        code = process.wait()
    if code not in (0, stopping.STOPPED, -signal.SIGTERM, -signal.SIGKILL):
        sys.exit(code)
    return code == 0


def progress(folder: pathlib.Path) -> list[str]:
    """Checkpoints and numbers of finished stages, from which the progress of a run is seen."""
    steps = sorted(str(path.relative_to(folder)) for path in folder.glob("checkpoints/*/[0-9]*"))
    return [*steps, *summary(folder)]


def summary(folder: pathlib.Path) -> dict:
    """The numbers of a run's finished stages."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def result(folder: pathlib.Path) -> dict[str, float | int | None]:
    """The numbers `KEYS` of a run, the loss of a uniform guess, and the seed."""
    config = json.loads((folder / "config.json").read_text())["config"]
    palette = config["tokens.kind"] == "palette"
    uniform = math.log(config["tokens.colors" if palette else "tokens.levels"])
    found = summary(folder)
    numbers = {key: found.get(key) for key in KEYS}
    return numbers | {"uniform_nats_per_token": uniform, "seed": config["seed"]}


def table(runs: dict[str, dict], published: dict[str, str]) -> str:
    """A Markdown table of the runs' numbers and the published numbers."""
    lines = [f"| | {' | '.join(runs)} | published |", "|---" * (len(runs) + 2) + "|"]
    for key in next(iter(runs.values())):
        cells = [
            f"{v:.4f}" if isinstance(v := run[key], float) else str(v) for run in runs.values()
        ]
        lines.append(f"| `{key}` | {' | '.join(cells)} | {published.get(key, '')} |")
    return "\n".join(lines)


def main() -> None:
    """Advances the runs as far as the time allows.

    Raises:
      SystemExit: with code 143 if the same command must be given again.
    """
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, help="folder with CIFAR-10's tokens")
    parser.add_argument("--runs", default="10m,10m_modern", help="sizes of cifar10.py, by commas")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/reference"))
    parser.add_argument("--limit", type=float, default=570, help="seconds that this command has")
    parser.add_argument("--reserve", type=float, default=30, help="seconds of them to save in")
    parser.add_argument("--miniature", action="store_true", help="a tiny network, on digits")
    arguments, settings = parser.parse_known_args()
    out, cache, reserve = arguments.out.absolute(), arguments.cache, arguments.reserve
    names, deadline = arguments.runs.split(","), begin + arguments.limit - reserve
    foreign = [setting for setting in settings if not setting.startswith("--config.")]
    if foreign or not (cache or arguments.miniature):
        parser.error(f"unknown: {' '.join(foreign)}" if foreign else "--cache must be given")
    sizes = runpy.run_path(str(ROOT / "configs" / "cifar10.py"))["SIZES"]
    if unknown := [name for name in names if name not in sizes]:
        parser.error(f"--runs has {', '.join(unknown)}; it takes some of {', '.join(sizes)}")
    if arguments.limit <= reserve:
        parser.error(f"--limit={arguments.limit:g} must be more than --reserve={reserve:g}")
    if arguments.miniature:
        cache = cache or out / "cache"
        settings = [*(f"--config.{k}={v}" for k, v in MINIATURE.items()), *settings]
        if not (cache / "header.json").exists():
            prepare = [sys.executable, "-m", "gptv_jax.prepare", f"--out={cache}"]
            subprocess.run([*prepare, f"--config={ROOT / 'configs' / 'digits.py'}"], check=True)
    before, asked = [progress(out / name) for name in names], []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    for name in names:
        told = command(name, out / name, cache.absolute(), settings)
        if not advance(told, deadline, reserve, asked):
            if not asked and [progress(out / name) for name in names] == before:
                sys.exit(f"{out / name} came no further in its time; give a longer --limit.")
            print(f"{name} is not done; the same command continues.", file=sys.stderr)
            sys.exit(stopping.STOPPED)
    runs = {name: result(out / name) for name in names}
    published = {} if arguments.miniature else PUBLISHED
    given = ["python", "-m", "benchmarks.reference_runs", *sys.argv[1:]]
    about = {"benchmark": "reference_runs", "command": shlex.join(given)} | harness.facts()
    found = about | {"runs": runs, "published": published}
    text = f"{harness.told(given, about)}\n\n{table(runs, published)}"
    harness.write_json(out / "reference.json", found)
    (out / "reference.md").write_text(text + "\n")
    print(text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
