"""What each part of the recipe is worth: small runs on CIFAR-10 that cost the same.

Command:   python -m benchmarks.ablations --data_dir=DIR [--seeds=0,1] [--only=base,rotary]
               [--steps=200] [--cores=0,1] [--folder=runs/ablations]

CIFAR-10 at 16x16 in 16 colours of its own (256 tokens an image), 6 layers of width 96, Muon, a rate
that is constant and falls at the end. Every variant changes the base by a few fields, which leave
what the products of a training cost nearly as it is (`adamw` lacks Muon's own); names joined by a
plus change it by all of theirs, `rotary+...` because what helps alone need not help what is best
alone. The exception is `width_*`, which show whether a learning rate carries over to a width four
times as large: with `base_width` the best of the three rates should be the same for both widths.

Each is the real command, `python -m gptv_jax.main --stages=pretrain`, in a folder of its own and on
a core of its own, some three minutes of it. The same command continues what was stopped, does not
repeat what has finished, and refuses a folder of other settings. DIR is TFDS's; its tokens are
cached once. Prints a table, and last its numbers as one JSON object, which is in
FOLDER/ablations.json as well.
"""

import argparse
import concurrent.futures
import json
import pathlib
import queue
import shutil
import statistics
import subprocess
import sys

from benchmarks import harness
from benchmarks.turns import ROOT

CONFIG = f"--config={ROOT / 'configs' / 'cifar10.py'}:tiny"
IMAGES = {
    "data.image_size": 16,
    "data.eval_transforms": ("decode()", "resize(16)"),
    "data.train_transforms": ("decode()", "resize(16)", "flip()"),
    "finetune.train_transforms": (),
    "tokens.colors": 16,
}
BASE = IMAGES | {
    "data.name": "tokens",
    "data.validation_split": "train[90%:90.4%]",
    "data.test_split": "test[:10%]",
    "model.layers": 6,
    "model.width": 96,
    "model.heads": 4,
    "model.axial_positions": False,
    "train.batch_size": 16,
    "train.eval_every": 0,
    "train.optimizer.learning_rate": 1e-2,
    "train.optimizer.warmup_steps": 20,
}
VARIANTS = {
    "base": {},
    "adamw": {"train.optimizer.name": "adamw", "train.optimizer.learning_rate": 3e-3},
    "axial_positions": {"model.axial_positions": True},
    "rotary": {"model.rotary": True},
    "rotary_alone": {"model.rotary": True, "model.learned_positions": False},
    "qk_norm": {"model.qk_norm": True},
    "swiglu": {"model.mlp": "swiglu"},
    "cosine": {"train.optimizer.schedule": "cosine"},
    "final_tenth": {"train.optimizer.final_fraction": 0.1},
    "ema": {"train.ema": 0.99},
}
NARROW, WIDE = 32, 128  # whose heads are of one size
RATES = (3e-3, 1e-2, 3e-2)
for _rate in RATES:
    _of = {"train.optimizer.learning_rate": _rate}
    _wide = _of | {"model.width": WIDE, "model.heads": 8}
    VARIANTS[f"width_{NARROW}_{_rate:g}"] = _of | {"model.width": NARROW, "model.heads": 2}
    VARIANTS[f"width_{WIDE}_{_rate:g}"] = _wide
    VARIANTS[f"width_{WIDE}_based_{_rate:g}"] = _wide | {"model.base_width": NARROW}
UPON = "rotary"  # the best of them, alone
JOINED = ["axial_positions", "qk_norm", "swiglu", "qk_norm+swiglu"]
NAMES = [*VARIANTS, *(f"{UPON}+{name}" for name in JOINED)]
NUMBERS = {
    "nats_per_token": "pretrain/test_nats_per_token",
    "tokens_per_second": "pretrain/train_tokens_per_second",
    "parameters": "model/params",
}


