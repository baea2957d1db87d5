"""What GNNs of layers and of blocks share: their calls, one decision for all layers, and replay.

Shapes: N nodes, n of them destinations, M edges, D width, O out channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch_geometric.typing import Adj

from gmoe._autograd import refuse_transforms
from gmoe._checks import check_counts, described, parameters_of
from gmoe.conv.call import Call
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import base_kind_of
from gmoe.conv.moe_conv import MoEConv
from gmoe.conv.plain import run
from gmoe.conv.router_input import RouterPart, router_features
from gmoe.models.inference import inference
from gmoe.models.parts import Activation, Nodes, activation_of, reset_parameters
from gmoe.moe import checked_routings
from gmoe.routers import Router
from gmoe.routing import Routing
from gmoe.saved import Pretrained


class LayeredGNN(Pretrained, nn.Module):
    """A GNN that runs its layers one after the other: a conv, and what follows it.

    A subclass builds the parts that are named here, and says what is around the convs: in
    :meth:`enter`, :meth:`convolve`, :meth:`finish` and :meth:`leave`, which are also the steps of
    layer-wise inference. That runs ``convolve`` part by part.

    Args:
        in_channels, hidden_channels, out_channels, num_layers, dropout, input_dropout, act: as
            :class:`gmoe.GNNMoE` takes them.
    """

    convs: nn.ModuleList
    norms: nn.ModuleList
    shared_router: Router | None
    """The router that decides for all layers; ``None`` if each decides by itself."""
    router_input: tuple[RouterPart, ...]
    local: bool | None = None
    """What was said of convs of one's own, see :class:`gmoe.MoEConv`."""
    has_input_layer = False
    """Whether :meth:`enter` changes the features."""
    joins_layers = False
    """Whether the output follows from the outputs of all layers, not from the last one alone."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        dropout: float,
        input_dropout: float,
        act: Activation,
    ) -> None:
        check_counts(
            in_channels=in_channels,
            hidden_channels=hidden_channels,
            out_channels=out_channels,
            num_layers=num_layers,
        )
        super().__init__()
        # Plain ints: NumPy's are counts too, but torch and PyG do not take them everywhere.
        self.in_channels = int(in_channels)
        self.hidden_channels = int(hidden_channels)
        self.out_channels = int(out_channels)
        self.num_layers = int(num_layers)
        self.act: Callable[[Tensor], Tensor] = activation_of(act)
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(input_dropout)

    @property
    def flow(self) -> str:
        """Which way the convs send messages."""
        return str(self.convs[0].flow)

    def conv_width(self, layer: int) -> int:
        """The columns that the conv of a layer sees."""
        return self.hidden_channels if layer or self.has_input_layer else self.in_channels

    @abstractmethod
    def has_experts(self, layer: int) -> bool:
        """True if a layer has experts."""

    # the steps of a call, and of inference -------------------------------------------------------

    def enter(self, x: Tensor) -> Tensor:
        """(N, D) what the first layer sees of the features."""
        return x

    def convolve(
        self, layer: int, x: Tensor, graph: Graph, batch: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """(n, D) what a layer's conv gives at the graph's destinations; and the routing of a MoE.

        Args:
            layer: the number of the layer.
            x: (N, D) its input.
            graph: the whole graph or a part of it.
            batch: (N,) the graph of each node, or ``None``.
            routing: a decision for the destinations, or ``None`` to let the layer decide.
        """
        conv = self.convs[layer]
        if isinstance(conv, MoEConv):
            out, own = conv(x, graph, batch=batch, routing=routing, return_routing=True)
            return out, own
        run_kind = base_kind_of(type(conv)).run
        return run(conv, graph, x, x) if run_kind is None else run_kind(conv, x, graph), None

    @abstractmethod
    def finish(
        self, layer: int, x: Tensor, out: Tensor, nodes: Nodes, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """(n, D) what follows the conv of a layer; and the routing of experts behind it.

        Args:
            layer: the number of the layer.
            x: (N, D) its input.
            out: (n, D) what :meth:`convolve` gave at the first n of the N nodes.
            nodes: what is known of these.
            routing: a decision for them, or ``None`` to let the layer decide.
        """

    @abstractmethod
    def leave(self, outputs: Sequence[Tensor]) -> Tensor:
        """(n, O) the logits, from the last layer's output, or from all if :attr:`joins_layers`."""

    # a call ---------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        edge_index: Adj | Graph,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
        num_sampled_nodes_per_hop: list[int] | None = None,
        num_sampled_edges_per_hop: list[int] | None = None,
        *,
        routings: Sequence[Routing] | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Logits of all nodes; see the class and PyG's ``BasicGNN``."""
        refuse_transforms()
        if not isinstance(x, Tensor):  # of to_hetero a proxy, of HeteroConv a pair
            raise ValueError(
                f"x: got {described(x)}, expected a tensor; for nodes of several types, put a "
                "MoEConv for each relation into PyG's HeteroConv"
            )
        if x.dim() != 2:
            raise ValueError(
                f"x: got {described(x)}, expected shape (nodes, features); a MoEConv takes graphs "
                "side by side, a model takes them as one graph and batch="
            )
        graph = self._graph(x, edge_index, edge_weight, edge_attr)
        part, part_batch = graph, batch
        decisions = self._decisions(x, graph, batch, routings)
        is_shared = self.shared_router is not None
        used = [decision for decision in decisions[:1] if decision is not None and is_shared]

        x = self.enter(self.input_dropout(x))
        outputs: list[Tensor] = []
        for layer, decision in enumerate(decisions):
            if (
                layer
                and num_sampled_nodes_per_hop is not None
                and num_sampled_edges_per_hop is not None
            ):
                # Trim a sampled graph: what its last hops found no longer reaches the seeds.
                x = x[: sum(num_sampled_nodes_per_hop[:-layer])]
                part = graph.first(x.size(0), sum(num_sampled_edges_per_hop[:-layer]))
                part_batch = None if batch is None else batch[: x.size(0)]
                if decision is not None and is_shared:
                    decision = decision.select(slice(0, x.size(0)))
            out, of_conv = self.convolve(layer, x, part, part_batch, decision)
            nodes = Nodes(part_batch, batch_size, part.edge_index)
            x, of_rest = self.finish(layer, x, out, nodes, decision)
            outputs = [*outputs, x] if self.joins_layers else [x]
            if not is_shared:
                used.extend(routing for routing in (of_conv, of_rest) if routing is not None)
        logits = self.leave(outputs)
        return (logits, used) if return_routing else logits

    def shared_router_input(self, x: Tensor, graph: Graph) -> Tensor:
        """(n, dim) what a shared router sees: raw features, their means over in-edges, in-degrees.

        Args:
            x: (N, D) raw features.
            graph: the graph; of a part of a graph, the result has its destinations only.
        """
        return router_features(self.router_input, Call(graph, x, x[: graph.num_dst]))

    def route_once(self, x: Tensor, graph: Graph, batch: Tensor | None) -> Routing | None:
        """Decide once for all layers, by the raw features; ``None`` without a shared router."""
        if self.shared_router is None:
            return None
        seen = self.shared_router_input(x, graph)
        routing: Routing = self.shared_router(seen, batch, graph.edge_index)
        return routing

    def _decisions(
        self, x: Tensor, graph: Graph, batch: Tensor | None, routings: Sequence[Routing] | None
    ) -> list[Routing | None]:
        """The routing of each layer that is known before it runs: a replay's, or the shared one.

        ``None`` for a layer that decides itself, or has no experts.
        """
        have_experts = [self.has_experts(layer) for layer in range(self.num_layers)]
        is_shared = self.shared_router is not None
        given: list[Routing] = []
        if routings is not None:
            given = checked_routings(routings, 1 if is_shared else sum(have_experts), "router")
        if is_shared:
            decision = given[0] if given else self.route_once(x, graph, batch)
            return [decision] * self.num_layers
        turns = iter(given)
        return [next(turns, None) if has_experts else None for has_experts in have_experts]

    def _takes(self, name: str) -> bool:
        """True if at least one conv takes this edge argument."""
        for conv in self.convs:
            names = conv.edge_names if isinstance(conv, MoEConv) else parameters_of(conv)
            if name in names:
                return True
        return False

    def _graph(
        self,
        x: Tensor,
        edge_index: Adj | Graph,
        edge_weight: Tensor | None,
        edge_attr: Tensor | None,
    ) -> Graph:
        """The graph of a call, sorted once for all layers."""
        for name, value in {"edge_weight": edge_weight, "edge_attr": edge_attr}.items():
            if value is not None and not self._takes(name):
                raise ValueError(
                    f"{name}: got a tensor, but no conv of the model takes it, expected None"
                )
        return Graph.of_call(edge_index, x.size(0), edge_weight, edge_attr, flow=self.flow)

    inference = inference
    reset_parameters = reset_parameters

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, "
            f"{self.out_channels}, num_layers={self.num_layers}, "
            f"shared_router={self.shared_router is not None})"
        )
