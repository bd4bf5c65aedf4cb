"""How an encoder and decoder are trained and measured."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import test_lpips
from conftest import generator, make_mesh, random_image

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import autoencoder, layers, lpips
from gptv_jax.tokens import LearnedCodec, Tokenizer
from gptv_jax.tokens.learned import from_pixels
from gptv_jax.train import autoencoding, optimizer, step

FSQ = config_lib.Autoencoder(widths=(16,), encoder_blocks=1, decoder_blocks=1, levels=(8, 6))
VQ = dataclasses.replace(FSQ, quantizer="vq", codes=24, code_size=4)
ssim = jax.jit(autoencoding.ssim, static_argnums=2)
TRAIN = config_lib.Train(
    steps=8, batch_size=8, optimizer=config_lib.Optimizer("adamw", learning_rate=3e-3)
)
PLAIN = config_lib.Tokenizer(train=TRAIN)
JUDGED = dataclasses.replace(
    PLAIN,
    l1=0.5,
    adversarial=0.1,
    discriminator_width=8,
    discriminator_layers=2,
    discriminator_rate=1e-2,
)


def batch(size: int = 8, seed: int = 0, side: int = 8) -> dict:
    images = random_image(size, 2, 2, 3, seed=seed).repeat(side // 2, axis=1)
    images = images.repeat(side // 2, axis=2)
    return {"image": images, "mask": (np.arange(size) < size - 1).astype(np.float32)}


class Training:
    """A train state and the compiled step, on the current mesh."""

    def __init__(self, config, settings, frozen=None, side: int = 8):
        update, rate = optimizer.make_optimizer(settings.train.optimizer, settings.train.steps)
        init = jax.jit(autoencoding.make_init(config, settings, update))
        self.state, self.frozen, self.side = init(jax.random.key(0)), frozen, side
        self.step = step.make_train_step(
            autoencoding.make_loss(config, settings),
            update,
            rate,
            ema=settings.train.ema,
            after=autoencoding.make_after(config, settings),
        )

    def run(self, steps: int) -> list[dict]:
        """Takes `steps` steps; returns the metrics of each."""
        metrics = []
        for _ in range(steps):
            images = {"image": batch(8, int(self.state["step"]), self.side)["image"]}
            self.state, numbers = self.step(self.state, sharding.global_batch(images), self.frozen)
            metrics.append(jax.device_get(numbers))
        return metrics


def test_training_is_the_same_on_every_mesh():
    found = []
    settings = dataclasses.replace(
        JUDGED, train=dataclasses.replace(TRAIN, ema=0.5), adversarial_from=0.25
    )
    for shape in ((1, 1, 1), (2, 2, 1)):
        with jax.set_mesh(make_mesh(shape)):
            training = Training(VQ, settings)
            first = sharding.by_name(jax.device_get(training.state["params"]))
            metrics = training.run(1)
            after_one = sharding.by_name(jax.device_get(training.state))
            metrics += training.run(2)
            found.append((sharding.by_name(jax.device_get(training.state)), metrics))
    (state, metrics), (other_state, other_metrics) = found
    silent = dataclasses.replace(settings, adversarial=0.0)
    assert metrics[0]["commitment"] > 0.1
    assert metrics[0]["loss"] == pytest.approx(weighted(silent, metrics[0]), rel=1e-5)
    for name, begun in first.items():  # nine tenths of the first average are the new weights
        average = begun / 10 + after_one[f"params.{name}"] * 9 / 10
        np.testing.assert_allclose(after_one[f"ema.{name}"], average, rtol=1e-4, atol=1e-6)
    # The codebook follows its moving averages.
    directions = state["codebook.sums"] / np.linalg.norm(state["codebook.sums"], axis=1)[:, None]
    np.testing.assert_allclose(state["params.quantizer.codebook"], directions, atol=1e-5)
    assert abs(first["quantizer.codebook"] - directions).max() > 1e-3
    for one, other in zip(metrics, other_metrics, strict=True):
        assert {"l1", "l2", "adversarial", "commitment"} <= one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-3, atol=1e-5)
    for name, leaf in state.items():
        if name.startswith(("params", "ema", "codebook")):
            np.testing.assert_allclose(other_state[name], leaf, rtol=1e-2, atol=2e-3)


def weighted(settings, metrics: dict) -> float:
    """The loss computed from its terms by the settings' weights."""
    names = ("l1", "l2", "gradient", "ssim", "lpips", "commitment", "adversarial")
    return sum(getattr(settings, name) * metrics[name] for name in names if name in metrics)


