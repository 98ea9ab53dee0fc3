"""A diffusion model: a U-Net of diffusers is the score network of a sampler in JAX, which draws digits.

The network is a small `UNet2DModel`, told which digit it is to draw. optax trains it to find the noise in noisy images
of scikit-learn's digits; the sampler (DDIM) is a `jax.lax.scan` around it, one compiled program. Before training, its
gradients are compared with torch.autograd's, and the samples with those of diffusers' own scheduler, in torch. After
it, a classifier that knows the real digits is asked what it sees.

    python examples/diffusion.py --output diffusion.png
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from diffusers.models.unets.unet_2d import UNet2DModel  # pyright: ignore[reportMissingImports]
from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # pyright: ignore[reportMissingImports]
from digits import load_data
from gallery import DARK, check, figure, parse_arguments, progress, save, show_images
from jaxtyping import Array, Float, Int
from sklearn.svm import SVC

TIMES, STEPS = 1000, 50
"""How many levels of noise there are, and how many of them the sampler takes."""
KEPT = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, TIMES))
"""How much of an image's variance is left at each level."""

Images = Float[Array, "n 1 8 8"]
Labels = Int[Array, " n"]


def make_network() -> UNet2DModel:
    """Some 0.3 million weights."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=10,
    )


def loss_fn(model: torchleaf.TorchModule, images: Images, labels: Labels, times: Int[Array, " n"], noise: Images):
    """How far the noise is from what the network takes for it, mean square."""
    kept = KEPT[times][:, None, None, None]
    noisy = jnp.sqrt(kept) * images + jnp.sqrt(1 - kept) * noise
    return jnp.mean((model(noisy, times, class_labels=labels).sample - noise) ** 2)


@eqx.filter_jit
def sample(model: torchleaf.TorchModule, noise: Images, labels: Labels) -> Images:
    """Images from noise, by DDIM.

    Source: Song et al., "Denoising Diffusion Implicit Models" (2021).
    """

    def step(images, time):
        found = model(images, time, class_labels=labels).sample
        kept = KEPT[time]
        earlier = jnp.where(time < TIMES // STEPS, 1.0, KEPT[time - TIMES // STEPS])
        clean = jnp.clip((images - jnp.sqrt(1 - kept) * found) / jnp.sqrt(kept), -1, 1)
        return jnp.sqrt(earlier) * clean + jnp.sqrt(1 - earlier) * found, None

    times = jnp.arange(0, TIMES, TIMES // STEPS)[::-1]
    return jax.lax.scan(step, noise, times)[0]


def compare(model: torchleaf.TorchModule, images: Images, labels: Labels, key: Array) -> None:
    """Gradients, and samples, of the same module in torch alone."""
    network, scheduler = torchleaf.to_torch_module(model), DDIMScheduler()
    noise, times = jax.random.normal(key, images.shape), jnp.arange(len(images)) * 99
    x, y, t, z = (torch.tensor(np.asarray(a)) for a in (images, labels, times, noise))
    noisy = scheduler.add_noise(x, z, t)  # pyright: ignore[reportArgumentType]
    ((network(noisy, t, class_labels=y).sample - z) ** 2).mean().backward()
    found = eqx.filter_jit(eqx.filter_grad(loss_fn))(model, images, labels, times, noise).params
    expected = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
    error = max(np.abs(np.asarray(found[name]) - g).max() for name, g in expected.items())
    check("gradients, JAX and torch.autograd", error / max(np.abs(g).max() for g in expected.values()), 1e-3)

    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for time in scheduler.timesteps:
            z = scheduler.step(network(z, time, class_labels=y).sample, int(time), z, return_dict=False)[0]
    check("samples, of lax.scan and of diffusers", float(jnp.abs(sample(model, noise, labels) - z.numpy()).max()), 1e-2)


def train(model: torchleaf.TorchModule, images: Images, labels: Labels, steps: int, key: Array):
    """The model with a moving average of the weights, and the losses."""
    params, static = eqx.partition(model, torchleaf.trainable(model))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(params, average, opt_state, key):
        chosen, times = jax.random.randint(key, (2, 64), 0, jnp.asarray([[len(images)], [TIMES]]))
        batch = images[chosen], labels[chosen], times, jax.random.normal(key, (64, 1, 8, 8))
        loss, grads = jax.value_and_grad(lambda params: loss_fn(eqx.combine(params, static), *batch))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 0.02), opt_state, loss

    average, opt_state, losses = params, optimizer.init(params), []
    for i, bar in progress(range(steps), "training"):
        params, average, opt_state, loss = step(params, average, opt_state, jax.random.fold_in(key, i))
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return eqx.combine(average, static), losses


def main() -> None:
    """Compare, train, sample, draw."""
    arguments = parse_arguments(__doc__, "diffusion.png")
    torch.manual_seed(arguments.seed)
    keys = jax.random.split(jax.random.key(arguments.seed), 3)
    digits, unseen = load_data(arguments.seed)
    images, labels = jnp.asarray(2 * digits.images - 1), jnp.asarray(digits.labels)
    model = torchleaf.TorchModule(make_network())
    compare(model, images[:10], labels[:10], keys[0])
    model, losses = train(model, images, labels, 20 if arguments.quick else 1500, keys[1])

    wanted = jnp.arange(20 if arguments.quick else 100) % 10
    drawn = sample(model, jax.random.normal(keys[2], (len(wanted), 1, 8, 8)), wanted)
    classifier = SVC().fit(images.reshape(-1, 64), labels)
    wrong = 1 - classifier.score(2 * unseen.images.reshape(-1, 64) - 1, unseen.labels)
    check("real digits that a classifier takes for another", wrong, 0.05)
    wrong = float(np.mean(classifier.predict(drawn.reshape(-1, 64)) != wanted))
    if not arguments.quick:
        check("samples that it takes for another", wrong, 0.15)

    picture, (curve, real, made) = figure(3)
    curve.semilogy(losses, color=DARK, linewidth=0.6)
    curve.set(title="Training loss", xlabel="step")
    rows = min(6, len(wanted) // 10)
    show_images(real, np.stack([images[labels == kind][:rows, 0] for kind in range(10)], 1), "Digits")
    show_images(made, np.asarray(drawn).reshape(-1, 10, 8, 8)[:rows], "Drawn by the model")
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
