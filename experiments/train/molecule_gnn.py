"""A GNN of molecules, as OGB's examples build it, whose convs may hold experts.

Shapes: N atoms, M bonds (both directions), G molecules, D width, L labels, E experts, P pairs.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GINEConv, MessagePassing, global_mean_pool

import gmoe
from experiments.train.data.published import without_update_check
from experiments.train.user_code import load_conv
from gmoe.conv.base import StackedExperts
from gmoe.conv.call import Call
from gmoe.conv.kinds import KINDS, Kind, class_of, factory_of
from gmoe.conv.messages import Messages, Rows, find_rows
from gmoe.products import combine
from gmoe.routing import Routing

without_update_check()
from ogb.graphproppred.mol_encoder import AtomEncoder, BondEncoder  # noqa: E402


class BondGCNConv(MessagePassing):
    r"""The GCN of OGB's molecule examples (Hu et al., 2020), whose messages see the bonds.

    .. math::
        x_i' = \sum_j \frac{\mathrm{relu}(W x_j + b + e_{ji})}{\sqrt{d_i d_j}}
            + \frac{\mathrm{relu}(W x_i + b + r)}{d_i}

    with :math:`d_i` one more than the in-degree. It reads the norms from a ``gmoe.Graph``, which
    knows those of the whole graph also on a part of it.

    Args:
        in_channels: width of the nodes.
        out_channels: width of the output, and of ``edge_attr``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(aggr="add")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.lin = nn.Linear(in_channels, out_channels)
        self.root = nn.Parameter(torch.empty(out_channels))
        nn.init.normal_(self.root)  # as the embedding that OGB's conv has for it

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin.reset_parameters()
        nn.init.normal_(self.root)

    def forward(self, x: Tensor, edge_index: Any, edge_attr: Tensor | None = None) -> Tensor:
        given = edge_index
        graph = given if isinstance(given, gmoe.Graph) else gmoe.Graph(given, len(x))
        graph = graph.fitting((len(x), len(x)), self.flow, edge_attr=edge_attr)
        factor_M, factor_N = _factors(graph, x.dtype)
        assert graph.attr is not None
        edges = graph.edges
        h = self.lin(x)
        sent = (h.index_select(0, edges.sender) + graph.attr[edges.order]).relu()
        own = (h[: graph.num_dst] + self.root).relu() * _column(factor_N, h)
        return own.index_add(0, edges.receiver, sent * _column(factor_M, h))


class BondGCNExperts(StackedExperts):
    """E BondGCNConvs of which each atom runs its own: K messages a bond."""

    parts = ("root", "lin")

    def forward(self, call: Call, routing: Routing) -> Tensor:
        graph = call.graph
        x_src = call.x_src
        factor_of_edge, factor_N = _factors(graph, x_src.dtype)
        messages = Messages(graph, routing)
        sent = messages.from_sources
        edge_M = graph.edges.order.index_select(0, sent.order)
        assert graph.attr is not None
        # 1. Transform each atom once for every expert that needs it: its own, and its neighbors'.
        expert = torch.cat([messages.expert, routing.expert])
        source = torch.cat([sent.sender, routing.token])
        rows = Rows(*find_rows(expert, source, routing.num_experts, graph.num_src, None))
        row_UO = self.lin(x_src.index_select(0, rows.source), rows.offsets)
        place_M, place_P = rows.place[expert, source].split([len(edge_M), len(routing.token)])
        # 2. The messages.
        sent_MO = row_UO.index_select(0, place_M) + graph.attr.index_select(0, edge_M)
        factor_M = factor_of_edge.index_select(0, sent.order)
        sent_MO = sent_MO.relu() * _column(factor_M, row_UO)
        # 3. The atoms themselves.
        own_PO = row_UO.index_select(0, place_P) + self.root.index_select(0, routing.expert)
        factor_P = factor_N.index_select(0, routing.token)
        own_PO = own_PO.relu() * _column(factor_P, row_UO)
        return combine(own_PO.index_add(0, sent.receiver, sent_MO), routing)