def test_the_discriminator_begins_late_and_learns(one_device):
    training = Training(FSQ, JUDGED)  # after half of 8 steps: in the fifth
    first = jax.device_get(training.state["critic"])
    *early, last = training.run(4)
    # Before it begins, it has no influence on the encoder and decoder, either.
    for metrics in (*early, last):
        silent = dataclasses.replace(JUDGED, adversarial=0.0)
        assert metrics["loss"] == pytest.approx(weighted(silent, metrics), rel=1e-5)
    for before, now in zip(*map(jax.tree.leaves, (first, training.state["critic"])), strict=True):
        np.testing.assert_array_equal(now, before)
    [metrics] = training.run(1)
    assert metrics["loss"] == pytest.approx(weighted(JUDGED, metrics), rel=1e-5)
    assert metrics["loss"] != pytest.approx(weighted(silent, metrics), rel=1e-5)
    # From here on it learns to tell images from restored ones; a loss of 1 says that it cannot.
    losses = [metrics["critic_loss"] for metrics in training.run(8)]
    assert 0.9 < losses[0] < 1.1 and losses[-1] < 0.8 * losses[0]


def test_the_loss_is_the_weighted_sum_of_what_the_settings_name(monkeypatch):
    narrow = tuple(tuple((n, w // 32) for n, w in convs) for convs in lpips.SLICES)
    monkeypatch.setattr(lpips, "SLICES", narrow)
    vgg = test_lpips.random_weights()
    settings = dataclasses.replace(
        JUDGED, l2=0.7, gradient=0.2, ssim=0.4, lpips=0.3, adversarial_from=0.0
    )
    with jax.set_mesh(make_mesh((2, 2, 1))):
        training = Training(FSQ, settings, {"vgg": vgg}, side=16)
        first = jax.device_get(training.state)
        [metrics] = training.run(1)
    images = from_pixels(jnp.asarray(batch(side=16)["image"]))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params, critic = jax.tree.map(jnp.asarray, (first["params"], first["critic"]["params"]))
        model = autoencoder.bind(FSQ, params)
        restored = jax.jit(lambda x: model.decoder(model.encode(x).values))(images)
        wanted = {
            "l1": jnp.abs(restored - images),
            "l2": jnp.square(restored - images),
            # The discriminator should take restored images for real ones.
            "adversarial": -jax.jit(
                layers.bind(autoencoder.Discriminator, FSQ, settings, params=critic)
            )(restored),
            "gradient": jax.jit(autoencoding.gradient)(restored, images),
            "ssim": 1 - ssim(restored, images, 2.0),
            "lpips": jax.jit(lpips.distance)(vgg, restored, images),
        }
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(float(value.mean()), rel=1e-4), name
    assert metrics["loss"] == pytest.approx(weighted(settings, metrics), rel=1e-5)


def test_codes_follow_their_encodings_and_dead_codes_restart(one_device):
    settings = dataclasses.replace(PLAIN, codebook_decay=0.75, restart_below=0.3)
    rng, V, Z = generator(), 6, 3
    codebook = {"counts": rng.uniform(1, 3, V), "sums": rng.normal(size=(V, Z))}
    codebook["counts"][4] = 0.2  # hardly used any more
    z, codes = rng.normal(size=(2, 2, 2, Z)), rng.integers(4, size=(2, 2, 2))
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), codebook)
    found = autoencoding.update_codebook(
        given, jnp.asarray(z, jnp.float32), jnp.asarray(codes), settings, jax.random.key(0)
    )
    directions = (z / np.linalg.norm(z, axis=-1, keepdims=True)).reshape(-1, Z)
    counts, sums = 0.75 * codebook["counts"], 0.75 * codebook["sums"]
    for code, direction in zip(codes.ravel(), directions, strict=True):
        counts[code] += 0.25
        sums[code] += 0.25 * direction
    even = counts.sum() / V
    dead = counts < 0.3 * even
    assert list(np.flatnonzero(dead)) == [4]
    np.testing.assert_allclose(found["counts"], np.where(dead, even, counts), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found["sums"])[~dead], sums[~dead], rtol=1e-4, atol=1e-6)
    reborn = np.asarray(found["sums"])[4] / even
    assert np.isclose(abs(directions - reborn).max(axis=1).min(), 0, atol=1e-5)


