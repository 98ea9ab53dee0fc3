"""One minute: views, a call, gradients by live residuals, the stream, and that nothing waits for the GPU."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf
from torchleaf.interop.calls import residuals
from torchleaf.interop.replay import cuda_graphs

jax.config.update("jax_default_matmul_precision", "highest")
counts = {"launched": 0, "used": 0}


def counted(owner, method, name):
    original = getattr(owner, method)

    def call(self, *args):
        counts[name] += 1
        return original(self, *args)

    setattr(owner, method, call)


counted(cuda_graphs._Graph, "launch", "launched")
counted(residuals.Store, "take", "used")

torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).cuda()
model, x = torchleaf.TorchModule(module), jnp.linspace(-1, 1, 40).reshape(5, 8)
assert model.params["0.weight"].unsafe_buffer_pointer() == module[0].weight.data_ptr()
print("views: ok")

step = eqx.filter_jit(eqx.filter_value_and_grad(lambda m, x: jnp.mean(m(x) ** 2)))
for _ in range(6):
    value, grads = step(model, x)
expected = (module(torchleaf.to_torch(x)) ** 2).mean()
expected.backward()
np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
for name, parameter in module.named_parameters():
    np.testing.assert_allclose(grads.params[name], parameter.grad.cpu(), rtol=1e-3, atol=1e-6)
print("values and gradients: ok", counts)
assert counts["used"] == 6

jax.block_until_ready(grads)
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")
for _ in range(10):
    value, grads = step(model, x)
torch.cuda.set_sync_debug_mode("default")
jax.block_until_ready(grads)
print("no synchronisation: ok", counts)

seen = []
jax.block_until_ready(
    jax.jit(torchleaf.torch_function(lambda x: (seen.append(torch.cuda.current_stream().cuda_stream), x * 2)[1]))(x)
)
assert seen[-1] != torch.cuda.default_stream().cuda_stream
key = jax.random.key(0)
noisy = jax.jit(lambda x, key: torchleaf.torch_function(torch.nn.functional.dropout)(x, key=key))
np.testing.assert_array_equal(noisy(x, key), noisy(x, key))
print("streams and keys: ok; all is well")
