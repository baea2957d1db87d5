"""GIN's networks, stacked: what the conv of each expert gives for the nodes that the expert has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import MLP, BatchNorm, GINConv

import gmoe
from gmoe import Routing
from gmoe.conv.aggregate import GINExperts
from gmoe.conv.network import BatchNormExperts, can_be_stacked
from tests.helpers.folded import fold

WIDTH, NODES, EXPERTS = 4, 12, 4
EDGES = torch.stack([torch.arange(30) % NODES, (torch.arange(30) * 7 + 3) % NODES])

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "PyG's MLP": lambda: MLP([WIDTH, 6, 5]),
    "one with three layers": lambda: MLP([WIDTH, 6, 6, 5], act="leaky_relu", act_first=True),
    "one with a norm at the end": lambda: MLP([WIDTH, 6, 5], plain_last=False),
    "one without activation": lambda: MLP([WIDTH, 5], act=None, plain_last=False),
    "a sequence": lambda: nn.Sequential(
        nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ELU(), nn.Linear(6, 5, bias=False)
    ),
    "one in another": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(WIDTH, 6), BatchNorm(6, momentum=0.3)), nn.ReLU(), MLP([6, 5])
    ),
    "a dropout": lambda: nn.Sequential(
        nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.0), nn.Linear(6, 5)
    ),
    "a last activation": lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh()),
    "a norm without weights": lambda: nn.Sequential(
        nn.Linear(WIDTH, 5), nn.BatchNorm1d(5, affine=False, eps=0.1)
    ),
}


def layer_of(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    make = lambda *_: GINConv(build(), train_eps=True)  # noqa: E731
    layer = gmoe.MoEConv(make, WIDTH, 5, num_experts=EXPERTS, router=None, start="plain")
    for values in (*layer.parameters(), *layer.buffers()):
        if values.is_floating_point():
            nn.init.uniform_(values, 0.5, 1.5)
    return layer.double()


def routing_of(loads: list[int]) -> Routing:
    """The first nodes to the first expert, and so on."""
    expert = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    return Routing.from_choices(
        expert[:, None], torch.rand(NODES, 1, dtype=torch.double), num_experts=len(loads)
    )


def mixture_of(convs: list[Any], x: Tensor, routing: Routing) -> Tensor:
    """What convs give whose networks see the nodes of their own experts alone."""
    out = torch.zeros(NODES, 5, dtype=x.dtype)
    ends = routing.offsets.tolist()
    for conv, start, end in zip(convs, [0, *ends[:-1]], ends, strict=True):
        if start < end:
            token = routing.token[start:end]
            summed = conv.propagate(EDGES, x=(x, x)) + (1 + conv.eps) * x
            rows = routing.weight[start:end, None] * conv.nn(summed[token])
            out = out.index_add(0, token, rows)
    return out


@pytest.fixture(params=["expert by expert", "all at once"])
def norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms as on a CPU, or as elsewhere and in compiled code."""
    if request.param == "all at once":
        monkeypatch.setattr(BatchNormExperts, "_expert_by_expert", BatchNormExperts._all_at_once)


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("name", NETWORKS)
def test_each_expert_is_its_conv_on_its_own_nodes(name: str) -> None:
    """Outputs, gradients and running statistics, of three steps and in evaluation."""
    layer = layer_of(NETWORKS[name])
    assert isinstance(layer.experts, GINExperts)
    convs = [layer.expert(index) for index in range(EXPERTS)]
    for loads in ([3, 4, 0, 5], [2, 2, 6, 2], [12, 0, 0, 0]):
        routing = routing_of(loads)
        x = torch.rand(NODES, WIDTH, dtype=torch.double, requires_grad=True)
        outputs = layer(x, EDGES, routing=routing), mixture_of(convs, x, routing)
        torch.testing.assert_close(*outputs)
        gradients: list[Tensor] = []
        for output in outputs:
            x.grad = None
            output.square().sum().backward()
            assert x.grad is not None
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)
    for index, conv in enumerate(convs):
        torch.testing.assert_close(layer.expert(index).state_dict(), conv.state_dict())
        for path, parameter in conv.named_parameters():
            stacked: Any = layer.experts.get_parameter(path)
            torch.testing.assert_close(stacked.grad[index], parameter.grad)
    for part in (layer, *convs):
        part.eval()
    routing = routing_of([1, 8, 3, 0])
    torch.testing.assert_close(layer(x, EDGES, routing=routing), mixture_of(convs, x, routing))


