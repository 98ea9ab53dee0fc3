"""A torch-geometric network in an Equinox model: handwritten digits, of which five of each kind have labels.

Each of scikit-learn's digits is a node, linked to those that look most like it. The encoder is torch-geometric's
GraphSAGE, a `torch.nn.Module`; the head is Equinox's; optax trains both. Several models, each with other labels, are
trained at once by `eqx.filter_vmap`, with the links and without them. Before that, the gradients of one are compared
with torch.autograd's, and what it gives for the nodes in another order.

    python examples/graphs.py --output graphs.png
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from gallery import DARK, LIGHT, check, figure, parse_arguments, progress, save
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch_geometric.nn import GraphSAGE  # pyright: ignore[reportMissingImports]

HIDDEN, LABELLED = 32, 5
"""The width of the encoder, and how many labels of each kind there are."""

Nodes = Float[Array, "nodes 64"]
Edges = Int[Array, "2 edges"]


class Classifier(eqx.Module):
    """Logits of each node."""

    encoder: torchleaf.TorchModule
    head: eqx.nn.Linear

    def __init__(self, network: torch.nn.Module, key: Array):
        self.encoder = torchleaf.TorchModule(network, copy=True)
        self.head = eqx.nn.Linear(HIDDEN, 10, key=key)

    def __call__(self, nodes: Nodes, edges: Edges) -> Float[Array, "nodes 10"]:
        return jax.vmap(self.head)(jax.nn.relu(self.encoder(nodes, edges)))


def make_graph(neighbours: int = 8) -> tuple[Nodes, Edges, Int[Array, " nodes"]]:
    """Images, links to the nearest ones, and labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    links = kneighbors_graph(images, neighbours)
    return jnp.asarray(images), jnp.asarray(np.stack((links + links.T).nonzero())), jnp.asarray(labels)


def choose(labels: Int[Array, " nodes"], seed: int) -> Float[np.ndarray, " nodes"]:
    """One where a node's label is known, `LABELLED` of each kind, and else zero."""
    rng = np.random.default_rng(seed)
    known = np.zeros(len(labels), np.float32)
    for kind in range(10):
        known[rng.choice(np.flatnonzero(labels == kind), LABELLED, replace=False)] = 1
    return known


def loss_fn(model: Classifier, nodes: Nodes, edges: Edges, labels: Array, known: Array) -> tuple[Array, Array]:
    """Cross entropy of the known labels; and how many of the others are right."""
    logits = model(nodes, edges)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    accuracy = jnp.sum((logits.argmax(-1) == labels) * (1 - known)) / jnp.sum(1 - known)
    return jnp.sum(losses * known) / jnp.sum(known), accuracy


def compare(model: Classifier, nodes: Nodes, edges: Edges, labels: Array, known: Array) -> None:
    """Gradients by all weights, and of the nodes in another order."""
    network, head = torchleaf.to_torch_module(model.encoder), torch.nn.Linear(HIDDEN, 10)
    with torch.no_grad():
        for mine, theirs in ((head.weight, model.head.weight), (head.bias, model.head.bias)):
            mine.copy_(torchleaf.to_torch(theirs))
    x, links, targets, chosen = (torch.tensor(np.asarray(a)) for a in (nodes, edges, labels, known))
    logits = head(network(x, links.long()).relu())
    losses = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
    ((losses * chosen).sum() / chosen.sum()).backward()
    grads = eqx.filter_jit(eqx.filter_grad(loss_fn, has_aux=True))(model, nodes, edges, labels, known)[0]
    found = {**grads.encoder.params, "head": grads.head.weight}
    expected = {**{name: p.grad for name, p in network.named_parameters()}, "head": head.weight.grad}
    expected = {name: g.numpy() for name, g in expected.items() if g is not None}
    error = max(np.abs(np.asarray(found[name]) - g).max() for name, g in expected.items())
    check("gradients, JAX and torch.autograd", error / max(np.abs(g).max() for g in expected.values()), 1e-4)

    order = np.random.default_rng(0).permutation(len(nodes))
    again = model(nodes[order], jnp.argsort(order)[edges])
    check("logits of the nodes in another order", float(jnp.abs(again - model(nodes, edges)[order]).max()), 1e-4)


def train(
    models: Classifier, graph: tuple[Nodes, Edges, Array], known: Float[Array, "models nodes"], steps: int, name: str
):
    """The trained models, and the accuracies of each."""
    params, static = eqx.partition(models, torchleaf.trainable(models))
    optimizer = optax.adamw(1e-2, weight_decay=1e-2)

    @jax.jit
    @jax.vmap
    def step(params, opt_state, known):
        def of(params):
            return loss_fn(eqx.combine(params, static), *graph, known)

        (loss, accuracy), grads = jax.value_and_grad(of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, accuracy

    opt_state, accuracies = jax.vmap(optimizer.init)(params), []
    for _, bar in progress(range(steps), name):
        params, opt_state, loss, accuracy = step(params, opt_state, known)
        accuracies.append(np.asarray(accuracy))
        bar.set_postfix(loss=f"{float(loss.mean()):.3f}", accuracy=f"{accuracies[-1].mean():.1%}")
    return eqx.combine(params, static), np.array(accuracies)


def main() -> None:
    """Compare, train with links and without, draw."""
    arguments = parse_arguments(__doc__, "graphs.png")
    torch.manual_seed(arguments.seed)
    n, steps = (2, 30) if arguments.quick else (8, 200)
    nodes, edges, labels = make_graph()
    network, members = GraphSAGE(64, HIDDEN, num_layers=2), []
    for key in jax.random.split(jax.random.key(arguments.seed), n):
        network.reset_parameters()
        members.append(Classifier(network, key))
    known = jnp.stack([choose(labels, arguments.seed + i) for i in range(n)])
    compare(members[0], nodes, edges, labels, known[0])

    models, linked = train(torchleaf.stack(members), (nodes, edges, labels), known, steps, f"{n} models, with links")
    _, alone = train(torchleaf.stack(members), (nodes, edges[:, :0], labels), known, steps, f"{n} models, without")
    check("wrong labels with links, for each without", float((1 - linked[-1].mean()) / (1 - alone[-1].mean())), 0.8)

    picture, (curves, places) = figure(2)
    for accuracies, color, name in ((linked, DARK, "with links"), (alone, LIGHT, "without")):
        curves.plot(accuracies, color=color, linewidth=0.6)
        curves.plot(accuracies.mean(1), color=color, linewidth=2.2, label=name)
    curves.set(title=f"Accuracy, {LABELLED} labels of each digit", xlabel="step", ylim=(0.5, 1))
    curves.legend(frameon=False)
    first = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, models)
    hidden = first.encoder(nodes, edges)
    axes = jnp.linalg.svd(hidden - hidden.mean(0), full_matrices=False)[2]
    x, y = axes[:2] @ (hidden - hidden.mean(0)).T
    places.scatter(x, y, c=labels, cmap="tab10", s=2)
    places.set(title="The digits, as the encoder sees them", xticks=[], yticks=[])
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
