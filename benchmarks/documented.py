"""The documented numbers of the small runs, and by how much a new run may differ from each.

`python -m benchmarks.verify` compares new runs with these numbers, and `python -m benchmarks.verify
--documented` prints the table of docs/results.md. A test holds the tables and texts of
docs/results.md and README to the numbers here.

How far a new run may be off (`Number.spread`) is, in this order:

- three standard deviations of the documented runs of several seeds or machines;
- of one run, a share of the test set: three standard errors of its size;
- of one run, anything else: assumed, from runs like it;
- of floors and ceilings, which no training changes: rounding.
"""

import dataclasses
import math
import statistics

DEVIATIONS = 3  # standard deviations or standard errors
ROUNDING = 0.0051  # of numbers that no training changes: two digits, or one image in 200


@dataclasses.dataclass(frozen=True)
class Number:
    """A documented number of a run's summary.json."""

    key: str
    value: str  # as docs/results.md says it: of seed 0, or the mean of the seeds
    readme: str = ""  # the words of README that say it
    runs: tuple[str, ...] = ()  # the documented runs, as docs/results.md says them
    images: int = 0  # size of the test set of which the number is a share
    assumed: float = 0.0

    @property
    def spread(self) -> float:
        """The largest difference from `value` with which the number holds."""
        if self.runs:
            return DEVIATIONS * statistics.stdev(map(float, self.runs))
        if self.images:
            share = float(self.value)
            return DEVIATIONS * math.sqrt(share * (1 - share) / self.images)
        return self.assumed or ROUNDING

    @property
    def reason(self) -> str:
        """Where the spread is from."""
        if self.runs:
            return f"{DEVIATIONS} standard deviations of {len(self.runs)} runs"
        if self.images:
            return f"{DEVIATIONS} standard errors of {self.images} test examples"
        return "assumed" if self.assumed else "no training"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the real command, and its documented numbers."""

    config: str
    heading: str  # of docs/results.md, above the numbers
    numbers: tuple[Number, ...]
    stages: str = ""  # of --stages; "": those of the command
    settings: tuple[str, ...] = ()  # further flags; {out} is the folder of all runs
    after: str = ""  # the run whose weights it reads
    needs: str = ""  # flag of benchmarks.verify that names its data


RUNS = {
    "digits": Run(
        "digits.py",
        "## Digits",
        (
            Number(
                "pretrain/test_nats_per_token",
                "1.2294",
                "**1.229** (1.229, 1.224, 1.235)",
                runs=("1.2293", "1.2237", "1.2354", "1.2277", "1.2306"),
            ),
            Number(
                "probe/test_accuracy",
                "0.9675",
                "**0.9675** (0.9725, 0.9675, 0.9625)",
                runs=("0.9725", "0.9675", "0.9625", "0.9700", "0.9575"),
            ),
            Number(
                "probe/random_init_test_accuracy",
                "0.7533",
                "0.7533 on random initial weights",
                runs=("0.7575", "0.6950", "0.8075"),
            ),
            Number("probe/raw_pixels_test_accuracy", "0.9675", "0.9675 on raw pixels"),
            Number(
                "finetune/test_accuracy",
                "0.9775",
                "**0.9775** (0.9700, 0.9850, 0.9775)",
                runs=("0.9700", "0.9850", "0.9775", "0.9675"),
            ),
            Number(
                "finetune/scratch_test_accuracy",
                "0.9133",
                "0.9133 from scratch, same budget",
                runs=("0.9200", "0.9075", "0.9125"),
            ),
        ),
    ),
    "detect_digits": Run(
        "detect_digits.py",
        "## Detection on digit scenes",
        (
            Number(
                "finetune/test_ap",
                "0.743",
                "**0.743** (0.908 at an IoU of 0.5)",
                runs=("0.733", "0.742", "0.755", "0.761"),
            ),
            Number(
                "finetune/test_ap50",
                "0.908",
                "**0.743** (0.908 at an IoU of 0.5)",
                runs=("0.897", "0.901", "0.925", "0.910"),
            ),
            Number("finetune/ceiling_test_ap", "0.981", "0.981 for the annotations turned"),
            Number(
                "finetune/wrong_image_test_ap",
                "0.00002",
                "0.00002 for the boxes of another",
                assumed=0.001,
            ),
        ),
    ),
    "segment_digits": Run(
        "segment_digits.py",
        "## Segmentation of digit scenes",
        (
            Number(
                "finetune/test_miou",
                "0.875",
                "**0.875** read",
                runs=("0.877", "0.880", "0.869"),
            ),
            Number(
                "finetune/written_test_miou",
                "0.825",
                "**0.825** written",
                runs=("0.831", "0.833", "0.810"),
            ),
            Number("finetune/ceiling_test_miou", "0.908", "0.908 for the label maps"),
            Number("finetune/prior_test_miou", "0.079", "0.079 for the class prior"),
            Number("finetune/wrong_image_test_miou", "0.077", "0.077 for the map of another"),
            Number("probe/test_miou", "0.120", runs=("0.127", "0.116", "0.118")),
        ),
    ),
    "instances_digits": Run(
        "instances_digits.py",
        "## Instances of digit scenes",
        (
            Number("finetune/test_ap", "0.729", assumed=0.04),
            Number("finetune/test_mask_ap", "0.516", assumed=0.04),
            Number("finetune/true_boxes_test_mask_ap", "0.610", assumed=0.04),
            Number("finetune/test_pq", "0.746", assumed=0.04),
            Number("finetune/ceiling_test_ap", "0.981"),
            Number("finetune/ceiling_test_mask_ap", "0.988", assumed=0.01),
        ),
    ),
    "video_digits": Run(
        "video_digits.py",
        "## Clips of moving digits",
        (
            Number(
                "pretrain/test_nats_per_token_of_frame_1",
                "0.655",
                "0.65, 0.35, **0.006** and 0.005",
                assumed=0.03,
            ),
            Number(
                "pretrain/test_nats_per_token_of_frame_2",
                "0.349",
                "0.65, 0.35, **0.006** and 0.005",
                assumed=0.06,
            ),
            Number(
                "pretrain/test_nats_per_token_of_frame_3",
                "0.0063",
                "0.65, 0.35, **0.006** and 0.005",
                assumed=0.004,
            ),
            Number("sample/continued_exact_frame_3", "0.897", images=200),
            Number(
                "sample/continued_exact_frame_8",
                "0.753",
                "**75%** have an eighth frame",
                images=200,
            ),
            Number("sample/shifted_exact_frame_8", "0.250", "25% by the last frame moved on"),
            Number("sample/copied_exact_frame_8", "0.090", "9% by the last frame copied"),
            Number("probe/test_accuracy", "0.981", "**98%** of the clips", images=400),
            Number("probe/raw_pixels_test_accuracy", "0.828", "raw pixels 83%"),
            Number("probe/random_init_test_accuracy", "0.628", "random weights 63%", images=400),
            Number("finetune/test_accuracy", "0.988", images=400),
        ),
    ),
    "video_camera": Run(
        "video_camera.py",
        "## Motion of a camera",
        (
            Number("probe/test_accuracy", "0.792", "**79%** of the clips", images=900),
            Number("probe/raw_pixels_test_accuracy", "0.251", "raw pixels 25%"),
            Number("probe/random_init_test_accuracy", "0.229", "random weights 23%", images=900),
        ),
        stages="pretrain,probe",
        settings=("--config.data.path={photographs}",),
        needs="photographs",
    ),
    "digits_distill": Run(
        "digits_distill.py",
        "## Distillation",
        (
            Number("pretrain/test_nats_per_token", "1.2850", assumed=0.013),
            Number("pretrain/test_kl", "0.0990", assumed=0.01),
            Number("pretrain/test_agreement", "0.814", assumed=0.015),
            Number("pretrain/equal_steps_test_nats_per_token", "1.3035", assumed=0.013),
            Number("finetune/test_accuracy", "0.9650", images=400),
            Number("finetune/test_kl", "0.0782", assumed=0.03),
            Number("finetune/equal_steps_test_accuracy", "0.9775", images=400),
        ),
        stages="pretrain,finetune",
        settings=(
            "--config.distill.teacher={out}/digits",
            "--config.finetune.distill.teacher={out}/digits",
        ),
        after="digits",
    ),
    "tokenizer_cifar10": Run(
        "tokenizer_cifar10.py:tiny",
        "## Learned tokens",
        (
            Number(
                "tokenizer/test_psnr_db",
                "25.87",
                "(25.87 dB on the test images, the mean of three seeds;",
                runs=("25.87", "25.86", "25.89"),
            ),
            Number("tokenizer/test_ssim", "0.8575", runs=("0.8575", "0.8570", "0.8580")),
            Number("pretrain/test_nats_per_token", "6.089", runs=("6.075", "6.095", "6.097")),
            Number("probe/test_accuracy", "0.473", runs=("0.481", "0.460", "0.477")),
            Number("probe/random_init_test_accuracy", "0.209", runs=("0.216", "0.206", "0.206")),
            Number("probe/raw_pixels_test_accuracy", "0.380", runs=("0.379", "0.384", "0.378")),
        ),
        stages="tokenizer,pretrain,probe",
        settings=("--config.data.dir={data_dir}",),
        needs="data_dir",
    ),
    "features_cifar10": Run(
        "features_cifar10.py",
        "## Features of CIFAR-10",
        (
            Number(
                "probe/test_accuracy",
                "0.6851",
                "**68.5%** of the 10,000 test images",
                runs=("0.6847", "0.6839", "0.6867"),
            ),
            Number(
                "probe/concatenated_test_accuracy",
                "0.7338",
                "all layers together **73.4%**",
                runs=("0.7403", "0.7281", "0.7331"),
            ),
            Number(
                "probe/random_init_test_accuracy",
                "0.4381",
                "reach 43.8% and",
                runs=("0.4443", "0.4357", "0.4342"),
            ),
            Number(
                "probe/concatenated_random_init_test_accuracy",
                "0.4935",
                "and 49.4%",
                runs=("0.5005", "0.4914", "0.4887"),
            ),
            Number("probe/raw_pixels_test_accuracy", "0.4175", "raw pixels 41.8%"),
            Number(
                "finetune/test_accuracy",
                "0.8600",
                "reaches **86.0%**",
                runs=("0.8624", "0.8562", "0.8613"),
            ),
        ),
        settings=("--config.data.dir={data_dir}",),
        needs="data_dir",
    ),
}


def table() -> str:
    """The Markdown table of docs/results.md: what is verified, and by how much it may differ."""
    lines = ["| run | number | documented | may differ by | because |", "|---|---|---|---|---|"]
    for name, run in RUNS.items():
        for number in run.numbers:
            cells = name, f"`{number.key}`", number.value, f"{number.spread:.2g}", number.reason
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
