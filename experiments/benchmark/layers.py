"""A layer forward and backward, dense, ours and others': convs, MLPs, a ViT of them, routers alone.

Shapes: N nodes, T tokens, D width, H hidden width, E experts, K experts a token, d head width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, HeteroLinear
from torch_geometric.utils import to_torch_csr_tensor, to_undirected

from experiments.benchmark.measure import Benchmark, Step, Steps, check_equal, layer_step
from gmoe import AttentionVote, MLPExperts, MoE, MoEConv, TokenChoice
from gmoe.routers import build_router

NODE = 128
"""D of a node."""
TOKEN = 192
"""D of a token, whose MLPs have an H of 4 D; gated ones two thirds of it, and so the same FLOPs."""


def power_law_graph(nodes: int, edges: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw a graph with in-degrees by a power law: ``edge_index``, and CSR.

    Uniform nodes cite others by weights of a power law (exponent 2.7), in both directions.
    """
    if edges is None:
        edges = nodes * 1_166_243 // 169_343  # as many a node as in ogbn-arxiv
    cited = torch.multinomial(torch.rand(nodes).pow(-1 / 1.7), edges, replacement=True)
    edge_index = to_undirected(
        torch.stack([cited, torch.randint(nodes, (edges,))]), num_nodes=nodes
    )
    return edge_index, to_torch_csr_tensor(edge_index.flip([0]), size=(nodes, nodes))


class Masked(nn.Module):
    """What public GNN-MoEs do.

    Every expert of ``layer`` runs on the whole graph, and the routing is a mask.
    """

    def __init__(self, layer: MoEConv) -> None:
        super().__init__()
        self.router: Any = layer.router
        self.convs = nn.ModuleList(
            layer.experts.expert(index) for index in range(layer.num_experts)
        )

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the sum of all experts' outputs, most of them times zero."""
        weights = self.router(x).to_dense().T
        return torch.stack(
            [w_N[:, None] * conv(x, adj) for w_N, conv in zip(weights, self.convs, strict=True)]
        ).sum(0)


class Grouped(nn.Module):
    """What PyG offers.

    GCN aggregates once, and HeteroLinear takes the expert as the type of a row.
    """

    def __init__(self, layer: MoEConv) -> None:
        super().__init__()
        self.router: Any = layer.router
        experts: list[Any] = [layer.experts.expert(index) for index in range(layer.num_experts)]
        self.linear = HeteroLinear(
            layer.in_channels, layer.out_channels, layer.num_experts, is_sorted=True
        )
        self.linear.weight = nn.Parameter(torch.stack([expert.lin.weight.T for expert in experts]))
        self.linear.bias = nn.Parameter(torch.stack([expert.bias for expert in experts]))
        self.conv = experts[0]
        self.conv.lin = nn.Identity()
        self.conv.bias = None

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the weighted sum of each node's experts."""
        routing = self.router(x)
        y = self.linear(self.conv(x, adj)[routing.token], routing.expert) * routing.weight[:, None]
        return y.new_zeros(x.size(0), y.size(1)).index_add(0, routing.token, y)


class NonzeroLoop(nn.Module):
    """A loop over the experts of ``layer``, as in most published code.

    It finds the tokens of each expert by ``nonzero``.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.experts: Any = layer.experts

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`gmoe.MoE`."""
        weight_TE = self.router(x).to_dense()
        up = self.experts.up
        down = self.experts.down
        x_TD = x.reshape(-1, x.size(-1))
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.experts.num_experts):
            token = weight_TE[:, e].nonzero().squeeze(1)
            h = self.experts.activation(F.linear(x_TD[token], up.weight[e], up.bias[e]))
            h = F.linear(h, down.weight[e], down.bias[e])
            y_TD = y_TD.to(h.dtype).index_add(
                0, token, h * weight_TE[token, e].to(h.dtype)[:, None]
            )
        return y_TD.view(*x.shape[:-1], -1)


@torch.no_grad()
def mixtral(layer: MoE, implementation: str) -> nn.Module:
    """transformers' ``MixtralSparseMoeBlock``, ``"eager"`` (a loop) or ``"grouped_mm"``.

    For gated SiLU experts.
    """
    module = import_module("transformers.models.mixtral.modeling_mixtral")
    experts = cast(Any, layer.experts)
    sizes = {"hidden_size": experts.in_features, "intermediate_size": experts.hidden_features}
    sizes |= {"num_local_experts": experts.num_experts, "num_experts_per_tok": layer.k}
    config = module.MixtralConfig(**sizes, hidden_act="silu")
    config._experts_implementation = implementation
    block: Any = module.MixtralSparseMoeBlock(config)
    block.gate.weight.copy_(layer.get_parameter("router.gate.weight"))
    block.experts.gate_up_proj.copy_(experts.up.weight)
    block.experts.down_proj.copy_(experts.down.weight)
    # It takes and gives (B, T, D)
    block.register_forward_pre_hook(lambda _, args: (args[0][None],))
    block.register_forward_hook(lambda _, __, y: (y if isinstance(y, Tensor) else y[0])[0])
    return cast(nn.Module, block)