def test_dead_codes_restart_from_a_new_draw_at_every_step(one_device):
    # Every code without an encoding in the batch is dead, and nothing else moves.
    settings = dataclasses.replace(PLAIN, codebook_decay=0.0, restart_below=0.9)
    still = dataclasses.replace(TRAIN.optimizer, learning_rate=0.0)
    settings = dataclasses.replace(settings, train=dataclasses.replace(TRAIN, optimizer=still))
    training, books, dead = Training(VQ, settings), [], []
    images = sharding.global_batch({"image": batch()["image"]})
    for _ in range(2):
        training.state, _ = training.step(training.state, images)
        books.append(np.asarray(training.state["params"]["quantizer"]["codebook"]))
        # 8 x 4 encodings are no whole number for each of 24 codes.
        dead.append(np.isclose(training.state["codebook"]["counts"], 32 / 24))
    twice = dead[0] & dead[1]
    assert twice.sum() > 6
    assert (np.abs(books[0] - books[1])[twice].max(axis=1) > 1e-3).mean() > 0.5


def test_more_of_a_codebook_is_used_where_dead_codes_restart(one_device):
    config = dataclasses.replace(VQ, codes=64)
    # All encodings point in one direction, as those of an untrained encoder do.
    z = jnp.asarray(generator().normal((3, 0, 0, 0), 1, (8, 4, 4, 4)), jnp.float32)
    first = jnp.asarray(generator(1).normal(size=(64, 4)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def advance(settings, averages, key):
        quantizer = autoencoder.bind(config, params | {"quantizer": {"codebook": averages["sums"]}})
        codes = quantizer.quantizer(z).codes
        return autoencoding.update_codebook(averages, z, codes, settings, key), codes

    params, used = jax.jit(lambda key: autoencoder.init(config, key))(jax.random.key(0)), []
    for restart in (0.0, 0.5):
        settings = dataclasses.replace(PLAIN, codebook_decay=0.5, restart_below=restart)
        averages = {"counts": jnp.ones(64), "sums": first}
        for seed in range(8):
            averages, codes = advance(settings, averages, jax.random.key(seed))
        used.append(len(np.unique(codes)))
    assert used[1] > 2 * used[0]


def test_an_evaluation_counts_every_real_image_once_and_whole_pixels(one_device):
    params = jax.jit(lambda key: autoencoder.init(FSQ, key))(jax.random.key(0))
    params["decoder"]["to_pixels"]["to_pixels"] *= 100  # some values lie beyond 0 .. 255
    given, eval_step = batch(), autoencoding.make_eval_step(FSQ)
    sums = jax.device_get(eval_step(params, sharding.global_batch(given)))
    assert sums["images"] == 7 and sums["counts"].sum() == 7 * 4
    codec = LearnedCodec(Tokenizer(FSQ, sharding.by_name(jax.device_get(params)), {}), 8)
    images = given["image"][:7]
    codes = codec.encode(images)
    made = codec.decode(codes)
    assert made.min() == 0 and made.max() == 255
    error = np.square(made.astype(float) - images).mean(axis=(1, 2, 3))
    wanted = {
        "mse": error.sum(),
        "psnr_db": (10 * np.log10(255**2 / error)).sum(),
        "idempotence": (codec.encode(made) == codes).mean(axis=1).sum(),
        "counts": np.bincount(codes.ravel(), minlength=48),
        "ssim": ssim(jnp.float32(made), jnp.float32(images), 255.0).sum(),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-4, err_msg=name)


def test_an_image_that_is_restored_exactly_counts_as_missed_by_half_a_level(one_device):
    params = jax.jit(lambda key: autoencoder.init(FSQ, key))(jax.random.key(0))
    nothing = jax.tree.map(jnp.zeros_like, params)  # decodes to the middle of the range
    exact = batch() | {"image": np.full((8, 8, 8, 3), 128, np.uint8)}
    sums = autoencoding.make_eval_step(FSQ)(nothing, sharding.global_batch(exact))
    assert sums["mse"] == 0
    assert float(sums["psnr_db"]) == pytest.approx(7 * 10 * np.log10(255**2 / 0.5**2), rel=1e-6)


def test_health_of_known_counts():
    counts = np.array([4, 4, 0, 8, 0, 0, 0, 0])
    sums = {"images": 2.0, "counts": counts, "mse": 10.0, "psnr_db": 60.0}
    sums |= {"ssim": 1.5, "idempotence": 1.0}
    sums = {name: np.array(value) for name, value in sums.items()}
    found = autoencoding.health(sums)
    share = np.array([0.25, 0.25, 0.5])
    assert found == {
        "psnr_db": 30.0,
        "ssim": 0.75,
        "mse": 5.0,
        "idempotence": 0.5,
        "codes_used": 3 / 8,
        "dead_codes": 5,
        "perplexity": pytest.approx(np.exp(-(share * np.log(share)).sum())),
        "most_used": 1.0,
    }
    # Four tokens can use four codes at most.
    few = np.array([3, 1, *np.zeros(14, int)])
    assert autoencoding.health(sums | {"counts": few})["most_used"] == 4 / 16


def test_ssim_is_that_of_gaussian_windows_computed_by_scipy():
    x, y = (random_image(2, 24, 20, 3, seed=s).astype(np.float64) for s in (0, 1))
    y = 0.7 * x + 0.3 * y

    def mean(image):  # truncated to the same 11 x 11 pixels
        return scipy.ndimage.gaussian_filter(image, 1.5, truncate=3.34, axes=(0, 1))[5:-5, 5:-5]

    wanted = []
    for a, b in zip(x, y, strict=True):
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        va, vb = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2
        numerator = (2 * mean(a) * mean(b) + c1) * (2 * (mean(a * b) - mean(a) * mean(b)) + c2)
        wanted.append((numerator / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (va + vb + c2))).mean())
    np.testing.assert_allclose(ssim(jnp.float32(x), jnp.float32(y), 255.0), wanted, rtol=1e-4)
    np.testing.assert_allclose(ssim(jnp.float32(x), jnp.float32(x), 255.0), 1.0, rtol=1e-6)
    assert np.isfinite(ssim(jnp.zeros((1, 8, 8, 1)), jnp.ones((1, 8, 8, 1)), 2.0)).all()


def test_a_gradient_loss_sees_edges_and_not_a_shift_of_brightness():
    x = jnp.asarray(generator().uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    gradient = jax.jit(autoencoding.gradient)
    np.testing.assert_allclose(gradient(x, x + 0.25), 0, atol=1e-6)
    edge = jnp.zeros((1, 16, 16, 1)).at[:, :, 8:].set(1.0)
    # One of 15 neighbours along a row differs, then one of 7, then one of 3.
    np.testing.assert_allclose(gradient(edge, 0 * edge), 1 / 15 + 1 / 7 + 1 / 3, rtol=1e-6)
    assert autoencoding.psnr(jnp.float32(0.04)) == pytest.approx(20.0)
