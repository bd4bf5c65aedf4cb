"""What each lever of pretraining is worth: likelihood and features at equal FLOPs, on CIFAR-10.

Command:   python -m benchmarks.levers --data_dir=DIR [--seeds=0,1] [--only=base,pixels]
               [--steps=900] [--probe_images=5000] [--cores=0-1] [--tokenizer=RUN]
               [--folder=runs/levers] [--set=train.batch_size=32]

CIFAR-10 as 64 learned codes (`configs/tokenizer_cifar10.py:tiny`, without classes). The tokenizer
is trained once, or --tokenizer names a run that has one, and codes are made of augmented images
while the GPT trains. Every lever changes the base by a few fields. A lever that takes more FLOPs a
token takes fewer steps. Levers of `READINGS` are of the probe alone, and read the base's weights.

The columns: nats per code of the test images, which no lever of `READINGS` changes (with pixels in
place of codes as inputs, of each code given the pixels before); test accuracy of the linear probe
of the best layer and of three layers together; and two floors: random weights, pooled as the
trained weights are, and raw pixels. Each run is the real command in a separate folder. The
benchmark given again continues a run that was stopped, and does not repeat a finished run. Prints a
table, and last its numbers as one JSON object, which is in FOLDER/levers.json as well.
"""

import argparse
import ast
import json
import pathlib
import statistics

from benchmarks.ablations import run_all
from benchmarks.turns import ROOT
from gptv_jax import config as config_lib
from gptv_jax.config import fields, run_file
from gptv_jax.planning.training import Pretraining

FILE = f"{ROOT / 'configs' / 'tokenizer_cifar10.py'}:tiny"
BASE = {
    "model.class_tokens": 0,
    "model.learned_positions": True,  # as in the table of docs/results.md
    "train.eval_every": 0,
    "probe.refine": 2,
    "probe.concatenate": 3,
}
CROPPED = ("decode()", "random_crop(32, padding=4)", "flip()")  # of features_cifar10.py
RESIZED = ("decode()", "random_resized_crop(32, area=(0.35, 1.0))", "flip()")
COLOUR = ("brightness(0.4)", "contrast(0.4)", "color_balance(0.4)")
LEVERS = {
    "base": {},
    "unaugmented": {"data.train_transforms": ("decode()",)},
    "crops": {"data.train_transforms": CROPPED},
    "resized_crops_colour": {"data.train_transforms": (*RESIZED, *COLOUR)},
    "masked_inputs": {"model.context_masking": 0.5},
    "pixels": {"model.image_input": "pixels"},
}
SGD = {"probe.method": "sgd", "probe.sgd.steps": 400}
READINGS = {
    "quarters": {"probe.regions": 2},
    "whole": {"probe.attention": "whole"},
    "whole_quarters": {"probe.attention": "whole", "probe.regions": 2},
    "sgd": SGD,  # the mean by SGD, the baseline of `attentive`, which SGD alone fits
    "attentive": SGD | {"probe.pooling": "attentive"},
}
NUMBERS = {
    "nats": "pretrain/test_nats_per_token",
    "probe": "probe/test_accuracy",
    "three_layers": "probe/concatenated_test_accuracy",
    "random": "probe/random_init_test_accuracy",
    "raw_pixels": "probe/raw_pixels_test_accuracy",
    "steps": "pretrain/steps",
    "tokens_per_second": "pretrain/train_tokens_per_second",
}


def main() -> None:
    """Runs the levers of --only, and prints the table and the JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", default=",".join((*LEVERS, *READINGS)))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--probe_images", type=int, default=5000)
    parser.add_argument("--cores", default="0-1")
    parser.add_argument("--tokenizer", type=pathlib.Path)
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "levers")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    given = parser.parse_args()
    names, seeds = given.only.split(","), given.seeds.split(",")
    joined = {part for name in names if name not in READINGS for part in name.split("+")}
    if unknown := joined - {*LEVERS}:
        parser.error(
            f"--only has {', '.join(unknown)}; it takes {', '.join(READINGS)}, and "
            f"{', '.join(LEVERS)}, of which plus signs join several."
        )
    folder, cores = given.folder.absolute(), given.cores.split(",")
    common = {"data.dir": given.data_dir, "probe.train_images": given.probe_images}
    common |= {name: value_of(text) for name, text in (each.split("=", 1) for each in given.set)}
    tokenizer = given.tokenizer and given.tokenizer.absolute()
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        run_all({tokenizer: common}, cores, f"--config={FILE}", "tokenizer")
    common |= {"tokens.tokenizer": str(tokenizer), "train.steps": given.steps}
    trained = ["base"] * any(name in READINGS for name in names)
    trained += [name for name in names if name not in READINGS and name not in trained]
    runs = {(name, seed): settings_of(name, common, seed) for seed in seeds for name in trained}
    run_all({place(folder, *run): each for run, each in runs.items()}, cores,
            f"--config={FILE}", "pretrain,probe")  # fmt: skip
    read = {
        place(folder, name, seed): settings_of("base", common, seed)
        | READINGS[name]
        | {"init_from": str(place(folder, "base", seed))}
        for seed in seeds
        for name in names
        if name in READINGS
    }
    run_all(read, cores, f"--config={FILE}", "probe")
    found = {n: [numbers_of(place(folder, n, seed)) for seed in seeds] for n in names}
    print(table(found))
    versions = json.loads((place(folder, trained[0], seeds[0]) / "config.json").read_text())
    result = {"seeds": seeds, "versions": versions["versions"]} | found
    (folder / "levers.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


def value_of(text: str) -> object:
    """A field's value as a flag says it: 2, 0.5, True, (2, 2), or a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def place(folder: pathlib.Path, name: str, seed: str) -> pathlib.Path:
    """The folder of a run."""
    return folder / name / f"seed_{seed}"


def settings_of(name: str, common: dict, seed: str) -> dict:
    """The fields of a lever's run, or of several that plus signs join, with the steps it takes."""
    changes = {k: v for part in name.split("+") for k, v in LEVERS[part].items()}
    settings = BASE | common | changes | {"seed": seed}
    plain = BASE | {k: v for k, v in common.items() if k.startswith("model.")}
    of_base, own = (token_flops(each) for each in (plain, plain | changes))
    return settings | {"train.steps": round(common["train.steps"] * of_base / own)}


def token_flops(changes: dict) -> int:
    """FLOPs of training on one token, see `flops.training`."""
    settings = run_file.load(FILE)
    settings.update_from_flattened_dict(changes)
    config = fields.from_dict(config_lib.Config, settings, "config")
    return Pretraining(config, ()).flops.total


def numbers_of(folder: pathlib.Path) -> dict:
    """The numbers `NUMBERS` of a finished run; None where its stages do not measure one."""
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary.get(key) for name, key in NUMBERS.items()}


def table(found: dict[str, list[dict]]) -> str:
    """The levers as a Markdown table: means over the seeds, with each seed's number after them."""
    heads = ["lever", "steps", "nats per code", "probe", "three layers", "random weights", "pixels"]
    rows = [heads, ["---"] * len(heads)]
    for name, runs in found.items():
        steps = runs[0]["steps"]
        rows.append([name, "" if steps is None else str(steps)])
        rows[-1] += [shown(runs, n) for n in ("nats", "probe", "three_layers", "random", "pixels")]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(runs: list[dict], name: str) -> str:
    """A number's mean over runs, and the numbers themselves."""
    values = [run[name] for run in runs if run[name] is not None]
    if not values:
        return ""
    each = f" ({', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{each}"


if __name__ == "__main__":
    main()
