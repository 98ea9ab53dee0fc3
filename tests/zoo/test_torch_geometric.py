"""PyG: message passing, attention, pooling by a batch index, SchNet."""

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

NODES, FEATURES = 6, 4


def edge_index() -> torch.Tensor:
    """A ring with a chord, both ways."""
    senders = torch.arange(NODES)
    one_way = torch.stack([senders, (senders + 1) % NODES])
    chord = torch.tensor([[0, 3], [3, 0]])
    return torch.cat([one_way, one_way.flip(0), chord], dim=1)


EDGES = 2 * NODES + 2


def graph() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(NODES, FEATURES), edge_index()


def graph_with_edge_features() -> tuple[torch.Tensor, ...]:
    return *graph(), torch.randn(EDGES, 3)


class TwoGraphs(nn.Module):
    """A graph classifier, as in PyG's introduction: convolutions, a readout by batch index, a linear layer."""

    def __init__(self, readout: str):
        super().__init__()
        import torch_geometric.nn as pyg

        self.first, self.second = pyg.GCNConv(FEATURES, 8), pyg.GCNConv(8, 8)
        self.readout = getattr(pyg, readout)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x, edge_index).relu(), edge_index)
        return self.head(self.readout(x, batch, size=2))


class NodeClassifier(nn.Module):
    """The GCN of PyG's introduction, with its dropout."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.second = GCNConv(FEATURES, 8), GCNConv(8, 3)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.first(x, edge_index).relu(), training=self.training)
        return nn.functional.log_softmax(self.second(x, edge_index), dim=1)


class TopK(nn.Module):
    """Keeps the highest scored half of the nodes."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv, TopKPooling

        self.convolution, self.pool = GCNConv(FEATURES, 8), TopKPooling(8, ratio=0.5)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.pool(self.convolution(x, edge_index).tanh(), edge_index)[0].sum(0)


class AllPairs(nn.Module):
    """SchNet's interaction graph without torch-cluster: every pair of atoms of one molecule."""

    def forward(self, pos: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = pos.shape[0]
        senders, receivers = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        keep = (senders != receivers).flatten()
        edge_index = torch.stack([senders.flatten()[keep], receivers.flatten()[keep]])
        return edge_index, (pos[edge_index[0]] - pos[edge_index[1]]).norm(dim=-1)


def layer(name: str, *args: object, **options: object) -> nn.Module:
    import torch_geometric.nn as pyg

    return getattr(pyg, name)(*args, **options)


def schnet() -> nn.Module:
    from torch_geometric.nn import SchNet

    return SchNet(
        hidden_channels=8,
        num_filters=8,
        num_interactions=2,
        num_gaussians=6,
        interaction_graph=AllPairs(),
        readout="add",
    )


def gin() -> nn.Module:
    from torch_geometric.nn import GINConv

    return GINConv(nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 4)), train_eps=True)


def nnconv() -> nn.Module:
    from torch_geometric.nn import NNConv

    return NNConv(FEATURES, 3, nn.Sequential(nn.Linear(3, FEATURES * 3), nn.Tanh()), aggr="mean")


def pna() -> nn.Module:
    from torch_geometric.nn import PNAConv

    return PNAConv(FEATURES, 5, ["mean", "max", "std"], ["identity", "amplification"], deg=torch.tensor([0, 0, 4, 2]))


def two_graphs() -> tuple[torch.Tensor, ...]:
    return torch.randn(NODES, FEATURES), edge_index(), torch.tensor([0, 0, 0, 1, 1, 1])


test_torch_geometric = zoo_test(
    "torch_geometric",
    Specimen("GCNConv", lambda: layer("GCNConv", FEATURES, 3), graph),
    Specimen("GCN with dropout", NodeClassifier, graph, random=True),
    Specimen("GATConv", lambda: layer("GATConv", FEATURES, 3, heads=2), graph),
    Specimen("GATv2Conv", lambda: layer("GATv2Conv", FEATURES, 3, heads=2, edge_dim=3), graph_with_edge_features),
    Specimen("GAT with dropout", lambda: layer("GAT", FEATURES, 8, 2, 3, heads=2, dropout=0.3), graph, random=True),
    Specimen("TransformerConv", lambda: layer("TransformerConv", FEATURES, 3, heads=2), graph),
    Specimen("GraphSAGE", lambda: layer("GraphSAGE", FEATURES, 8, 2, 3), graph),
    Specimen("GINConv", gin, graph),
    Specimen("NNConv", nnconv, graph_with_edge_features),
    Specimen("PNAConv", pna, graph),
    Specimen("ChebConv", lambda: layer("ChebConv", FEATURES, 3, K=3), graph),
    Specimen("GatedGraphConv", lambda: layer("GatedGraphConv", 6, num_layers=2), graph),
    Specimen("BatchNorm", lambda: layer("BatchNorm", FEATURES), lambda: (torch.randn(NODES, FEATURES),), training=True),
    Specimen("mean readout", lambda: TwoGraphs("global_mean_pool"), two_graphs),
    Specimen("max readout", lambda: TwoGraphs("global_max_pool"), two_graphs),
    Specimen("TopKPooling", TopK, graph),
    Specimen("SchNet", schnet, lambda: (torch.tensor([6, 1, 1, 8]), torch.randn(4, 3))),
)
