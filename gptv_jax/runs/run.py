"""A run folder, and what every stage shares: config, mesh, codec, metrics, summary.

Of several processes the first reads the folder and decides for all: whether or not the others see
the same folder, all do the same.
"""

import dataclasses
import importlib.metadata
import pathlib
import platform
import secrets
import shlex
import sys
import tempfile

import jax
from etils import epath

from gptv_jax import checkpoint, files, hosts, sharding, tokens
from gptv_jax import config as config_lib
from gptv_jax import weights as weights_lib
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.config import fields, rules
from gptv_jax.data import codec as codecs
from gptv_jax.data import pipeline, sources, transforms
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.decode.sampler import check_guidable
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.runs.record import checkpoint_folder, config_of, finished_stages
from gptv_jax.stages.select import choose_stages
from gptv_jax.train.metrics import MetricWriter
from gptv_jax.weights.file import WeightsFile

TRIED = 32  # images that the transforms and the codec are tried on, before any work
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gptv_jax")


class Run:
    """An open run folder."""

    def __init__(self, config: config_lib.Config, workdir: str, wanted: list[str] | None = None):
        """Makes the folder, or checks that this configuration made it.

        Args:
          config: of the run.
          workdir: its folder.
          wanted: stages; None for all that the configuration has.

        Raises:
          InputError: the mesh, the network, the data and the stages do not fit each other, the
            folder cannot be written, or another configuration made it (every field that differs
            is listed).
        """
        self.config = config
        self._pretrained_step: int | None = None  # whose weights a later stage went on from
        for name, given in (("--workdir", workdir), ("config.init_from", config.init_from)):
            if "://" in (given or ""):
                raise InputError(
                    f"{name}={given} is an address; it takes a folder. Checkpoints alone may lie "
                    "elsewhere, by config.checkpoint_dir."
                )
        self.folder = pathlib.Path(workdir).absolute()
        _must_agree(config)
        self.mesh = sharding.make_mesh(config.mesh)
        sharding.check(config, self.mesh)
        if config.sample.guidance != 1:
            check_guidable(config.model, f"config.sample.guidance is {config.sample.guidance:g}")
        hosts.from_first(self._compare)
        opened = {split: sources.open_source(config.data, split) for split in sources.SPLITS}
        self.classes = opened["train"].classes
        rules.check_classes(config, self.classes)
        names = getattr(sources.open_data_set(config.data), "class_names", self.classes)
        lengths = {split: len(source) for split, source in opened.items()}
        self._known = {"images": lengths, "classes": names}  # of the data
        self.stages = choose_stages(config, self.classes, wanted)
        if "tokenizer" in self.stages:
            sharding.check_tokenizer(config, self.mesh)
        for entries in self._training_transforms():
            transforms.check(entries, config.data.eval_transforms)
        hosts.from_first(self._prepare)
        files.claim(self.folder, "workdir")  # each process names the damaged images that it meets
        self.metrics = MetricWriter(self.folder)
        share = sharding.batch_share(self.mesh)
        self.images = Pipeline(config.data, None, config.seed, self.folder, share)
        self._take(self._definition())

    def _take(self, definition: tokens.TokenDefinition | None) -> None:
        """The codec, and the data by it; None both, while the tokenizer is still to be trained."""
        config, kind = self.config, self.config.tokens.kind
        self.codec = self.data = None
        if definition is not None or kind not in tokens.DEFINITIONS:
            self.codec = tokens.make_codec(config.tokens, config.data.image_size, definition)
            self.data = self.images.with_codec(self.codec)

    def adopt(self, tokenizer: tokens.Tokenizer) -> None:
        """Keeps the tokenizer that the stage of this name has trained, for all later stages."""
        if jax.process_index() == 0:
            tokens.save_definition(tokenizer, self.folder)
        self._take(tokenizer)

    def _definition(self) -> tokens.TokenDefinition | None:
        """What process 0 keeps of the tokens, on all processes."""
        kind = self.config.tokens.kind
        if kind not in tokens.DEFINITIONS or jax.process_count() == 1:
            return tokens.load_definition(kind, self.folder)
        path = self.folder / tokens.DEFINITIONS[kind][0]
        first = jax.process_index() == 0
        content = hosts.bytes_of_first(path.read_bytes() if first and path.exists() else b"")
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / path.name).write_bytes(content)
            return tokens.load_definition(kind, pathlib.Path(folder)) if content else None

    def _prepare(self) -> None:
        """Checks and claims the folder, and sees to it that it keeps what the tokens stand for."""
        config, kind = self.config, self.config.tokens.kind
        found = codecs.find_codec(config, self.folder)
        made = (self.folder / "config.json").exists()
        begun = made and checkpoint.found(checkpoint_folder(config, self.folder))
        if not found and begun and (kind != "learned" or self._tokenizer_finished):
            raise InputError(
                f"{self.folder} has lost its {tokens.DEFINITIONS[kind][0]}; restore it."
            )
        if not found and kind == "learned" and "tokenizer" not in self.stages:
            raise InputError(
                "config.tokens.kind=learned needs a tokenizer; run --stages=tokenizer first, or "
                "name one by config.tokens.tokenizer."
            )
        trained_here = not found and kind == "learned"
        if found or trained_here:
            self._try(found)
        if config.init_from or not {"pretrain", "tokenizer"} & set(self.stages):
            self._check_pretrained(found)  # before this folder is claimed
        self._claim()
        if not found and not trained_here:
            found = codecs.build_codec(config, DamageLog(config.data, self.folder))
            self._try(found)
        if found:
            tokens.save_definition(found.definition, self.folder)

    def _try(self, codec: tokens.Codec | None) -> None:
        """The data, every list of transforms and the codec must fit each other."""
        data = self.config.data
        channels = self.config.tokens.autoencoder.channels
        shape = codec.image_shape if codec else (data.image_size, data.image_size, channels)
        for entries in dict.fromkeys([*self._training_transforms(), data.eval_transforms]):
            pipeline.try_out(data, codec, shape, entries, TRIED)

    def _training_transforms(self) -> list[tuple[str, ...]]:
        """Of every training."""
        config = self.config
        own = [config.finetune.train_transforms, config.probe.sgd.train_transforms]
        own += [config.tokenizer.train_transforms] if "tokenizer" in self.stages else []
        return [config.data.train_transforms, *(entries for entries in own if entries)]

    def network(self, classes: int = 0) -> Network:
        """The network of the config, with a class head where `classes` is not 0."""
        return network_of(self.config, classes)

    def _check_pretrained(self, codec: tokens.Codec | None) -> None:
        """Raises where there are no pretrained weights, or of another network."""
        given = self.config.init_from
        if given and weights_lib.is_weights_path(given):
            self._imported(codec)
            return
        self._must_be_pretrained()
        there = config_of(self._pretrained_folder())
        self._must_fit(
            WeightsFile(
                there.model, there.tokens, there.data.image_size, {}, starts=starts_of(there)
            )
        )

    def _imported(self, codec: tokens.Codec | None) -> WeightsFile:
        """The weights of `config.init_from`, where they come from elsewhere; without class head."""
        given, definition = self.config.init_from, codec and codec.definition
        palette = definition if isinstance(definition, tokens.Palette) else None
        found = weights_lib.read(given, palette).headless()
        self._must_fit(found)
        return found

    def _must_fit(self, weights: WeightsFile) -> None:
        differing = weights.differing(self.config, starts_of(self.config))
        if differing:
            raise InputError(
                f"config.init_from={self.config.init_from} holds another network: "
                f"{'; '.join(differing)}. Set these fields to its values."
            )

    def _pretrained_folder(self) -> pathlib.Path:
        """The run folder with the pretrained weights: this one, or `config.init_from`."""
        return pathlib.Path(self.config.init_from or self.folder).absolute()

    def _must_be_pretrained(self) -> None:
        given, folder = self.config.init_from, self._pretrained_folder()
        if "pretrain" not in finished_stages(files.read_json(folder / "summary.json", {})):
            raise InputError(
                f"{'config.init_from=' if given else ''}{folder} holds no finished pretraining; "
                + ("name a run folder that does." if given else "run --stages=pretrain first.")
            )

    def pretrained(self, network: Network) -> dict:
        """The pretrained parameters, from the newest checkpoint that can be read.

        Raises:
          InputError: pretraining has not finished, the weights are of another shape, or none of
            the checkpoints can be read.
        """
        given = self.config.init_from
        if given and weights_lib.is_weights_path(given):
            weights = self._imported(self.codec)
            self._pretrained_step = weights.step
            return weights.on_mesh()
        hosts.from_first(self._must_be_pretrained)
        folder = self._pretrained_folder()

        def of_folder() -> tuple[str, str]:
            config = config_of(folder)
            return str(checkpoint_folder(config, folder)), config.train.weights

        place, weights = hosts.from_first(of_folder)
        abstract = {weights: sharding.abstract(network.init)}
        with Checkpoints(epath.Path(place) / "pretrain", read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(abstract)
        if restored is None:
            raise InputError(
                f"{checkpoints.folder} holds no checkpoint, though pretraining has finished; "
                "restore it, or pretrain anew in another --workdir."
            )
        self._pretrained_step = restored[1]["position"]
        return restored[0][weights]

    def checkpoints(self, training: str) -> epath.Path:
        """The folder of a training's checkpoints."""
        return checkpoint_folder(self.config, self.folder) / training

    def summary(self) -> dict:
        """The numbers of the finished stages, as process 0 keeps them."""
        return files.read_json(self.folder / "summary.json", {})

    @property
    def _tokenizer_finished(self) -> bool:
        return "tokenizer" in finished_stages(self.summary())

    def finished(self, stage: str) -> bool:
        """Whether the stage has written its numbers, which it does once, at its end."""
        return hosts.from_first(lambda: stage in finished_stages(self.summary()))

    def finish(self, stage: str, numbers: dict) -> None:
        """Adds a stage's numbers, keyed without the stage's name, to the summary."""
        skipped = set().union(*hosts.from_all(self.images.damage_log.names))
        if jax.process_index() != 0:
            return
        summary = self.summary() | {f"{stage}/{name}": value for name, value in numbers.items()}
        if stage == "pretrain":
            summary["model/params"] = summary.pop("pretrain/params")
        elif self._pretrained_step != summary.get("pretrain/steps") and not self.config.init_from:
            # The newest checkpoint was damaged, and the numbers are of an earlier one.
            summary[f"{stage}/pretrain_steps"] = self._pretrained_step
        summary["data/skipped"] = len(skipped)
        files.write_json(self.folder / "summary.json", summary)

    def _compare(self) -> None:
        """Raises where another configuration made the folder."""
        if not (self.folder / "config.json").exists():
            return
        now = fields.flatten(self.config)
        then = fields.flatten(config_of(self.folder))
        free = fields.free(config_lib.Config)
        differing = [
            f"config.{name} is {now[name]!r}, there {then[name]!r}"
            for name in now
            if name not in free and now[name] != then[name]
        ]
        if differing:
            raise InputError(
                f"{self.folder} was made by another configuration: {'; '.join(differing)}. Take "
                "another --workdir, or the settings of that run."
            )

    def _claim(self) -> None:
        """Makes the folder, and writes what it is of."""
        files.claim(self.folder, "workdir")
        files.lock(self.folder, "workdir", holder=self)
        path, given = self.folder / "config.json", self.config.checkpoint_dir
        record, made = files.read_json(path, {}), path.exists()
        if made:
            # Where the data lie may change, but not what they are.
            for name, now in self._known.items():
                before = record.get(name, now)
                if before != now:
                    raise InputError(
                        f"{self.folder} was made of other data: its {name} were {before}, now they "
                        f"are {now}. Take the same data, or another --workdir."
                    )
        else:
            devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
            record = {"command": command(), "devices": devices, "versions": _versions()}
            record |= self._known | {"config": fields.flatten(self.config)}
        record.setdefault("id", secrets.token_hex(8))
        self._claim_checkpoints(record["config"].get("checkpoint_dir"), record["id"])
        if not made or record["config"].get("checkpoint_dir") != given:
            record["config"]["checkpoint_dir"] = given
            files.write_json(path, record)

    def _claim_checkpoints(self, before: str | None, run: str) -> None:
        """The place of the checkpoints is this run's alone, and changes only with what is there."""
        given, config = self.config.checkpoint_dir, self.config
        now = checkpoint_folder(config, self.folder)
        was = checkpoint_folder(dataclasses.replace(config, checkpoint_dir=before), self.folder)
        if was != now and checkpoint.found(was):
            raise InputError(
                f"config.checkpoint_dir is {given}, but this run's checkpoints are in {was}; "
                f"move what that holds to {now}, or leave the setting as it was."
            )
        if given:
            checkpoint.claim(now, run, self.folder, moved=was != now)


def _must_agree(config: config_lib.Config) -> None:
    """Raises where several processes were not given the same settings, but for where data lie."""
    own = {k: v for k, v in fields.flatten(config).items() if k not in ("data.dir", "data.path")}
    first, *others = hosts.from_all(own)
    differing = sorted({name for other in others for name in own if other[name] != first[name]})
    if differing:
        raise InputError(
            f"the processes were given different settings: config.{', config.'.join(differing)}; "
            "start all of them by the same command."
        )


def network_of(config: config_lib.Config, classes: int = 0) -> Network:
    """The network of a configuration, with a class head where `classes` is not 0."""
    tokens, grid = config.tokens, config.tokens.grid(config.data.image_size)
    return Network(config.model, tokens.vocabulary, grid, starts_of(config), classes)


def starts_of(config: config_lib.Config) -> int:
    """Start vectors that a configuration asks for."""
    if config.model.class_tokens:
        return config.model.class_tokens + 1
    variants = transforms.variants(config.data.train_transforms)
    return variants if config.model.start_per_variant else 1


def command() -> str:
    """The command line that started this process."""
    return shlex.join(["python", "-m", "gptv_jax.main", *sys.argv[1:]])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        versions[name] = importlib.metadata.version(name)
    return versions
