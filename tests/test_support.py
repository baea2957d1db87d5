"""Every cell of the table in ``docs/support.md`` is a test: what works with what.

``yes``: outputs and, where it trains, gradients are those without. ``partly``: it runs, and leaves
the experts as they are. ``refused``: an error of gmoe's own, which says what to use instead.
``no``: torch's or PyG's. ``test_contract.py`` runs the clauses of the contract.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch_geometric import explain
from torch_geometric.nn import HeteroConv, summary, to_hetero

import gmoe
from gmoe.conv import matrix
from tests import contract
from tests.contract import CASES, METADATA, Case, assert_compiles, outcome, rows, run
from tests.helpers.conv_cases import Two
from tests.helpers.one_process import one_process
from tests.torch_versions import COMPILES_GRAPHS, EXPORTS_GRAPHS

LAYERS = {
    "`MoE`": ["MoE token_choice"],
    "a ViT after `moefy`": ["moefied ViT"],
    "`MoEConv`": ["MoEConv gcn", "MoEConv gcn copies"],
    "`GNNMoE`": ["GNNMoE shared router", "GNNMoE copies"],
}
"""The columns, and the cases of the contract that stand for each."""
GRAPHS = ("`MoEConv`", "`GNNMoE`")

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]


def transforms(case: Case, name: str) -> None:
    found = outcome(case, name)
    if found != "works":
        raise (RuntimeError if "not supported by gmoe" in found else NotImplementedError)(found)


def trains_in_parallel(case: Case, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Two steps as without: DDP raises in the second where a parameter got no gradient."""
    layer = case.make()
    wrapped = wrap(copy.deepcopy(layer))
    for model in (layer, wrapped):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for seed in range(2):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            run(model, case.call()).square().mean().backward()  # a sum diverges: rounding grows
            optimizer.step()
    torch.testing.assert_close(run(wrapped.eval(), case.call()), run(layer.eval(), case.call()))


def shards(layer: nn.Module) -> Any:
    return fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))


def exports_any_batch(case: Case) -> None:
    """With as many nodes, edges or images as there may be."""
    layer, args = case.make().eval(), case.call().args

    def any_number(x: torch.Tensor) -> dict[int, Any]:
        """Of rows, which are nodes or images, or of columns, which are edges."""
        return {0 if x.is_floating_point() else 1: torch.export.Dim.DYNAMIC}

    sizes = tree_map_only(torch.Tensor, any_number, args)
    exported = torch.export.export(layer, args, dynamic_shapes=sizes).module()
    one = case.call([0]).args
    torch.testing.assert_close(exported(*one), layer(*one))


def exports_to_onnx(case: Case) -> None:
    """What comes out is run by ``test_export.py``."""
    args = (*case.call().args, {})  # the exporter takes a last dict for keyword arguments
    torch.onnx.export(case.make().eval(), args, verbose=False)


def quantizes(case: Case) -> str | None:
    """It may choose other experts: of tokens whose scores are near."""

    def of_experts(model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if "experts" in name.split(".")]

    layer = case.make().eval()
    quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert run(quantized, case.call()).isfinite().all()
    is_quantized = any("quantized" in type(module).__module__ for module in quantized.modules())
    assert is_quantized == any(type(module) is nn.Linear for module in layer.modules())
    left = of_experts(quantized)
    assert left in ([], of_experts(layer))
    return "partly" if left else None


def quantizes_unstacked(case: Case) -> None:
    """All linear layers of experts, so that no stacked ones are left."""
    layer = gmoe.unstack(case.make().eval())
    quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert rows(run(quantized, case.call())).isfinite().all()
    assert not any(isinstance(part, gmoe.LinearExperts) for part in quantized.modules())
    assert not any(type(part) is nn.Linear for part in quantized.modules())


def saves_and_loads(case: Case) -> None:
    layer = case.make(seed=1).eval()
    with TemporaryDirectory() as folder:
        gmoe.save(layer, folder)
        base = contract.dense_vit() if case.name == "moefied ViT" else case.build()
        loaded = gmoe.load(folder, base=base)
    assert torch.equal(rows(run(loaded, case.call())), rows(run(layer, case.call())))


def prunes(case: Case) -> None:
    """All experts but K, and what is left trains."""
    layer, call = case.make().eval(), case.call()
    with torch.no_grad(), gmoe.record_routing(layer) as routings:
        run(layer, call)
    first = [
        gmoe.Routing.from_choices(
            torch.zeros(one.num_tokens, 1).int(), one.scores[:, :1], num_experts=contract.E
        )
        for one in routings
    ]
    kept = gmoe.prune(layer, first)
    assert all(len(ids) < contract.E for ids in kept.values())
    rows(run(layer.train(), call)).square().sum().backward()


def differentiates_a_batch(case: Case) -> None:
    """By the parameters, and by a layer's input: of more messages than a CPU leaves unsorted.

    Plain operators take few, and would take a batch of gradients, too; but nobody can rely on it.
    """
    with pytest.MonkeyPatch.context() as few:
        few.setattr(matrix, "FEW_NUMBERS", 0)
        _differentiates_a_batch(case)