@pytest.mark.usefixtures("norms")
def test_an_expert_with_one_row_takes_its_running_statistics_and_leaves_them() -> None:
    norm = nn.BatchNorm1d(3)
    nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
    experts = BatchNormExperts(norm, 3)
    for name, value in norm.state_dict().items():
        getattr(experts, name).data[:] = value
    x = torch.rand(4, 3)
    y = experts(x, torch.tensor([1, 1, 4], dtype=torch.int32))
    torch.testing.assert_close(y[:1], copy.deepcopy(norm).eval()(x[:1]))
    torch.testing.assert_close(y[1:], norm(x[1:]))
    assert experts.num_batches_tracked.tolist() == [0, 0, 1]
    torch.testing.assert_close(experts.running_var[:2], torch.ones(2, 3))
    torch.testing.assert_close(experts.running_var[2], norm.running_var)


def test_copies_start_as_the_dense_conv_and_keep_their_own_statistics() -> None:
    torch.manual_seed(0)
    dense = GINConv(MLP([WIDTH, 6, 5]))
    layer = gmoe.MoEConv(lambda *_: copy.deepcopy(dense), WIDTH, 5, num_experts=EXPERTS)
    assert isinstance(layer.experts, GINExperts)
    x = torch.rand(NODES, WIDTH)
    torch.testing.assert_close(layer.eval()(x, EDGES), dense.eval()(x, EDGES))
    layer.train()(x, EDGES)
    norm: Any = layer.experts.get_submodule("nn.norms.0.module")
    assert not torch.equal(norm.running_mean[0], norm.running_mean[1])
    fold(layer)
    assert norm.weight.shape == (EXPERTS, 6)


@pytest.mark.usefixtures("norms")
def test_second_gradients_pass_batch_norms() -> None:
    layer = layer_of(NETWORKS["PyG's MLP"])
    routing = routing_of([4, 5, 0, 3])
    x = torch.rand(NODES, WIDTH, dtype=torch.double, requires_grad=True)
    run = lambda x: layer(x, EDGES, routing=routing)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)),
        nn.Sequential(nn.Linear(4, 4), nn.PReLU()),
        MLP([4, 4, 4], norm="graph_norm"),
        nn.Sequential(nn.ReLU()),
    ],
    ids=["layer norm", "no statistics", "cumulative mean", "weights", "graph norm", "no layer"],
)
def test_networks_of_other_parts_are_not_stacked(network: nn.Module) -> None:
    assert not can_be_stacked(network)
    assert not GINExperts.accepts(GINConv(network))


def test_batch_norms_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    offsets = torch.tensor([3, 4, 4, 12], dtype=torch.int32)
    x = torch.rand(12, 6, dtype=torch.double)
    norms: list[Any] = [layer_of(NETWORKS["PyG's MLP"]).experts.nn.norms[0].module for _ in "12"]
    compiled = torch.compile(norms[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, offsets), norms[1](x, offsets))
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())


def test_a_dropout_that_drops_is_stacked() -> None:
    network = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5))
    dense = GINConv(network)
    model: Any = nn.ModuleDict({"conv": copy.deepcopy(dense)})
    gmoe.moefy(model, targets="conv", num_experts=2, start="copies")
    layer = model["conv"]
    assert isinstance(layer.experts, GINExperts)
    x = torch.rand(NODES, WIDTH)
    assert not torch.equal(layer(x, EDGES), layer(x, EDGES))
    torch.testing.assert_close(layer.eval()(x, EDGES), dense.eval()(x, EDGES))


def test_a_norm_that_was_put_into_evaluation_stays_there() -> None:
    dense: Any = nn.ModuleDict({"conv": GINConv(MLP([WIDTH, 6, 5]))})
    norm: Any = dense["conv"].nn.norms[0]
    nn.init.uniform_(norm.module.running_mean)
    norm.eval()
    model: Any = copy.deepcopy(dense)
    with pytest.warns(UserWarning, match="GINConv runs on the whole graph"):
        gmoe.moefy(model, targets="conv", num_experts=2, start="copies")
    layer = model["conv"]
    assert layer.training
    x = torch.rand(NODES, WIDTH)
    torch.testing.assert_close(layer(x, EDGES), dense["conv"](x, EDGES))