def naive_votes(router: AttentionVote, x: Tensor) -> Tensor:
    """(T, E) the votes of attention as they are written down: a (T, T) matrix an expert."""
    maps = (router.query, router.key)
    heads = (router.num_experts, router.head_dim)
    q_ETd, k_ETd = (linear(x).unflatten(-1, heads).transpose(0, 1) for linear in maps)
    return (q_ETd @ k_ETd.transpose(1, 2) / math.sqrt(router.head_dim)).softmax(dim=-1).sum(dim=1).T


@dataclass(frozen=True, kw_only=True)
class ConvBenchmark(Benchmark):
    """One layer on a random graph, as the plain mixture, as it is by default and beside a shared
    expert, beside a dense conv; E masked ones and PyG's HeteroLinear (of GCN experts) are
    checked to equal the plain one. The default size is ogbn-arxiv's."""

    conv: str = "gcn"
    """The conv, by the name that MoEConv takes; those of attention have 4 heads."""
    nodes: int = 169_343
    edges: int | None = None
    """Edges, before the reverse of each is added; by default as many a node as in ogbn-arxiv."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per node, K."""
    adjacency: tuple[Literal["edge_index", "csr"], ...] = ("edge_index", "csr")
    """How edges are given; every variant of a form is compared with the dense conv in that form."""
    masked: bool = True
    """Time E masked convs and HeteroLinear too."""
    compiled: bool = False
    """Time the dense conv under ``torch.compile(fullgraph=True)`` too, on edge_index alone:
    it does not take matrices."""

    def groups(self) -> Iterator[Steps]:
        forms = dict(
            zip(("edge_index", "csr"), power_law_graph(self.nodes, self.edges), strict=True)
        )
        x = torch.randn(self.nodes, NODE, requires_grad=True)
        heads: dict[str, Any] = {"heads": 4} if self.conv in ("gat", "gatv2", "transformer") else {}
        build: Any = partial(MoEConv, self.conv, NODE, NODE // heads.get("heads", 1), **heads)
        sizes = {f"E={e} K={k}": {"num_experts": e, "k": k} for e in self.experts for k in self.ks}
        # others are compared with what the layer gives, which noise would change
        plain = {"start": "plain", "router_kwargs": {"balance": None}}
        layers = {name: build(**size, **plain) for name, size in sizes.items()}
        others = {"masked": Masked} | ({"HeteroLinear": Grouped} if self.conv == "gcn" else {})
        for form in self.adjacency:
            inputs = (x, forms[form])
            timed = {"dense": next(iter(layers.values())).experts.expert(0)}
            if self.compiled and form == "edge_index":
                timed["compiled dense"] = copy.deepcopy(timed["dense"])
                timed["compiled dense"].compile(fullgraph=True)
            timed |= {f"MoEConv {name}": layer for name, layer in layers.items()}
            for name, size in sizes.items():
                timed[f"default MoEConv {name}"] = build(**size)
                timed[f"MoEConv with shared expert {name}"] = build(**size, start="shared")
            for name, layer in layers.items() if self.masked else ():
                for kind, make in others.items():
                    timed[f"{kind} {name}"] = other = make(layer)
                    check_equal(kind, other(*inputs), layer(*inputs))
            yield {f"{name}, {form}": layer_step(layer, inputs) for name, layer in timed.items()}


@dataclass(frozen=True, kw_only=True)
class FFNBenchmark(Benchmark):
    """One MoE layer (token choice, dropless) in place of an FFN, beside a loop with nonzero and
    transformers' Mixtral (if installed). Ratios are to the dense FFN with hidden width K·H in
    float32."""

    tokens: int = 8192
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per token, K."""
    peers: bool = True
    """Time others' layers too; with many experts the loop takes long."""

    def groups(self) -> Iterator[Steps]:
        x = torch.randn(self.tokens, TOKEN, requires_grad=True)
        for k in self.ks:
            hidden = 4 * k * TOKEN
            dense = nn.Sequential(nn.Linear(TOKEN, hidden), nn.GELU(), nn.Linear(hidden, TOKEN))
            layers = {f"dense K={k}": dense}
            for e in self.experts:
                layers |= {f"{name} E={e} K={k}": layer for name, layer in self._layers(e, k, x)}
            yield {
                f"{name}, {precision}": layer_step(layer, (x,), bf16=precision == "bf16")
                for name, layer in layers.items()
                for precision in ("fp32", "bf16")
            }

    def _layers(self, e: int, k: int, x: Tensor) -> Iterator[tuple[str, Any]]:
        """Ours and the others', each group with one set of weights, checked equal."""

        def layer(hidden: int, **options: Any) -> MoE:
            router = TokenChoice(
                TOKEN,
                num_experts=e,
                k=k,
                balance=None,
                weight="normalized" if k > 1 else "straight_through",
            )
            # Sums to 1, as others' do
            return MoE(router, MLPExperts(TOKEN, hidden, TOKEN, num_experts=e, **options))

        plain = layer(4 * TOKEN)
        gated = layer(8 * TOKEN // 3, activation="silu", glu=True, bias=False)
        pairs = {
            "gmoe auto": (plain, plain),
            "loop with nonzero": (NonzeroLoop(plain), plain),
            "gmoe gated": (gated, gated),
        }
        if find_spec("transformers"):
            pairs |= {
                f"Mixtral {way}": (mixtral(gated, way), gated) for way in ("eager", "grouped_mm")
            }
        for name, (other, ours) in pairs.items() if self.peers else [("gmoe auto", (plain, plain))]:
            check_equal(name, other(x), ours(x))
            yield name, other


@dataclass(frozen=True, kw_only=True)
class VitBenchmark(Benchmark):
    """A ViT of the size of the `cifar10` preset, 8 experts in every second block, expert choice, K
    = 1, random images; the experts run in several ways. Ratios are to the dense ViT."""

    batch: int = 128
    """Images."""
    bf16: bool = False
    """Under bfloat16 autocast, not in float32."""

    def groups(self) -> Iterator[Steps]:
        from gmoe.models.vit import ViTMoE  # torchvision, which graphs do without

        images = torch.randn(self.batch, 3, 32, 32)
        labels = torch.randint(10, (self.batch,))

        def loss(model: nn.Module, images: Tensor) -> Tensor:
            return F.cross_entropy(model(images), labels)

        def build(backend: Any = "auto", **options: Any) -> Any:
            torch.manual_seed(0)  # all ways to run the experts get the same ones
            size = {
                "image_size": 32,
                "patch_size": 4,
                "num_layers": 6,
                "num_heads": 4,
                "hidden_dim": 128,
                "mlp_dim": 256,
            }
            model: Any = ViTMoE(size, backend=backend, **options)
            # Which starts at zero, where all would be equal
            nn.init.normal_(model.heads[-1].weight)
            return model

        ways = {"loop with nonzero": build("loop", start="plain")}
        for block in ways["loop with nonzero"].encoder.layers[1::2]:
            block.mlp = NonzeroLoop(block.mlp)
        ways |= {
            backend: build(backend, start="plain") for backend in ("loop", "padded", "grouped")
        }
        for name, model in ways.items():
            check_equal(name, model(images), ways["loop"](images))
        # As ViTMoE is by default
        ways = {
            "dense": build(router=None),
            **ways,
            "with a shared expert": build(),
        }
        yield {
            name: layer_step(model, (images,), partial(loss, model), self.bf16)
            for name, model in ways.items()
        }


@dataclass(frozen=True, kw_only=True)
class RouterBenchmark(Benchmark):
    """Routers in an MLP layer, or in one of GCN experts on a random graph as CSR, whose default
    size is ogbn-arxiv's. Ratios of a router are to the layer that has it."""

    layer: Literal["ffn", "conv"] = "ffn"
    """The layer: of MLPs four times as wide inside, or of GCN experts."""
    tokens: int | None = None
    """T; by default 8,192, or of convs 169,343."""
    ks: tuple[int, ...] = (1,)
    """Experts per token, K."""

    def groups(self) -> Iterator[Steps]:
        convs = self.layer == "conv"
        tokens = self.tokens or (169_343 if convs else 8192)
        width = NODE if convs else TOKEN
        x = torch.randn(tokens, width, requires_grad=True)
        inputs = (x, power_law_graph(tokens)[1]) if convs else (x,)
        for k in self.ks:
            for name in ("token_choice", "expert_choice", "multi_centroid", "random"):
                layer: Any
                if convs:
                    layer = MoEConv("gcn", width, width, k=k, router=name, start="plain")
                else:
                    layer = MoE(
                        build_router(name, width, num_experts=8, k=k),
                        MLPExperts(width, 4 * width, width, num_experts=8),
                    )
                step = layer_step(layer, inputs)
                route = route_step(layer.router, x)
                yield {f"layer, {name} K={k}": step, f"router, {name} K={k}": route}


@dataclass(frozen=True, kw_only=True)
class VoteBenchmark(Benchmark):
    """Votes in one group of tokens, which are also the nodes of a random graph.

    Ratios are to a GATConv of one head.
    """

    tokens: int = 4096
    group: bool = True
    """Time the votes over the group too.
    Also by a (T, T) matrix an expert, which is checked to be equal."""

    def groups(self) -> Iterator[Steps]:
        edge_index, _ = power_law_graph(self.tokens)
        x = torch.randn(self.tokens, NODE, requires_grad=True)
        neighbors = AttentionVote(NODE, num_experts=8, scope="neighbors")
        steps = {"GATConv": layer_step(GATConv(NODE, NODE), (x, edge_index))}
        if self.group:
            vote = AttentionVote(NODE, num_experts=8)
            check_equal("naive votes", naive_votes(vote, x), vote(x).scores)
            steps["naive votes"] = layer_step(vote, (x,), partial(naive_votes, vote))
            steps["AttentionVote, group"] = route_step(vote, x)
        yield steps | {"AttentionVote, neighbors": route_step(neighbors, x, edge_index)}


def route_step(router: nn.Module, x: Tensor, edge_index: Tensor | None = None) -> Step:
    """Scoring and selection, and the way back from the weights of the pairs, where there is one."""
    return layer_step(router, (x,), lambda x: router(x, edge_index=edge_index).weight)