def _differentiates_a_batch(case: Case) -> None:
    layer, call = case.make(), case.call()
    leaves = [
        *layer.parameters(),
        *(x.requires_grad_() for x in call.args[:1] if isinstance(x, torch.Tensor)),
    ]
    out = rows(run(layer, call))
    torch.autograd.grad(
        out, leaves, out.new_ones(2, *out.shape), is_grads_batched=True, allow_unused=True
    )


def becomes_hetero(case: Case) -> None:
    convs = Two(partial(gmoe.MoEConv, "sage", (-1, -1), 6, num_experts=8))  # of open widths
    model = to_hetero(case.make() if case.name.startswith("GNNMoE") else convs, METADATA)
    args, _ = contract.relations(contract.GROUPS)
    assert rows(model(*args)).isfinite().all()


def runs_in_hetero_conv(case: Case) -> None:
    """A layer for each relation: the sum of their outputs."""
    x_dict, edge_index_dict = contract.relations(contract.GROUPS)[0]
    is_model = case.name.startswith("GNNMoE")
    make = case.make if is_model else partial(gmoe.MoEConv, "sage", contract.D, 6)
    model = HeteroConv({relation: make() for relation in edge_index_dict}).eval()
    found = model(x_dict, edge_index_dict)
    (by,) = (relation for relation in edge_index_dict if relation[-1] == "author")
    alone = model.convs[by]((x_dict["paper"], x_dict["author"]), edge_index_dict[by])
    torch.testing.assert_close(found["author"], alone)


def explains(case: Case, algorithm: Callable[[], explain.ExplainerAlgorithm]) -> None:
    """On nodes and edges alone.

    An explainer that is fitted first needs a target, and gives no masks of nodes.
    """
    layer, args, node = case.make().eval(), case.call().args[:2], torch.tensor([0])
    made, before = algorithm(), layer(*args)
    fitted = isinstance(made, explain.PGExplainer)
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    options: dict[str, Any] = {
        "explanation_type": "phenomenon" if fitted else "model",
        "edge_mask_type": "object",
    }
    if not isinstance(made, explain.PGExplainer | explain.AttentionExplainer):
        options["node_mask_type"] = "attributes"
    explainer = explain.Explainer(layer, made, model_config=config, **options)
    given = {"target": rows(before).argmax(dim=1)} if fitted else {}
    if fitted:
        explainer.algorithm.train(0, layer, *args, index=node, **given)
    explained = explainer(*args, index=node, **given)
    assert explained.edge_mask.any()
    torch.testing.assert_close(layer(*args), before)


def replays(case: Case) -> None:
    """What a call decided, on the same tokens."""
    layer, call = case.make().eval(), case.call()
    y, decided = layer(*call.args, **call.kwargs, return_routing=True)
    name = "routing" if isinstance(decided, gmoe.Routing) else "routings"
    assert torch.equal(layer(*call.args, **call.kwargs, **{name: decided}), y)


def fills_in_widths(case: Case) -> None:
    build: Any = (
        partial(gmoe.MoEConv, "gcn", -1, 6)
        if case.name.startswith("MoEConv")
        else partial(gmoe.GNNMoE, -1, 6, 5)
    )
    assert run(build(), case.call()).isfinite().all()


def keeps(*clauses: Callable[[Case, str], None]) -> Callable[[Case], None]:
    """Clauses that ``test_contract.py`` runs on the case, if it is not exempt."""

    def check(case: Case) -> None:
        if exempt := [
            case.exempt[clause.__name__] for clause in clauses if clause.__name__ in case.exempt
        ]:
            raise NotImplementedError(exempt)

    return check


compiles = partial(assert_compiles, calls=[contract.GROUPS], backend="eager")
COPIES = (contract.is_copied, contract.is_pickled, contract.is_restored_from_its_state_dict)
PROBES: dict[str, Callable[[Case], object]] = {
    "autocast, float64": keeps(contract.trains_under_autocast, contract.computes_in_float64),
    "deep copies, pickle, state dicts": keeps(*COPIES),
    "the meta device, then `reset_parameters`": keeps(contract.starts_on_the_meta_device),
    "activation checkpointing": keeps(contract.is_checkpointed),
    "`inference_mode`, several threads": keeps(
        contract.runs_without_gradients, contract.serves_two_threads
    ),
    "DDP": partial(trains_in_parallel, wrap=DistributedDataParallel),
    "FSDP2 (`fully_shard`)": partial(trains_in_parallel, wrap=shards),
    "`torch.compile`": compiles,
    "`torch.compile(fullgraph=True)`": partial(compiles, fullgraph=True),
    "`torch.export`": partial(transforms, name="torch.export"),
    "`torch.export` of a batch of any size": exports_any_batch,
    "ONNX (`torch.onnx.export`)": exports_to_onnx,
    "`torch.jit.trace`": partial(transforms, name="torch.jit.trace"),
    "`torch.jit.script`": lambda case: torch.jit.script(case.make()),
    "`torch.func`": partial(transforms, name="torch.func.grad"),
    "gradients of gradients (`create_graph=True`)": keeps(contract.is_differentiated_twice),
    "batches of gradients (`vectorize=True`)": differentiates_a_batch,
    "dynamic quantization": quantizes,
    "dynamic quantization after `gmoe.unstack`": quantizes_unstacked,
    "`gmoe.save`, `gmoe.load`": saves_and_loads,
    "`gmoe.prune`": prunes,
    "`to_hetero`": becomes_hetero,
    "`HeteroConv`": runs_in_hetero_conv,
    "GNNExplainer": partial(explains, algorithm=partial(explain.GNNExplainer, epochs=3)),
    "PGExplainer": partial(explains, algorithm=partial(explain.PGExplainer, epochs=1)),
    "CaptumExplainer": partial(explains, algorithm=partial(explain.CaptumExplainer, "Saliency")),
    "DummyExplainer": partial(explains, algorithm=explain.DummyExplainer),
    "GraphMaskExplainer": partial(
        explains, algorithm=partial(explain.GraphMaskExplainer, 1, epochs=1)
    ),
    "AttentionExplainer": partial(explains, algorithm=explain.AttentionExplainer),
    "replay of a routing": replays,
    "lazy widths (`-1`)": fills_in_widths,
}


