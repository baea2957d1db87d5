"""BlockGNN: a GNN of pre-norm residual blocks, each a conv and a feed-forward part.

Shapes: N nodes, n of them destinations, M edges, C columns of a conv's output, H hidden width, O
out channels, E experts, K experts per node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gmoe._checks import check
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import ConvFactory, by_name, kinds_of
from gmoe.conv.router_input import RouterInput, router_parts
from gmoe.convert import experts_of
from gmoe.models.layered import LayeredGNN
from gmoe.models.layers import (
    build_conv,
    build_router_of,
    build_shared_router,
    columns_of,
    layers_with_experts,
    start_of,
    take_costs,
    taken_from,
)
from gmoe.models.parts import Activation, Nodes, Norm, is_by_row, norm_of
from gmoe.moe import MoE
from gmoe.recorded import Recorded, given_to
from gmoe.routers import ROUTERS, RouterLike
from gmoe.routing import Routing
from gmoe.start import Start, drawn_apart

OF_EXPERTS = ("start", "router_kwargs")
"""The arguments of a :class:`gmoe.MoEConv` that experts behind a conv have, too."""


class BlockGNN(LayeredGNN):
    r"""A GNN of pre-norm residual blocks, with experts in their feed-forward parts.

    .. math::
        h^{(l+1)} = h^{(l)} + \mathrm{FFN}_l(\mathrm{conv}_l(\mathrm{norm}(h^{(l)}), A))

    between linear layers, as in `Platonov et al., 2023 <https://arxiv.org/abs/2302.11640>`_ and in
    graph transformers. The FFN is an MLP, or in its place a :class:`MoE` of them, as :func:`moefy`
    has it in a ViT; the convs are plain. For experts in convs, see :class:`GNNMoE`.

    Args:
        in_channels: width of the input.
        hidden_channels: H, width of the blocks, and of their MLPs inside.
        out_channels: width of the output, such as the number of classes.
        num_layers: number of blocks (default 2).
        conv: the kind of the convs, see :class:`MoEConv` (default ``"gcn"``). They may give any
            number of columns.
        router: a name or factory (default ``"token_choice"``); an instance is allowed with
            ``shared_router`` or a single block with experts. ``None`` builds the dense baseline:
            the same model with MLPs in all blocks.
        num_experts: E (default 8).
        k: K, experts per node (default 1).
        shared_router: route each node once, from the raw features, for all blocks (``True``), or
            let each block route by what its conv gives (``False``). By default (``None``) once if
            the blocks start as copies.
        router_input: what a shared router sees: the ``"node"`` (default), its ``"neighbors"``, its
            ``"degree"``, or several of them.
        every: block ``i`` has experts if ``i % every == every - 1`` (default 1).
        dropout: default 0.
        input_dropout: dropout of the input features (default 0).
        act: a name, a function or a module (default relu).
        norm: a name or a module, which has to treat each node by itself (default a
            ``nn.LayerNorm``). Another one follows the last block.
        **conv_kwargs: ``start`` and ``router_kwargs`` of :class:`MoEConv`; the others
            are arguments of the convs. By default, blocks have ``start="copies"`` if they are
            routed once, by a router whose weights of a node sum to 1; else ``"shared"``.

    Shapes:
        - as :class:`GNNMoE`.

    Raises:
        ValueError: several kinds of convs; a norm that mixes nodes; a router instance for several
            blocks; a ``router_input`` of routers in the blocks.

    Example:
        >>> model = BlockGNN(128, 256, 40, num_layers=5, conv="bare_sage", act="gelu")
        >>> logits, routings = model(x, edge_index, return_routing=True)
    """

    has_input_layer = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        *,
        conv: str | ConvFactory = "gcn",
        router: RouterLike | None = "token_choice",
        num_experts: int = 8,
        k: int = 1,
        shared_router: bool | None = None,
        router_input: RouterInput | None = None,
        every: int = 1,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        act: Activation = "relu",
        norm: Norm = None,
        **conv_kwargs: Any,
    ) -> None:
        is_one_kind = isinstance(conv, str) or callable(conv)
        check(is_one_kind, "conv", repr(conv), "one kind: the convs of blocks have no experts")
        kinds = kinds_of(conv, num_experts)
        # MLPs are stacked, whatever the convs are.
        conv_kwargs["start"] = start_of(kinds, router, k, shared_router, True, conv_kwargs)
        if shared_router is None:
            shared_router = router is not None and conv_kwargs["start"] == "copies"
        router_input = router_parts(router_input, conv_kwargs["start"], router, is_shared=True)
        legal = "'node', what a block's conv gives; or shared_router=True"
        is_seen = router is None or shared_router or router_input == ("node",)
        check(is_seen, "router_input", router_input, legal)
        super().__init__(
            in_channels, hidden_channels, out_channels, num_layers, dropout, input_dropout, act
        )
        # The defaults are resolved by now: a file says what they were.
        self.recorded = Recorded.of(given_to(BlockGNN, locals()), by_name() | ROUTERS)
        self.router_input = router_input

        # 1. Which blocks have experts, and with which arguments.
        moe_layers = layers_with_experts(router, shared_router, self.num_layers, every)
        moe_kwargs = taken_from(conv_kwargs, conv, BlockGNN, OF_EXPERTS)
        moe_kwargs |= {"num_experts": num_experts, "k": k, "router_input": router_input}
        built_router = None
        if router is not None and shared_router:
            built_router = build_shared_router(router, self.in_channels, moe_kwargs)
        moe_kwargs["router"] = None if shared_router else router

        # 2. The blocks.
        width = self.hidden_channels
        self.input = nn.Linear(self.in_channels, width)
        self.convs = nn.ModuleList()
        self.ffns = nn.ModuleList()
        for layer in range(self.num_layers):
            built = build_conv(conv, width, width, True, None, conv_kwargs, is_free=True)
            columns = columns_of(built, width, conv) or width
            mlp = feed_forward(columns, width, dropout, self.act)
            self.convs.append(built)
            self.ffns.append(with_experts(mlp, columns, moe_kwargs) if layer in moe_layers else mlp)
        if built_router is not None:
            take_costs(built_router, self.ffns)

        # 3. Norms, and the output layer.
        block_norm = block_norm_of(norm, width)
        self.norms = nn.ModuleList(copy.deepcopy(block_norm) for _ in range(self.num_layers + 1))
        self.lin = nn.Linear(width, self.out_channels)
        # The last module: saved optimizers go by the order of parameters.
        self.shared_router = built_router

    def has_experts(self, layer: int) -> bool:
        return isinstance(self.ffns[layer], MoE)

    def enter(self, x: Tensor) -> Tensor:
        """(N, H) the features behind a linear layer; ``act`` follows, behind dropout."""
        return self.act(self.dropout(self.input(x)))

    def convolve(
        self, layer: int, x: Tensor, graph: Graph, batch: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """(n, C) the conv of a block, behind its norm; see the base class."""
        return super().convolve(layer, self.norms[layer](x), graph, batch, None)

    def finish(
        self, layer: int, x: Tensor, out: Tensor, nodes: Nodes, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """(n, H) the feed-forward part of a block, and the residual; see the base class."""
        before = x[: out.size(0)].to(out.device)  # inference keeps the features on the CPU
        part = self.ffns[layer]
        if not isinstance(part, MoE):
            return before + part(out), None
        if routing is None and part.router is not None:
            routing = part.router(out, nodes.batch, nodes.edge_index)
        return before + part(out, routing=routing), routing

    def leave(self, outputs: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.lin(self.norms[-1](outputs[-1]))
        return logits


class DropThenAct(nn.Module):
    """Dropout before an activation, where Platonov et al. (2023) have it.

    Args:
        dropout: the probability of dropping a number.
        act: the activation, of which it keeps a copy.
    """

    def __init__(self, dropout: float, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.act = copy.deepcopy(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dropout(x))


def block_norm_of(norm: Norm, width: int) -> nn.Module:
    """The norm of blocks, as :func:`norm_of`; ``None`` is a layer norm of each node.

    Raises:
        ValueError: one that mixes nodes, of which layer-wise inference would see a part.
    """
    if norm is None:
        return nn.LayerNorm(width)
    layer = norm_of(norm, width)
    got = f"{type(layer).__name__} in blocks"
    legal = "one by row: nn.LayerNorm, PyG's LayerNorm(mode='node'), batch norm or nn.Identity"
    check(is_by_row(layer), "norm", got, legal)
    return layer


def feed_forward(
    in_channels: int, out_channels: int, dropout: float, act: Callable[[Tensor], Tensor]
) -> nn.Module:
    """The MLP of a block, with dropout of hidden units and of the output.

    Args:
        in_channels: C.
        out_channels: H, the width inside and the output's.
        dropout: the probability of dropping a number.
        act: the activation.
    """
    return nn.Sequential(
        nn.Linear(in_channels, out_channels),
        DropThenAct(dropout, act),
        nn.Linear(out_channels, out_channels),
        nn.Dropout(dropout),
    )


def with_experts(mlp: nn.Module, in_channels: int, moe_kwargs: Mapping[str, Any]) -> MoE:
    """A MoE in the place of a block's MLP, as ViTs have it.

    Args:
        mlp: the MLP.
        in_channels: C.
        moe_kwargs: those of :data:`OF_EXPERTS`, and ``num_experts``, ``k`` and ``router``; without
            a router, the MoE is to be told each decision.
    """
    start: Start = moe_kwargs["start"]
    num_experts = moe_kwargs["num_experts"]
    given = moe_kwargs["router"]
    with drawn_apart(start != "plain"):
        experts = experts_of("ffn", mlp, num_experts, start, start == "copies")
        router = None if given is None else build_router_of(given, in_channels, moe_kwargs)
        layer = MoE(router, experts, mlp if start == "shared" else None)
    layer.start = start
    return layer