def _factors(graph: gmoe.Graph, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M,) the norms of the bonds, and (N,) those of the atoms themselves."""
    scale = graph.normalized(improved=False, loops=True, dtype=dtype).right
    assert scale is not None
    edges = graph.edges
    of_bonds = scale.index_select(0, edges.receiver) * scale.index_select(0, edges.sender)
    return of_bonds, scale[: graph.num_dst].square()


def _column(value: Any, like: Tensor) -> Tensor:
    """(., 1) factors in the type of what they multiply."""
    return value[:, None].to(like.dtype)


def _run(conv: Any, x: Tensor, graph: gmoe.Graph) -> Tensor:
    """A BondGCNConv without experts: it reads norms and bonds from the graph itself."""
    return conv(x, graph)[: graph.num_dst]


KINDS[BondGCNConv] = Kind(
    stack=BondGCNExperts,
    takes_two_sets=False,
    is_one_hop=True,
    run=_run,
    edge_width=lambda conv, _: conv.out_channels,
)


def ogb_gin(in_channels: int, out_channels: int) -> GINEConv:
    """The GIN of OGB's molecule examples: twice as wide inside, with a batch norm there.

    The batch norm has experts of it run on all atoms, each, so that the cost follows E; experts
    of ``"gine"``, which has none, are stacked.
    """
    width = 2 * in_channels
    network = nn.Sequential(
        nn.Linear(in_channels, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, out_channels),
    )
    return GINEConv(network, train_eps=True)


def conv_of(name: str, width: int) -> Any:
    """The conv of a name; those with an ``edge_dim`` are told the width of the bonds.

    ``"gcn"`` and ``"gin"`` are OGB's of molecules; all others are PyG's and gmoe's.
    """
    own: dict[str, Any] = {"gcn": BondGCNConv, "gin": ogb_gin}
    if name in own:
        return own[name]
    factory = factory_of(load_conv(name))
    is_told = "edge_dim" in inspect.signature(class_of(factory)).parameters
    # GINE by itself adds the bonds as they are, so that its experts share the sums.
    return partial(factory, edge_dim=width) if is_told and name != "gine" else factory


class MoleculeGNN(gmoe.GNNMoE):
    """A ``GNNMoE`` of molecules: OGB's encoders of atoms and bonds, then a label a molecule.

    All layers, norms and routers are told which molecule each atom is of, so that molecules never
    compete.

    Args:
        width: D, of atoms, bonds and layers.
        num_tasks: L.
        num_layers: message-passing layers.
        **options: of :class:`gmoe.GNNMoE`.

    Shapes:
        - ``x``: (N, 9) and ``edge_attr``: (M, 3), whole numbers, as in OGB's sets; ``batch``: (N,)
          the molecule of each atom, ascending; ``num_graphs``: G.
        - returns (G, L), and the list of :class:`gmoe.Routing` with ``return_routing=True``.
    """

    def __init__(
        self,
        width: int,
        num_tasks: int,
        num_layers: int,
        **options: Any,
    ) -> None:
        super().__init__(width, width, num_tasks, num_layers, jk="last", **options)
        self.atoms = AtomEncoder(width)
        self.bonds = nn.ModuleList(BondEncoder(width) for _ in range(num_layers))

    def forward(  # type: ignore[override]  # a molecule's label, not a node's
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor,
        batch: Tensor,
        num_graphs: int,
        *,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """The labels of molecules; see the class."""
        x = self.atoms(x)
        graph = gmoe.Graph(edge_index, len(x), flow=self.flow)
        decision = self.route_once(x, graph, batch)
        routings = [] if decision is None else [decision]
        for layer in range(self.num_layers):
            bonds = self.bonds[layer](edge_attr).to(x.dtype)
            bonded = graph.fitting((len(x), len(x)), self.flow, edge_attr=bonds)
            out, routing = self.convolve(layer, x, bonded, batch, decision)
            if routing is not None and decision is None:
                routings.append(routing)
            x = self.activate(layer, out, batch, num_graphs)
        logits = self.lin(global_mean_pool(x, batch, num_graphs))
        return (logits, routings) if return_routing else logits

    def activate(
        self, layer: int, x: Tensor, batch: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Norm, activation and dropout; as OGB's, without the activation behind the last layer."""
        norm = self.norms[layer]
        x = norm(x, batch, batch_size) if self.norm_takes_batch else norm(x)
        if layer < self.num_layers - 1:
            x = self.act(x)
        dropped: Tensor = self.dropout(x)
        return dropped