def table() -> dict[tuple[str, str], str]:
    """The cells of the page by row and column."""
    page = (Path(__file__).parent.parent / "docs" / "support.md").read_text()
    lines = re.search(r"<!-- cells -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert lines is not None
    head, _, *body = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[1].splitlines()
    ]
    return {
        (row[0], name): cell for row in body for name, cell in zip(head[1:], row[1:], strict=True)
    }


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process(tmp_path_factory.mktemp("gloo")):
        yield


def verdict(row: str, name: str) -> str:
    """Of a row, for the case of that name."""
    case = next(case for case in CASES if case.name == name)
    try:
        found = PROBES[row](case)
    except AssertionError:  # it runs, and gives something else
        raise
    except (RuntimeError, ValueError) as error:
        own = re.search(r"not supported by gmoe|: got .*, expected", str(error), re.DOTALL)
        return "refused" if own else "no"
    except Exception:
        return "no"
    return "partly" if found == "partly" else "yes"


STRONGER = {
    "`torch.compile`": "`torch.compile(fullgraph=True)`",
    "`torch.export`": "`torch.export` of a batch of any size",
}
"""Rows of which a ``yes`` implies one here, too."""


ELSEWHERE = {
    *(("`torch.export` of a batch of any size", column) for column in LAYERS),
    ("`torch.compile(fullgraph=True)`", "`MoEConv`"),
}
"""Cells whose layers the default tests of ``test_export.py`` and ``test_compile.py`` have."""


def cells() -> Iterator[Any]:
    """The cells to test: by default not what another implies, or another file tests at length."""
    says = table()
    for (row, column), said in says.items():
        is_implied = said == "yes" == says.get((STRONGER.get(row, ""), column))
        is_long = row.startswith("ONNX") or (row, column) in ELSEWHERE
        marks = [pytest.mark.slow] * (is_implied or is_long)
        if column in GRAPHS:
            marks += [COMPILES_GRAPHS] * row.startswith("`torch.compile")
            marks += [EXPORTS_GRAPHS] * row.startswith("ONNX")
        if said != "–":
            yield pytest.param(row, column, marks=marks, id=f"{row}-{column}")


@pytest.mark.parametrize(("row", "column"), cells())
def test_cell(row: str, column: str) -> None:
    expected = table()[row, column]
    assert {name: verdict(row, name) for name in LAYERS[column]} == dict.fromkeys(
        LAYERS[column], expected
    )


def test_the_table_has_every_row_and_column() -> None:
    assert list(table()) == [(row, column) for row in PROBES for column in LAYERS]
    assert set(table().values()) <= {"yes", "partly", "refused", "no", "–"}


SUMMARIZED = [
    "MoE token_choice",
    "moefied ViT",
    "MoEConv gcn",
    "MoEConv gcn copies",
    "GNNMoE copies",
]


@pytest.mark.parametrize("name", SUMMARIZED)
def test_torchinfo_counts_the_parameters_of_a_model(name: str) -> None:
    """Without inputs: with some, it refuses what a router returns."""
    torchinfo = pytest.importorskip("torchinfo")
    case = next(case for case in CASES if case.name == name)
    layer = case.make()
    number = sum(parameter.numel() for parameter in layer.parameters())
    assert torchinfo.summary(layer, verbose=0).total_params == number
    with pytest.raises(RuntimeError) as error:
        torchinfo.summary(layer, input_data=case.call().args, verbose=0)
    assert "unsupported input or output type: Routing(" in str(error.value.__cause__)


@pytest.mark.parametrize("name", SUMMARIZED)
def test_pygs_summary_runs_a_model(name: str) -> None:
    """And lists the sizes that go in and out."""
    pytest.importorskip("tabulate")
    case = next(case for case in CASES if case.name == name)
    layer, args = case.make().eval(), case.call().args
    shape = list(layer(*args).shape)
    assert str(shape) in summary(layer, *args).splitlines()[3]
