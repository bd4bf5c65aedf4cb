"""How an encoder and decoder are trained and measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import MESHES, generator, make_mesh, random_image

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.train import autoencoding, optimizer, reconstruction

FSQ = config_lib.Autoencoder(widths=(16,), encoder_blocks=1, decoder_blocks=1, levels=(8, 6))
VQ = dataclasses.replace(FSQ, quantizer="vq", codes=24, code_size=4)
TRAIN = config_lib.Train(
    steps=8, batch_size=8, optimizer=config_lib.Optimizer("muon", learning_rate=3e-3)
)
EVERYTHING = config_lib.Tokenizer(
    train=dataclasses.replace(TRAIN, ema=0.5),
    l1=0.5,
    gradient=0.2,
    ssim=0.3,
    adversarial=0.1,
    discriminator_width=8,
    discriminator_layers=2,
)


def batch(size: int = 8, seed: int = 0) -> dict:
    images = random_image(size, 2, 2, 3, seed=seed).repeat(8, axis=1).repeat(8, axis=2)
    return {"image": images, "mask": (np.arange(size) < size - 1).astype(np.float32)}


def trained(config, settings, steps: int = 3) -> tuple[dict, list[dict]]:
    """The state after so many steps, and the metrics of each."""
    update, rate = optimizer.make_optimizer(settings.train.optimizer, settings.train.steps)
    init = autoencoding.make_init(config, settings, update)
    step = autoencoding.make_train_step(config, settings, update, rate)
    state, metrics = jax.jit(init)(jax.random.key(0)), []
    for seed in range(steps):
        images = {"image": batch(settings.train.batch_size, seed)["image"]}
        state, numbers = step(state, sharding.global_batch(images))
        metrics.append(jax.device_get(numbers))
    return state, metrics


@pytest.mark.parametrize("config", [FSQ, VQ], ids=["fsq", "vq"])
def test_training_is_the_same_on_every_mesh_with_all_that_it_can_have(config):
    found = []
    for shape in MESHES[:4]:
        with jax.set_mesh(make_mesh(shape)):
            state, metrics = trained(config, EVERYTHING)
            found.append((sharding.by_name(jax.device_get(state)), metrics))
    (state, metrics), *others = found
    assert ("codebook.counts" in state) == (config is VQ) and "ema.encoder.stem.bias" in state
    for other_state, other_metrics in others:
        for one, other in zip(metrics, other_metrics, strict=True):
            for name, value in one.items():
                np.testing.assert_allclose(other[name], value, rtol=2e-3, atol=1e-5)
        for name, leaf in state.items():
            if name.startswith("params"):
                np.testing.assert_allclose(other_state[name], leaf, rtol=1e-2, atol=2e-3)


def test_the_discriminator_begins_late(one_device):
    settings = dataclasses.replace(EVERYTHING, adversarial_from=0.5)  # of 8 steps, from the fifth
    update, _ = optimizer.make_optimizer(settings.train.optimizer, settings.train.steps)
    first = jax.jit(autoencoding.make_init(FSQ, settings, update))(jax.random.key(0))["critic"]
    for steps, moved in ((4, False), (5, True)):
        state, metrics = trained(FSQ, settings, steps)
        same = jax.tree.map(
            lambda a, b: bool(jnp.all(a == b)), first["params"], state["critic"]["params"]
        )
        assert all(jax.tree.leaves(same)) != moved
        # The encoder and decoder hear nothing of it before, either.
        weighted = sum(
            getattr(settings, n) * metrics[3][n] for n in ("l1", "l2", "gradient", "ssim")
        )
        assert metrics[3]["loss"] == pytest.approx(weighted, rel=1e-5)
    weighted = sum(getattr(settings, n) * metrics[4][n] for n in ("l1", "l2", "gradient", "ssim"))
    weighted += settings.adversarial * metrics[4]["adversarial"]
    assert metrics[4]["loss"] == pytest.approx(weighted, rel=1e-5)


def test_codes_follow_their_encodings_and_dead_ones_begin_anew(one_device):
    settings = dataclasses.replace(EVERYTHING, codebook_decay=0.75, restart_below=0.3)
    rng, V, Z = generator(), 6, 3
    codebook = {"counts": rng.uniform(1, 3, V), "sums": rng.normal(size=(V, Z))}
    codebook["counts"][4] = 0.2  # hardly used any more
    z, codes = rng.normal(size=(2, 2, 2, Z)), rng.integers(4, size=(2, 2, 2))
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), codebook)
    found = autoencoding.follow(
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


def test_a_codebook_is_used_more_where_dead_codes_begin_anew(one_device):
    used = []
    for restart in (0.0, 0.5):
        settings = dataclasses.replace(
            EVERYTHING, adversarial=0.0, codebook_decay=0.5, restart_below=restart
        )
        config = dataclasses.replace(VQ, codes=64)
        state, _ = trained(config, settings, steps=8)
        sums = autoencoding.make_eval_step(config)(
            state["params"], sharding.global_batch(batch(64))
        )
        used.append(autoencoding.health(jax.device_get(sums))["codes_used"])
    assert used[1] > used[0]


def test_an_evaluation_counts_every_real_image_once_and_whole_pixels(one_device):
    state, _ = trained(FSQ, EVERYTHING)
    given, eval_step = batch(), autoencoding.make_eval_step(FSQ)
    sums = jax.device_get(eval_step(state["params"], sharding.global_batch(given)))
    seven = {"image": given["image"][:7], "mask": np.ones(7, np.float32)}
    alone = [
        jax.device_get(eval_step(state["params"], sharding.global_batch(
            {name: value[i : i + 1] for name, value in seven.items()})))
        for i in range(7)
    ]  # fmt: skip
    assert sums["images"] == 7 and sums["counts"].sum() == 7 * 16
    for name in sums:
        np.testing.assert_allclose(sums[name], sum(each[name] for each in alone), rtol=1e-4)


def test_health_of_known_counts():
    counts = np.array([4, 4, 0, 8, 0, 0, 0, 0])
    sums = {"images": 2.0, "counts": counts, "squared_error": 10.0, "psnr_db": 60.0}
    sums |= {"ssim": 1.5, "same_codes": 1.0}
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
    }


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
    found = reconstruction.ssim(jnp.float32(x), jnp.float32(y), 255.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    np.testing.assert_allclose(reconstruction.ssim(jnp.float32(x), jnp.float32(x), 255.0), 1.0)
    assert np.isfinite(reconstruction.ssim(jnp.zeros((1, 8, 8, 1)), jnp.ones((1, 8, 8, 1)))).all()


def test_a_gradient_loss_sees_edges_and_not_a_shift_of_brightness():
    x = jnp.asarray(generator().uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    np.testing.assert_allclose(reconstruction.gradient(x, x + 0.25), 0, atol=1e-6)
    step = jnp.zeros((1, 16, 16, 1)).at[:, :, 8:].set(1.0)
    # One of 15 neighbours along a row differs, then one of 7, then one of 3.
    np.testing.assert_allclose(
        reconstruction.gradient(step, 0 * step), 1 / 15 + 1 / 7 + 1 / 3, rtol=1e-6
    )
    assert reconstruction.psnr(jnp.float32(0.04)) == pytest.approx(20.0)
