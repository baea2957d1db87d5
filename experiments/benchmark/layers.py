"""A layer forward and backward, dense, ours and others': convs, MLPs, a ViT of them, routers alone.

Shapes: N nodes, T tokens, D width, H hidden width, E experts, K experts a token, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch
from torch_geometric.datasets import FakeDataset
from torch_geometric.nn import GATConv, Sequential
from torch_geometric.utils import to_torch_csr_tensor, to_undirected

from experiments.benchmark import peers
from experiments.benchmark.measure import Benchmark, Step, Steps, check_equal, layer_step
from gmoe import AttentionVote, MLPExperts, MoE, MoEConv, TokenChoice, build_router
from gmoe.conv.kinds import factory_of
from gmoe.routers.attention_vote import neighbor_votes

NODE, TOKEN = 128, 192
"""D of a node and of a token, whose MLPs have an H of 4 D; gated ones two thirds of it, and so the same FLOPs."""


def power_law_graph(nodes: int, edges: int) -> tuple[Tensor, Tensor]:
    """Uniform nodes cite others by weights of a power law (exponent 2.7), in both directions: edge_index, and CSR."""
    cited = torch.multinomial(torch.rand(nodes).pow(-1 / 1.7), edges, replacement=True)
    edge_index = to_undirected(torch.stack([cited, torch.randint(nodes, (edges,))]), num_nodes=nodes)
    return edge_index, to_torch_csr_tensor(edge_index.flip([0]), size=(nodes, nodes))


def leaf(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """An input, and the gradient of an output of its shape."""
    return torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)


@dataclass(frozen=True, kw_only=True)
class ConvBenchmark(Benchmark):
    """One layer on a random graph; the default size is ogbn-arxiv's, with both directions of every edge."""

    conv: str = "gcn"
    """The conv, by the name that MoEConv takes."""
    heads: int = 1
    """Attention heads, of the convs that have them."""
    nodes: int = 169_343
    """Nodes."""
    edges: int = 1_166_243
    """Edges, before the reverse of each is added."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per node, K."""
    adjacency: tuple[Literal["edge_index", "csr"], ...] = ("edge_index", "csr")
    """How edges are given; every variant of a form is compared with the dense conv in that form."""
    masked: bool = True
    """Time E convs on the whole graph too, each masked by the routing, and of GCN experts PyG's HeteroLinear on the
    aggregate; and check that the layer equals them."""

    SMALL: ClassVar = {"repeats": 3, "nodes": 5000, "edges": 34_000}

    def groups(self) -> Iterator[Steps]:
        if NODE % self.heads:
            raise ValueError(f"heads: got {self.heads}, expected a divisor of the width, {NODE}")
        forms = dict(zip(("edge_index", "csr"), power_law_graph(self.nodes, self.edges), strict=True))
        x, grad = leaf(self.nodes, NODE)
        # others are compared with what the layer gives, which noise would change
        options: dict[str, Any] = {"shared_expert": False, "router_kwargs": {"balance": None}}
        options |= {"heads": self.heads} if self.heads > 1 else {}
        layers = {
            f"E={e} K={k}": MoEConv(self.conv, NODE, NODE // self.heads, num_experts=e, k=k, **options)
            for e in self.experts
            for k in self.ks
        }
        others = {"masked": peers.Masked} | ({"HeteroLinear": peers.Grouped} if self.conv == "gcn" else {})
        for form in self.adjacency:
            inputs = (x, forms[form])
            timed = {"dense": next(iter(layers.values())).experts.expert(0)}
            timed |= {f"MoEConv {name}": layer for name, layer in layers.items()}
            for name, layer in layers.items() if self.masked else ():
                for kind, make in others.items():
                    timed[f"{kind} {name}"] = other = make(layer)
                    check_equal(kind, other(*inputs), layer(*inputs))
            yield {f"{name}, {form}": layer_step(layer, inputs, grad) for name, layer in timed.items()}


@dataclass(frozen=True, kw_only=True)
class MoleculesBenchmark(Benchmark):
    """Four GINE layers of 64 with gmoe's defaults in their place, on 128 molecules, as in PyG's molecule examples."""

    def groups(self) -> Iterator[Steps]:
        molecules = FakeDataset(num_graphs=128, avg_num_nodes=25, avg_degree=2.2, num_channels=64, edge_dim=64)
        batch = Batch.from_data_list(list(molecules)).to(self.device)
        x, grad = leaf(batch.num_nodes, 64)

        def step(conv: Callable[..., nn.Module]) -> Step:
            layers = [((conv(64, 64), "x, edge_index, edge_attr -> x"), nn.ReLU()) for _ in range(4)]
            stack = Sequential("x, edge_index, edge_attr", [part for layer in layers for part in layer])
            return layer_step(stack, (x, batch.edge_index, batch.edge_attr), grad)

        yield {"dense": step(factory_of("gine")), "MoEConv": step(partial(MoEConv, "gine"))}


@dataclass(frozen=True, kw_only=True)
class FFNBenchmark(Benchmark):
    """One MoE layer in place of a transformer's FFN; token choice, dropless. Ratios are to the dense FFN with hidden
    width K·H in float32."""

    tokens: int = 8192
    """T."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per token, K."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)
    """float32, or bfloat16 by autocast."""
    peers: bool = True
    """Time others' layers too, where they are installed."""

    SMALL: ClassVar = {"repeats": 3, "tokens": 1024}

    def groups(self) -> Iterator[Steps]:
        x, grad = leaf(self.tokens, TOKEN)
        for k in self.ks:
            hidden = 4 * k * TOKEN
            dense = nn.Sequential(nn.Linear(TOKEN, hidden), nn.GELU(), nn.Linear(hidden, TOKEN))
            layers: dict[str, nn.Module] = {f"dense K={k}": dense}
            for e in self.experts:
                layers |= {f"{name} E={e} K={k}": layer for name, layer in self._layers(e, k, x)}
            steps = {f"dense K={k}, fp32": layer_step(dense, (x,), grad)}
            for name, layer in layers.items():
                for precision in self.precisions:
                    steps[f"{name}, {precision}"] = layer_step(layer, (x,), grad, precision == "bf16")
            yield steps

    def _layers(self, e: int, k: int, x: Tensor) -> Iterator[tuple[str, nn.Module]]:
        """Ours and the others', each group with one set of weights, checked equal."""

        def layer(hidden: int, **options: Any) -> MoE:
            router = TokenChoice(TOKEN, e, k, balance=None, weight="normalized" if k > 1 else "straight_through")
            return MoE(router, MLPExperts(TOKEN, hidden, TOKEN, num_experts=e, **options))  # sums to 1, as others' do

        plain, gated = layer(4 * TOKEN), layer(8 * TOKEN // 3, activation="silu", glu=True, bias=False)
        yield "gmoe auto", plain
        others: dict[str, tuple[MoE, nn.Module | None]] = {
            "loop with nonzero": (plain, peers.NonzeroLoop(plain)),
            "pytorch-mixtures": (plain, peers.pytorch_mixtures(plain)),
            "st-moe-pytorch": (plain, peers.st_moe(plain)),
            "gmoe gated": (gated, gated),
            "Mixtral eager": (gated, peers.mixtral(gated, "eager")),
            "Mixtral grouped_mm": (gated, peers.mixtral(gated, "grouped_mm")),
        }
        for name, (ours, other) in others.items() if self.peers else ():
            if other is not None:
                if name != "st-moe-pytorch":  # whose capacity and second choice are its own
                    check_equal(name, other(x), ours(x))
                yield name, other


@dataclass(frozen=True, kw_only=True)
class VitBenchmark(Benchmark):
    """A ViT of the size of the `cifar10` preset, 8 experts in every second block, expert choice, K = 1, random images;
    the experts run in several ways. Ratios are to the dense ViT."""

    batch: int = 128
    """Images."""
    bf16: bool = False
    """Under bfloat16 autocast, not in float32."""

    SMALL: ClassVar = {"repeats": 3, "batch": 16}

    def groups(self) -> Iterator[Steps]:
        from gmoe.models.vit import ViTMoE, ViTSize  # torchvision, which graphs do without

        images, labels = torch.randn(self.batch, 3, 32, 32), torch.randint(10, (self.batch,))

        def step(model: nn.Module) -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad()

        def build(backend: Any = "auto", **options: Any) -> Any:
            torch.manual_seed(0)  # all ways to run the experts get the same ones
            size = ViTSize(image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=256)
            model: Any = ViTMoE(size, backend=backend, **options)
            nn.init.normal_(model.heads[-1].weight)  # which starts at zero, where all would be equal
            return model

        ways: dict[str, Any] = {"loop with nonzero": build("loop", shared_expert=False)}
        for block in ways["loop with nonzero"].encoder.layers[1::2]:
            block.mlp = peers.NonzeroLoop(block.mlp)
        ways |= {backend: build(backend, shared_expert=False) for backend in ("loop", "padded", "grouped")}
        for name, model in ways.items():
            check_equal(name, model(images), ways["loop"](images))
        models = {"dense": build(router=None), **ways, "with a shared expert": build()}  # as ViTMoE is by default
        yield {name: partial(step, model) for name, model in models.items()}


@dataclass(frozen=True, kw_only=True)
class RouterBenchmark(Benchmark):
    """Routers in an MLP layer, or in one of GCN experts on CSR. Ratios of a router are to the layer that has it."""

    layer: Literal["ffn", "conv"] = "ffn"
    """The layer: of MLPs four times as wide inside, or of GCN experts on a random graph."""
    tokens: int | None = None
    """T; by default 8,192, or of convs ogbn-arxiv's 169,343."""
    edges: int = 1_166_243
    """Of convs: edges, before the reverse of each is added."""
    ks: tuple[int, ...] = (1,)
    """Experts per token, K."""

    SMALL: ClassVar = {"repeats": 3, "tokens": 2048, "edges": 14_000}

    def groups(self) -> Iterator[Steps]:
        convs = self.layer == "conv"
        tokens, width = self.tokens or (169_343 if convs else 8192), NODE if convs else TOKEN
        x, grad = leaf(tokens, width)
        inputs = (x, power_law_graph(tokens, self.edges)[1]) if convs else (x,)
        for k in self.ks:
            for name in ("token_choice", "expert_choice", "multi_centroid", "random"):
                layer: Any
                if convs:
                    layer = MoEConv("gcn", width, width, k=k, router=name, shared_expert=False)
                else:
                    layer = MoE(build_router(name, width, 8, k), MLPExperts(width, 4 * width, width, num_experts=8))
                step, route = layer_step(layer, inputs, grad), route_step(layer.router, x)
                yield {f"layer, {name} K={k}": step, f"router, {name} K={k}": route}


@dataclass(frozen=True, kw_only=True)
class VoteBenchmark(Benchmark):
    """One group of tokens, which are also the nodes of a random graph. Ratios are to a dense GATConv of one head."""

    tokens: int = 4096
    """T; ogbn-arxiv has 169,343."""
    edges: int = 28_210
    """Edges, before the reverse of each is added; the default has ogbn-arxiv's mean degree, whose own are 1,166,243."""
    group: bool = True
    """Time the votes over the group too, by a (T, T) matrix an expert and in blocks, which are checked to be equal."""

    SMALL: ClassVar = {"repeats": 3, "tokens": 1024, "edges": 7000}

    def groups(self) -> Iterator[Steps]:
        (edge_index, _), (x, back) = power_law_graph(self.tokens, self.edges), leaf(self.tokens, NODE)
        q, k = (torch.randn(self.tokens, 8, 32, requires_grad=True) for _ in range(2))
        grad = torch.randn(self.tokens, 8)

        def votes(call: Callable[[Tensor, Tensor], Tensor]) -> None:
            call(q, k).backward(grad)
            q.grad = k.grad = None

        def vote(scope: Literal["group", "neighbors"]) -> Step:
            return route_step(AttentionVote(NODE, 8, scope=scope, head_dim=32), x, edge_index)

        steps: dict[str, Step] = {"GATConv": layer_step(GATConv(NODE, NODE), (x, edge_index), back)}
        if self.group:
            check_equal("votes in blocks", peers.block_votes(q, k), peers.naive_votes(q, k))
            ways = {"naive votes": peers.naive_votes, "votes in blocks": peers.block_votes}
            steps |= {name: partial(votes, way) for name, way in ways.items()} | {"AttentionVote, group": vote("group")}
        steps["votes of neighbors"] = partial(votes, lambda q, k: neighbor_votes(q / 32**0.5, k, edge_index))
        yield steps | {"AttentionVote, neighbors": vote("neighbors")}


def route_step(router: nn.Module, x: Tensor, edge_index: Tensor | None = None) -> Step:
    """Scoring and selection, and the way back from the weights of the pairs, where there is one."""

    def step() -> None:
        weight = router(x, edge_index=edge_index).weight
        if weight.requires_grad:
            weight.sum().backward()
        router.zero_grad()
        x.grad = None

    return step
