"""What a teacher's cached targets lose, and what they cost, beside the teacher in memory.

Command: python -m benchmarks.cached_teacher [--run=RUN] [--images=512] [--steps=1000] [--seeds=2]

The first rows are the speed of a train step of a student: without a teacher, with a teacher of
about four times the parameters in memory, and with N ids a position from a token cache.

With a run folder, whose network is the teacher, further rows compare the targets of test images:
the k most likely ids with their probabilities, made to add up to 1 (top k); N independent draws;
and N draws of `decode/teacher_sampling.py`, as `gptv_jax.prepare --teacher` makes them.

- bytes: of an image's targets, deflated; probabilities take two bytes.
- bias: mean over positions of KL(mean target || teacher), the mean over DRAWS draws, in thousandths
  of a nat. Of unbiased targets it is not 0, because a mean of DRAWS draws has an error of chance.
- gradient: of a student's head at random weights, the error of the gradient of the mean target,
  in percent of the gradient's length; noise: the same of a single draw.
- overconfidence: mean probability of the most likely id of the mean target, minus the share of
  positions whose token is this id, in percent.
- missing: share of the tokens to which the mean target gives no probability, in percent.

Last, a student of about a quarter of the teacher's parameters is trained for --steps steps on each
kind of targets of --images training images, drawn once, as in a cache: on test images its nats per
token, KL from the teacher, and overconfidence. All students see equal batches.
"""

import dataclasses
import functools
import pathlib
import sys
import zlib
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import harness
from benchmarks.sizes import QUICK, Case, Size
from benchmarks.turns import Contender, compare
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data import pipeline
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.teacher_draws import Draws, Packing
from gptv_jax.decode import teacher_sampling
from gptv_jax.model.gpt import Network
from gptv_jax.runs import record
from gptv_jax.train import cached_distillation, step
from gptv_jax.train.optimizer import make_optimizer
from gptv_jax.weights import native

SAMPLES = (8, 32)  # N, of the train steps
KINDS = [(kind, n) for n in (4, 8, 16, 32) for kind in ("top", "independent", "drawn")]
TAUGHT = (4, 8, 32)  # k and N of the students
DRAWS = 256  # of which the mean target is the mean
POSITIONS = 4096  # whose targets are compared
BATCH = 32
OPTIMIZER = config_lib.Optimizer(name="adamw", learning_rate=3e-3, warmup_steps=50)
# Of the sizes of cifar10.py:tiny on 16 x 16 images, and a student of a quarter of the parameters.
TEACHER = Size(width=128, layers=6, heads=4, tokens=256, vocabulary=512)
STUDENT = Size(width=64, layers=6, heads=2, tokens=256, vocabulary=512)


@dataclasses.dataclass(frozen=True)
class Targets:
    """The targets and the students of the teacher --run."""

    def __str__(self) -> str:
        return "targets"


def cases(platform: str) -> list[Case | Targets]:
    """The cases of every platform."""
    del platform
    return [Case(STUDENT, 16), Targets()]


def measure(case: Case | Targets, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    if isinstance(case, Case):
        return steps(case, arguments)
    if not arguments.run:
        return []
    return of_run(pathlib.Path(arguments.run), arguments)


def steps(case: Case, arguments) -> list[dict]:
    """Measures the train steps of a student of this size."""
    teacher = dataclasses.asdict(TEACHER if case.size == STUDENT else case.size)
    kinds = {"no teacher": {}, "teacher in memory": {"teacher": teacher}}
    kinds |= {f"cached, N = {n}": {"samples": n} for n in SAMPLES}
    contenders = [
        Contender(name, "benchmarks.ours:distill", case.asdict() | more)
        for name, more in kinds.items()
    ]
    found = compare(contenders, arguments)
    work = case.batch * case.size.tokens
    return harness.rows(f"train step, {case}", found, work, "tokens", "no teacher")


class Images(NamedTuple):
    """Tokens of images, and the teacher's distributions at their positions."""

    tokens: np.ndarray  # int32 [B, T]
    likely: np.ndarray  # float32 [B, T, V]


def of_run(folder: pathlib.Path, arguments) -> list[dict]:
    """The rows of a teacher in a run folder."""
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(data=1))):
        config = record.config_of(folder)
        found, params = native.read_run(folder, "pretrain")
        sets = {}
        for split in ("train", "test"):
            log = DamageLog(config.data, None)
            records = pipeline.images(config.data, split, log, arguments.images)
            chunks = pipeline.tokenized(found.codec, records)
            tokens = np.stack([each["tokens"] for chunk in chunks for each in chunk])
            sets[split] = Images(tokens, distributions(found.network, params, tokens))
        return [
            *compared(f"targets of {folder.name}", sets["test"]),
            *trained(student_of(found.network), sets, arguments.steps, arguments.seeds),
        ]