def main() -> None:
    """Runs the variants of --only, and prints the table and the JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "ablations")
    arguments = parser.parse_args()
    names, seeds = arguments.only.split(","), arguments.seeds.split(",")
    if unknown := {part for name in names for part in name.split("+")} - set(VARIANTS):
        parser.error(f"--only has {', '.join(unknown)}; it takes {', '.join(VARIANTS)}.")
    folder = arguments.folder.absolute()
    cache = cached_tokens(folder / "tokens", arguments.data_dir)
    common = BASE | {"data.path": str(cache), "train.steps": arguments.steps}
    settings = {
        folder / name / f"seed_{seed}": common | changes(name) | {"seed": seed}
        for seed in seeds
        for name in names
    }
    run_all(settings, arguments.cores.split(","))
    found = {n: [numbers_of(folder / n / f"seed_{seed}") for seed in seeds] for n in names}
    print(table(found, seeds))
    config = json.loads((next(folder.glob("*/seed_*")) / "config.json").read_text())
    result = {"steps": arguments.steps, "seeds": seeds, "versions": config["versions"]} | found
    (folder / "ablations.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


def changes(name: str) -> dict:
    """The fields that a variant changes; of several, if plus signs join their names."""
    return {k: v for part in name.split("+") for k, v in VARIANTS[part].items()}


def cached_tokens(folder: pathlib.Path, data_dir: str) -> pathlib.Path:
    """Returns the folder of the token cache, which is made first if it is not complete."""
    if not (folder / "header.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        prepare = [sys.executable, "-m", "gptv_jax.prepare", CONFIG, f"--out={folder}"]
        command = [*prepare, *flags(IMAGES | {"data.dir": data_dir})]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return folder


def flags(settings: dict) -> list[str]:
    """Settings as flags of the command line."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def run_all(
    settings: dict[pathlib.Path, dict],
    cores: list[str],
    config: str = CONFIG,
    stages: str = "pretrain",
) -> None:
    """Runs the commands in order, one on each core at a time; finished runs are not repeated.

    Args:
      settings: fields of the configuration of each run, by the run's folder.
      cores: numbers of the cores; an entry such as "0-1" has several.
      config: the flag that names the configuration.
      stages: of the commands.

    Raises:
      RuntimeError: a run failed; the message has the end of its log. Runs under way end first. Or
        a folder has a run of another number of steps, whose learning rate had another schedule.
      SystemExit: by SIGTERM, on which runs under way save and end.
    """
    for folder, run in settings.items():
        path = folder / "config.json"
        before = json.loads(path.read_text())["config"]["train.steps"] if path.exists() else None
        if before is not None and before != run.get("train.steps", before):
            problem = f"{folder} is of {before} steps, not {run['train.steps']}"
            raise RuntimeError(f"{problem}; take another --folder.")
    harness.end_by_sigterm()
    under_way = set()
    free = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def run(folder: pathlib.Path) -> None:
        core, log = free.get(), folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        main = [sys.executable, "-m", "gptv_jax.main", config, f"--stages={stages}"]
        command = ["taskset", "-c", core, *main, f"--workdir={folder}", *flags(settings[folder])]
        with open(log, "a") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        under_way.add(process)
        code = process.wait()
        under_way.remove(process)
        free.put(core)
        if code:
            raise RuntimeError(f"{folder} failed: {log.read_text()[-3000:]}")

    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        runs = {pool.submit(run, folder): folder for folder in settings}
        try:
            for done, each in enumerate(concurrent.futures.as_completed(runs), start=1):
                each.result()
                told = "/".join(runs[each].parts[-2:])
                print(f"{done} of {len(runs)}: {told}", file=sys.stderr, flush=True)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):  # asked to end
                for process in [*under_way]:
                    process.terminate()
            raise


def numbers_of(folder: pathlib.Path) -> dict:
    """The numbers `NUMBERS` of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary[key] for name, key in NUMBERS.items()}


def mean(runs: list[dict], name: str = "nats_per_token") -> float:
    """The mean of a number over the seeds' runs."""
    return statistics.mean(run[name] for run in runs)


def table(found: dict[str, list[dict]], seeds: list[str]) -> str:
    """The variants as a Markdown table."""
    heads = ["variant", "parameters", "nats per token"]
    heads += [*(f"seed {seed}" for seed in seeds), "against base", "tokens/s"]
    rows = [heads, ["---"] * len(heads)]
    for name, runs in found.items():
        against = f"{mean(runs) - mean(found['base']):+.4f}" if "base" in found else ""
        row = [name, f"{runs[0]['parameters']:,}", f"{mean(runs):.4f}"]
        row += [f"{run['nats_per_token']:.4f}" for run in runs]
        rows.append([*row, against, f"{mean(runs, 'tokens_per_second'):,.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
