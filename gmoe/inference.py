"""Layer-wise inference of a GNNMoE on a graph that does not fit in one forward pass. N nodes, n nodes of a piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from tqdm import tqdm

from gmoe._checks import check_count
from gmoe.conv.build import looks_one_hop
from gmoe.conv.graph import check_batch
from gmoe.conv.moe_conv import MoEConv
from gmoe.conv.pieces import Pieces
from gmoe.conv.seen import seen
from gmoe.routing import Routing

if TYPE_CHECKING:
    from gmoe.models.gnn import GNNMoE


class LayerwiseInference:
    """What GNNMoE has in the place of ``BasicGNN.inference``."""

    @overload
    def inference(
        self: Any,
        loader: NodeLoader | Data,
        device: torch.device | str | None = ...,
        embedding_device: torch.device | str = ...,
        progress_bar: bool = ...,
        cache: bool = ...,
        *,
        batch_size: int | None = ...,
        return_routing: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def inference(
        self: Any,
        loader: NodeLoader | Data,
        device: torch.device | str | None = ...,
        embedding_device: torch.device | str = ...,
        progress_bar: bool = ...,
        cache: bool = ...,
        *,
        batch_size: int | None = ...,
        return_routing: Literal[True],
    ) -> tuple[Tensor, list[Routing]]: ...
    def inference(
        self: Any,
        loader: NodeLoader | Data,
        device: torch.device | str | None = None,
        embedding_device: torch.device | str = "cpu",
        progress_bar: bool = False,
        cache: bool = False,
        *,
        batch_size: int | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Logits of all nodes, layer by layer in pieces, without gradients: equal to the forward on the whole graph.

        Each layer routes once over all nodes, so that no node's experts depend on its piece, and GCN's degrees are
        those of the whole graph. Call :meth:`eval` first, as for any evaluation.

        Args:
            loader: a node loader, of which the graph and the batch size are taken (not what it samples), or the graph:
                ``x``, ``edge_index``, and, where they are there and the convs take them, ``edge_weight``, ``edge_attr``
                and ``batch``.
            device: where pieces are computed (default: where the model is).
            embedding_device: where the features of all nodes are kept (default ``"cpu"``).
            progress_bar: show one (default ``False``).
            cache: keep the pieces between layers (default ``False``).
            batch_size: nodes a piece (default: the loader's, or 1,024).
            return_routing: return the routings too, as :meth:`forward` does.

        Raises:
            RuntimeError: a conv that looks further than one hop, such as ``ChebConv``.
        """
        logits, routings = layerwise(self, loader, device, embedding_device, progress_bar, cache, batch_size)
        return (logits, routings) if return_routing else logits

    def inference_per_layer(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: the experts of a piece's nodes are decided among all nodes.

        Raises:
            RuntimeError: always; call :meth:`inference`.
        """
        raise RuntimeError("inference_per_layer: a piece cannot be routed by itself; call inference")


@torch.no_grad()
def layerwise(
    model: GNNMoE,
    source: Data | NodeLoader,
    device: torch.device | str | None,
    embedding_device: torch.device | str,
    progress_bar: bool,
    cache: bool,
    batch_size: int | None,
) -> tuple[Tensor, list[Routing]]:
    """Logits of all nodes and the routings; see :meth:`GNNMoE.inference`."""
    data: Any = source if isinstance(source, Data) else source.data
    if not isinstance(data, Data) or data.x is None or data.edge_index is None:
        raise ValueError(f"loader: got one over {type(data).__name__}, expected a Data with x and edge_index")
    if batch_size is None:
        batch_size = 1024 if isinstance(source, Data) else int(source.batch_size or 1)
    check_count("batch_size", batch_size)
    home = torch.device(embedding_device)
    pieces = Pieces(data, batch_size, _device_of(model, device), cache)
    x, batch = data.x.to(home), data.get("batch")
    check_batch(batch, x.size(0))
    batch = None if batch is None else batch.to(pieces.device)

    routings: list[Routing] = []
    decision = None
    if model.shared_router is not None:
        decision = _decide(model, x, pieces, batch)
        routings.append(decision)
    x = _rows(model.lin_in, x, pieces)
    xs = []
    for layer in tqdm(range(model.num_layers), desc="Layers", disable=not progress_bar):
        out, routing = _conv(model, layer, x, pieces, batch, decision)
        if routing is not None and decision is None:
            routings.append(routing)
        if layer < len(model.residuals):
            out = out + _rows(model.residuals[layer], x, pieces)
        # all nodes at once, since some norms look at all of them
        x = model._after(layer, out.to(pieces.device), batch, None).to(home)
        xs.append(x)
    if hasattr(model, "jk"):
        x = model.jk([h.to(pieces.device) for h in xs]).to(home)
    return _rows(getattr(model, "lin", None), x, pieces), routings


def _device_of(model: GNNMoE, device: torch.device | str | None) -> torch.device:
    return torch.device(device) if device is not None else next(model.parameters()).device


def _rows(module: torch.nn.Module | None, x: Tensor, pieces: Pieces) -> Tensor:
    """A module that looks at each row by itself, some rows at a time."""
    if module is None or isinstance(module, torch.nn.Identity):
        return x
    return torch.cat([module(rows.to(pieces.device)).to(x.device) for rows in x.split(pieces.batch_size)])


def _decide(model: GNNMoE, x: Tensor, pieces: Pieces, batch: Tensor | None) -> Routing:
    """The shared decision, from the raw features and their means over in-edges."""
    powers = [x]
    if "aggregate" in model.route_on:
        for _ in range(model.route_hops):
            powers.append(pieces.map(lambda x, piece: model._mean(x, piece.graph.edge_index), powers[-1]))
    aggregate = torch.cat(powers[1:], dim=-1) if len(powers) > 1 else None
    view = seen(model.route_on, x, aggregate, pieces.graph).to(pieces.device)
    assert model.shared_router is not None
    routing: Routing = model.shared_router(view, batch, pieces.graph.edge_index.to(pieces.device))
    return routing


def _conv(
    model: GNNMoE, layer: int, x: Tensor, pieces: Pieces, batch: Tensor | None, decision: Routing | None
) -> tuple[Tensor, Routing | None]:
    conv: Any = model.convs[layer]
    if isinstance(conv, MoEConv):
        return conv.by_pieces(x, pieces, batch, decision)
    if not looks_one_hop(conv, x.size(1)):
        raise RuntimeError(
            f"inference: {type(conv).__name__} looks further than one hop, so that it has no layer-wise inference; "
            "call the model on the whole graph"
        )
    with pieces.of(conv) as own:

        def near(x: Tensor, piece: Any) -> Tensor:
            graph = piece.graph.with_args_of([conv])
            out: Tensor = conv(x, graph.adj, **graph.edge_args)
            return out

        return own.map(near, x), None