def student_of(teacher: Network) -> Network:
    """A network of about a quarter of the parameters: half the width and half the heads."""
    model = teacher.config
    small = {"width": model.width // 2, "heads": max(model.heads // 2, 1)}
    return dataclasses.replace(teacher, config=dataclasses.replace(model, **small))


def distributions(network: Network, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Float32 [B, T, V]."""
    read = _reader(network)
    full = np.resize(tokens, (-(-len(tokens) // BATCH) * BATCH, tokens.shape[1]))
    found = [np.asarray(read(params, part)) for part in full.reshape(-1, BATCH, full.shape[1])]
    return np.concatenate(found)[: len(tokens)]


@functools.cache  # the students share the compiled program
def _reader(network: Network):
    return jax.jit(lambda p, tokens: jax.nn.softmax(network.bind(p)(tokens).logits, axis=-1))


def target(kind: str, n: int, likely: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The target of one cache, float32 [..., V]; `likely` are the teacher's distributions."""
    if kind == "top":
        least = np.sort(likely, axis=-1)[..., -min(n, likely.shape[-1])][..., None]
        kept = np.where(likely >= least, likely, 0)
        return kept / kept.sum(axis=-1, keepdims=True)
    if kind == "independent":
        exact = likely.astype(np.float64)
        counts = rng.multinomial(n, exact / exact.sum(axis=-1, keepdims=True))
    else:
        offset = rng.random(likely.shape[:-1], np.float32)
        ids = np.asarray(_systematic(likely, offset, n))
        counts = np.zeros(likely.shape, np.int64)
        rows = np.indices(ids.shape)[:-1]
        np.add.at(counts, (*rows, ids), 1)
    return (counts / n).astype(np.float32)


_systematic = jax.jit(teacher_sampling.systematic, static_argnums=2)


def bytes_of(kind: str, n: int, one: np.ndarray) -> float:
    """Deflated bytes of an image's target [B, T, V], on average."""
    sizes = []
    for image in one:
        ids = [np.flatnonzero(position) for position in image]
        shares = [position[each] for position, each in zip(image, ids, strict=True)]
        flat, distinct = np.concatenate(ids), np.array([len(each) for each in ids])
        counts = np.rint(np.concatenate(shares) * n).astype(np.int64)
        packing = Packing(len(image), image.shape[-1], n)
        field, content = packing.split(Draws(distinct, flat, counts))
        if kind == "top":  # every position has k ids, and probabilities
            content = flat.astype(packing.types[1]).tobytes()
            content += np.concatenate(shares).astype(np.float16).tobytes()
        else:
            content += next(iter(field.values())).astype(packing.types[0]).tobytes()
        sizes.append(len(zlib.compress(content, 9, -zlib.MAX_WBITS)))
    return float(np.mean(sizes))


def compared(case: str, images: Images) -> list[dict]:
    """A row for the teacher, and for every kind of target."""
    vocabulary = images.likely.shape[-1]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(images.tokens.size)[:POSITIONS]
    likely = images.likely.reshape(-1, vocabulary)[chosen]
    tokens = images.tokens.ravel()[chosen]
    features = rng.normal(size=(len(chosen), 32)).astype(np.float32)

    def gradient(target: np.ndarray) -> np.ndarray:
        return (1 / vocabulary - target).T @ features  # at zero weights all ids are equally likely

    exact = gradient(likely)

    def error(found: np.ndarray) -> float:
        return float(100 * np.linalg.norm(found - exact) / np.linalg.norm(exact))

    rows = [{"case": case, "contender": "teacher", "overconfidence": confidence(likely, tokens)}]
    for kind, n in KINDS:
        if n > vocabulary and kind == "top":
            continue
        mean = one = target(kind, n, likely, rng)
        if kind != "top":
            total = one.astype(np.float64)
            for _ in range(DRAWS - 1):
                total += target(kind, n, likely, rng)
            mean = total / DRAWS
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.where(mean > 0, mean * np.log(mean / likely), 0)
        row = {
            "bytes": round(bytes_of(kind, n, target(kind, n, images.likely[:32], rng))),
            "bias": float(1000 * each.sum(axis=-1).mean()),
            "gradient": error(gradient(mean)),
            "noise": error(gradient(one)),
            "overconfidence": confidence(mean, tokens),
            "missing": float(100 * np.mean(mean[np.arange(len(tokens)), tokens] == 0)),
        }
        rows.append({"case": case, "contender": f"{kind} {n}", **row})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def confidence(likely: np.ndarray, tokens: np.ndarray) -> float:
    """Mean largest probability minus the share of tokens that are the most likely, in percent."""
    right = np.argmax(likely, axis=-1) == tokens
    return float(100 * (likely.max(axis=-1).mean() - right.mean()))


def trained(student: Network, sets: dict[str, Images], count: int, seeds: int) -> list[dict]:
    """A row for a student of every kind of target, means over the seeds."""
    train, test = sets["train"], sets["test"]
    chosen = [("data alone", 0, 0.0, 1.0), ("teacher in memory", 0, 1.0, 0.0)]
    chosen += [
        (kind, n, 1.0, 0.0) for kind, n in KINDS if n in (4, 8, 32) and kind != "independent"
    ]
    rows = []
    for kind, n, weight, data_weight in chosen:
        name, found = f"{kind} {n}" if n else kind, []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            taught = target(kind, n, train.likely, rng) if n else train.likely
            params = fit(student, train.tokens, taught, count, seed, (weight, data_weight))
            likely = distributions(student, params, test.tokens)
            own = np.take_along_axis(likely, test.tokens[..., None], axis=-1)
            kl = (test.likely * (np.log(test.likely + 1e-30) - np.log(likely + 1e-30))).sum(-1)
            numbers = -np.log(own + 1e-30).mean(), kl.mean()
            flat = likely.reshape(-1, likely.shape[-1]), test.tokens.ravel()
            found.append((*numbers, confidence(*flat)))
        nats, kl, over = np.mean(found, axis=0)
        row = {"nats": f"{nats:.4f}", "kl": f"{kl:.4f}", "overconfidence": float(over)}
        rows.append({"case": f"student after {count} steps", "contender": name, **row})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


@functools.cache  # the students share the compiled step
def _training(student: Network, count: int, weight: float, data_weight: float):
    """The initial state by key, and the train step."""
    settings = config_lib.Distill(cached=True, weight=weight, data_weight=data_weight)
    optimizer, rate = make_optimizer(OPTIMIZER, count)
    loss = cached_distillation.make_loss(student, settings, count)
    init = jax.jit(step.make_init(student, optimizer))
    return init, step.make_train_step(loss, optimizer, rate)


def fit(
    student: Network,
    tokens: np.ndarray,
    taught: np.ndarray,
    count: int,
    seed: int,
    weights: tuple[float, float],
) -> dict:
    """Weights of a student of these targets [B, T, V], which are its counts of all ids."""
    init, train_step = _training(student, count, *weights)
    state, rng = init(jax.random.key(seed)), np.random.default_rng(seed)
    ids = np.arange(taught.shape[-1], dtype=np.uint16)
    for _ in range(count):
        rows = rng.integers(len(tokens), size=BATCH)
        batch = {"tokens": tokens[rows], "teacher_counts": taught[rows]}
        batch["teacher_ids"] = np.broadcast_to(ids, batch["teacher_counts"].shape)
        state, _ = train_step(state, sharding.global_batch(batch))
    return state["params"]


if __name__ == "__main__":
    flags = {
        "--run": {"help": "run folder of the teacher"},
        "--images": {"type": harness.positive, "default": 512, "help": "of each split"},
        "--steps": {"type": harness.positive, "default": 1000, "help": "of a student"},
        "--seeds": {"type": harness.positive, "default": 2, "help": "of the students"},
    }
    harness.main("cached_teacher", __doc__, cases, measure, quick=[QUICK], flags=flags)
