"""Moefied models that are saved to a folder and made again from their dense base."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch_geometric import nn as pyg

import gmoe
from gmoe.layer_groups import groups_of
from gmoe.moe import MoELayer
from gmoe.saved import receipt
from gmoe.stack import fold
from tests.helpers.huggingface import build
from tests.helpers.shrunk import EDGES, WIDTH, Mine, X, moved
from tests.helpers.vits import images, timm_vit, torchvision_vit


class MaskFirst(nn.Module):
    """Logits without the first class."""

    def forward(self, logits: Tensor) -> Tensor:
        is_first = torch.arange(logits.size(-1)) == 0
        return logits.masked_fill(is_first, -torch.inf)


GNNS = {
    "GCN": pyg.models.GCN,
    "GraphSAGE": pyg.models.GraphSAGE,
    "GIN": pyg.models.GIN,
    "GAT": pyg.models.GAT,
    "PNA": partial(
        pyg.models.PNA, aggregators=["mean"], scalers=["identity"], deg=torch.tensor([0, 3, 2])
    ),
}


def gnn(name: str) -> Any:
    torch.manual_seed(0)
    return GNNS[name](WIDTH, 6, 3, 3).double().eval()


BASES: dict[str, Callable[[], Any]] = {
    "timm": partial(timm_vit, 4),
    "torchvision": partial(torchvision_vit, 4),
    **{f"transformers {name}": partial(build, name) for name in ("ViT", "DINOv2, gated", "CLIP")},
    **{f"PyG {name}": partial(gnn, name) for name in GNNS},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "copies": {"start": "copies", "k": 2},
    "plain": {"start": "plain", "router": gmoe.ExpertChoice},
    "thresholds": {"router": "expert_choice", "router_kwargs": {"inference": "threshold"}},
    "centroids": {"router": "multi_centroid", "start": "copies"},
    "votes": {"router": "attention_vote"},
    "random": {"router": "random", "k": 2},
    "uniform": {"router": "uniform"},
}


def inputs_of(base: str) -> Any:
    if base.startswith("PyG"):
        return X, EDGES
    if base.startswith("transformers"):
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels}
    return images()


def run(model: Any, inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        out = model(inputs)
    elif isinstance(inputs, dict):
        out = model(**inputs)[0]
    else:
        out = model(*inputs)
    result: Tensor = out
    return result


def made(base: str, **options: Any) -> Any:
    """A moefied model, not at its start, after a step of training, which thresholds need."""
    torch.manual_seed(0)
    model = gmoe.moefy(BASES[base](), num_experts=4, **options).train()
    run(model, inputs_of(base))
    return moved(model)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_comes_back(model: Any, base: Any, inputs: Any, tmp_path: Path) -> Any:
    """With the same outputs, weights and files."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert gmoe.save(model, first, inputs) == first
    loaded = gmoe.load(first, base=base)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert receipt(loaded, first) == 0
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    assert not loaded.training
    gmoe.save(loaded, second, inputs)
    assert files(first) == files(second)
    return loaded


@pytest.mark.parametrize(
    ("base", "options"),
    [
        *((base, "copies") for base in BASES),
        # Beside a shared expert: one of each family; the next test has two more.
        *((base, "defaults") for base in ("torchvision", "transformers CLIP", "PyG PNA")),
    ],
)
def test_a_model_comes_back(base: str, options: str, tmp_path: Path) -> None:
    model = made(base, **OPTIONS[options])
    check_comes_back(model, BASES[base](), inputs_of(base), tmp_path)


@pytest.mark.parametrize("base", ["timm", "PyG GraphSAGE"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_router_and_start_comes_back(base: str, options: str, tmp_path: Path) -> None:
    model = made(base, **OPTIONS[options])
    loaded = check_comes_back(model, BASES[base](), inputs_of(base), tmp_path)
    assert any(isinstance(part, MoELayer) for part in loaded.modules())


@pytest.mark.parametrize("base", ["timm", "transformers ViT", "PyG GCN"])
@pytest.mark.parametrize("start", ["shared", "copies"])
def test_a_folded_pruned_and_partly_dense_model_comes_back(
    base: str, start: Any, tmp_path: Path
) -> None:
    model = made(base, start=start)
    inputs = inputs_of(base)
    fold(model)
    check_comes_back(model, BASES[base](), inputs, tmp_path / "folded")
    first, second = groups_of(model)
    routed: Any
    first.keep((0, 1, 3))
    first.keep((0, 2))
    check_comes_back(model, BASES[base](), inputs, tmp_path / "pruned")
    # The second layer equals a dense one: its routed part is zero, or has one expert.
    second.keep((2,))
    if start == "shared":
        (routed,) = second.layers.values()
        is_conv = isinstance(routed, gmoe.MoEConv)
        for parameter in [routed.gain] if is_conv else routed.experts.down.parameters():
            nn.init.zeros_(parameter)
    gmoe.densify(model)
    assert len(groups_of(model)) == 1
    check_comes_back(model, BASES[base](), inputs, tmp_path / "dense")


def test_a_class_is_saved_by_its_name_unless_copies_give_that_other_defaults(
    tmp_path: Path,
) -> None:
    def made(router: Any, start: Any) -> Any:
        options: dict[str, Any] = {"num_experts": 3, "k": 2, "start": start}
        return moved(gmoe.moefy(BASES["timm"](), router=router, **options))

    for router, start in ((gmoe.TokenChoice, None), (gmoe.RandomRouter, "copies")):
        check_comes_back(made(router, start), BASES["timm"](), images(), tmp_path / router.__name__)
    said = "router: got TokenChoice, expected names"
    with pytest.raises(ValueError, match=said):
        gmoe.save(made(gmoe.TokenChoice, "copies"), tmp_path / "copies")
    # Convs start beside a shared one, too.
    gmoe.save(gmoe.moefy(gnn("GCN"), router=gmoe.TokenChoice, k=2), tmp_path / "convs")
    own = gmoe.GNNMoE(WIDTH, 8, 3, num_layers=3, router=gmoe.TokenChoice, k=2)
    with pytest.raises(ValueError, match=said):
        own.save_pretrained(tmp_path / "own")


def test_layers_of_several_calls_come_back(tmp_path: Path) -> None:
    model = gmoe.moefy(BASES["timm"](), targets="blocks.1.mlp", num_experts=2, start="copies")
    model = moved(gmoe.moefy(model, targets="blocks.3.mlp", num_experts=3, router="random"))
    check_comes_back(model, BASES["timm"](), images(), tmp_path)


def test_a_module_that_is_used_twice_comes_back(tmp_path: Path) -> None:
    def base() -> Any:
        vit = BASES["timm"]()
        vit.blocks[3].mlp = vit.blocks[1].mlp
        return vit

    model = moved(gmoe.moefy(base(), num_experts=2))
    loaded = check_comes_back(model, base(), images(), tmp_path)
    assert loaded.blocks[3].mlp is loaded.blocks[1].mlp


def test_a_dense_module_that_is_used_twice_stays_one(tmp_path: Path) -> None:
    def base() -> Any:
        vit = BASES["timm"]()
        vit.blocks[3].mlp = vit.blocks[1].mlp
        return vit

    model: Any = gmoe.densify(gmoe.moefy(base(), num_experts=2, start="copies")).model
    loaded = check_comes_back(model, base(), images(), tmp_path)
    assert model.blocks[3].mlp is model.blocks[1].mlp
    assert loaded.blocks[3].mlp is loaded.blocks[1].mlp


@pytest.mark.filterwarnings("ignore:EdgeConv runs on the whole graph")
def test_convs_whose_widths_only_the_gnn_knows_come_back(tmp_path: Path) -> None:
    """An EdgeConv has no ``in_channels``, and its first matrix is twice as wide."""

    def base() -> Any:
        return pyg.models.EdgeCNN(WIDTH, 4, 3, 2).double().eval()

    for targets in (None, "convs.[01]"):
        model = moved(gmoe.moefy(base(), targets=targets, num_experts=2))
        check_comes_back(model, base(), (X, EDGES), tmp_path)


def test_the_dtypes_of_the_file_come_back(tmp_path: Path) -> None:
    model = made("timm").bfloat16()
    inputs = images().bfloat16()
    check_comes_back(model, BASES["timm"]().float(), inputs, tmp_path)


@pytest.mark.parametrize("conv", ["sage", ["graph", "sage", "gin", "gcn"]])
def test_a_gnn_of_gmoe_that_was_pruned_comes_back(conv: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"conv": conv, "num_experts": 4}
    torch.manual_seed(0)
    model = moved(gmoe.GNNMoE(WIDTH, 6, 3, 4, **options).double())
    for group in groups_of(model):
        group.keep((1, 3))
    base = gmoe.GNNMoE(WIDTH, 6, 3, 4, **options)
    check_comes_back(model, base, (X, EDGES), tmp_path)
    check_comes_back(model, None, (X, EDGES), tmp_path)


def test_models_of_gmoe_that_became_dense_come_back(tmp_path: Path) -> None:
    vit = gmoe.ViTMoE(8, num_experts=2)
    gnn = gmoe.GNNMoE(WIDTH, 6, 3, conv="sage", num_experts=4)
    inputs = images()[:, :, :8, :8].float(), (X.float(), EDGES)
    for model, base, of_model in (
        (vit.eval(), gmoe.ViTMoE(8, num_experts=2), inputs[0]),
        (gnn.eval(), gmoe.GNNMoE(WIDTH, 6, 3, conv="sage", num_experts=4), inputs[1]),
    ):
        gmoe.densify(model)
        assert not groups_of(model)
        check_comes_back(model, base, of_model, tmp_path)
        check_comes_back(model, None, of_model, tmp_path)


@pytest.mark.parametrize("base", ["timm", "PyG GAT"])
def test_moefied_models_that_became_dense_come_back(base: str, tmp_path: Path) -> None:
    """At the start, the shared expert of each layer is the dense one."""
    model = gmoe.densify(gmoe.moefy(BASES[base](), num_experts=4).eval()).model
    assert not groups_of(model)
    check_comes_back(model, BASES[base](), inputs_of(base), tmp_path)


@pytest.mark.parametrize(
    "router", [Mine, partial(gmoe.TokenChoice, noise=False)], ids=["class", "partial"]
)
def test_a_router_without_a_name_is_refused(router: Any, tmp_path: Path) -> None:
    model = gmoe.moefy(timm_vit(2), num_experts=2, router=router)
    with pytest.raises(ValueError, match=r"^router: got .*torch\.save\(model\.state_dict"):
        gmoe.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def options_of(router: nn.Module) -> list[tuple[nn.Module, str]]:
    """The attributes that may say what a router does: of it and of its parts."""
    return [
        (part, name)
        for part in router.modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_")
        and name not in ("training", "process_group")
        and name != "dim"  # with another one, the router takes no tokens
    ]


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"not {value}"
    return 0.5 if value is None else value + 1


@pytest.mark.parametrize(
    ("base", "kept"),
    [("timm", None), ("PyG GraphSAGE", [0, 2])],
    ids=["of MLPs", "of convs, pruned"],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_of_a_router_that_was_changed_is_refused(
    options: str, base: str, kept: list[int] | None, tmp_path: Path
) -> None:
    """Each by itself; the file would not hold it."""
    model = made(base, **OPTIONS[options])
    if kept is not None:
        for group in groups_of(model):
            group.keep(kept)
    gmoe.save(model, tmp_path)
    layer: Any = next(part for part in model.modules() if isinstance(part, MoELayer))
    changes = options_of(layer.router)
    assert len(changes) > 5
    for part, name in changes:
        before = getattr(part, name)
        setattr(part, name, another(before))
        if name == "check_finite":  # it changes no output
            gmoe.save(model, tmp_path)
        else:
            with pytest.raises(ValueError, match=rf"^(\w+\.)*{name}: got {another(before)!r} of"):
                gmoe.save(model, tmp_path)
        setattr(part, name, before)
    gmoe.save(model, tmp_path)


def test_parts_that_were_replaced_are_refused(tmp_path: Path) -> None:
    def refused(change: Callable[[Any], Any], words: str) -> None:
        model: Any = gmoe.moefy(timm_vit(2), num_experts=2)
        model = change(model) or model
        with pytest.raises(ValueError, match=words):
            gmoe.save(model, tmp_path / "model")

    def set_router(model: Any) -> None:
        model.blocks[1].mlp.router = Mine(16, num_experts=2)

    def set_up(model: Any) -> None:
        model.blocks[1].mlp.experts.up = nn.Bilinear(16, 2, 24)

    def set_experts(model: Any) -> None:
        class Own(gmoe.MLPExperts):
            """Has no weights beyond its base's, and may compute something else."""

        model.blocks[1].mlp.experts = Own(16, 12, 16, num_experts=2)

    def set_members(model: Any) -> None:
        """Under the name that convs have which run one by one."""
        model.blocks[1].mlp.experts.members = nn.Sequential(nn.Linear(2, 2))

    refused(set_members, r"^model: got blocks\.1\.mlp\.experts\.members\.0, a Linear")
    refused(set_experts, r"^model: got blocks\.1\.mlp\.experts, a Own")
    refused(set_router, r"^model: got blocks\.1\.mlp\.router, a Mine")
    refused(set_up, "a Bilinear, expected experts as they were built")
    refused(gmoe.unstack, r"gmoe\.restack\(model\) before")
    refused(lambda model: quantize_dynamic(model, {nn.Linear}), "before layers are quantized")
    unstacked_first = r"with a torch\..*Linear, expected experts as they were built"
    refused(lambda model: quantize_dynamic(gmoe.unstack(model), {nn.Linear}), unstacked_first)


def test_a_layer_whose_widths_are_open_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"conv": gmoe.MoEConv("gcn", -1, 4)})
    with pytest.raises(ValueError, match=r"^model: got conv, whose widths are open: call it once"):
        gmoe.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_inputs_and_models_that_are_none_are_refused(tmp_path: Path) -> None:
    model = made("PyG GCN")
    with pytest.raises(ValueError, match=r"^inputs: got int as args\.2"):
        gmoe.save(model, tmp_path / "model", (X, EDGES, 3))
    with pytest.raises(ValueError, match=r"^inputs: got a batch of type int"):
        gmoe.save(model, tmp_path / "model", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^inputs: got some for which the model returns NaN"):
        gmoe.save(model, tmp_path / "model", (X * torch.nan, EDGES))
    unordered: Any = gmoe.load, gmoe.save
    for call in unordered:
        with pytest.raises(ValueError, match=r"^(base|model): got .*Path, expected a module"):
            call(*((model, tmp_path) if call is gmoe.load else (tmp_path, model)))
    with pytest.raises(ValueError, match=r"^tolerance: got nan, expected a number of at least 0"):
        gmoe.load(tmp_path, base=model, tolerance=math.nan)


def test_infinite_outputs_do_not_hide_another_base(tmp_path: Path) -> None:
    def masked(**options: Any) -> nn.Module:
        return nn.Sequential(timm_vit(4, **options), MaskFirst())

    torch.manual_seed(0)
    model = gmoe.moefy(masked(), num_experts=4, start="copies").eval()
    gmoe.save(model, tmp_path, images())
    assert receipt(gmoe.load(tmp_path, base=masked()), tmp_path) == 0.0
    with pytest.raises(ValueError, match=r"receipt\.safetensors: got outputs that differ by"):
        gmoe.load(tmp_path, base=masked(act_layer=nn.ReLU))


def test_without_inputs_weights_alone_are_checked(tmp_path: Path) -> None:
    model = made("timm")
    gmoe.save(model, tmp_path, images())
    gmoe.save(model, tmp_path)  # takes the earlier receipt away
    loaded = gmoe.load(tmp_path, base=BASES["timm"]())
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(FileNotFoundError):
        receipt(loaded, tmp_path)


def test_a_base_with_other_options_is_found_out(tmp_path: Path) -> None:
    gmoe.save(made("timm"), tmp_path, images())
    with pytest.raises(ValueError, match=r"receipt\.safetensors: got outputs that differ by"):
        gmoe.load(tmp_path, base=timm_vit(4, act_layer=nn.ReLU))
    with pytest.raises(ValueError, match=r"model\.safetensors: got .*blocks\.4"):
        gmoe.load(tmp_path, base=timm_vit(6))
    with pytest.raises(ValueError, match=r"gmoe\.json: got .*base: got a GCN"):
        gmoe.load(tmp_path, base=gnn("GCN"))


def replaced(folder: Path, content: bytes) -> None:
    (folder / "gmoe.json").write_bytes(content)


def edited(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = json.loads((folder / "gmoe.json").read_text())
        (folder / "gmoe.json").write_text(json.dumps(change(found) or found))

    return edit


def layer(**changes: Any) -> Callable[[Path], None]:
    return edited(lambda found: found["layers"]["blocks.1.mlp"].update(changes))


def moefied(**changes: Any) -> Callable[[Path], None]:
    return edited(lambda found: found["layers"]["blocks.1.mlp"]["moefied"].update(changes))


def overwritten(content: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "gmoe.json").write_bytes(content)

    return edit


TAMPERED: dict[str, Callable[[Path], None]] = {
    "no JSON": overwritten(b"{"),
    "lists in lists": overwritten(b"[" * 100_000),
    "a word of megabytes": edited(lambda found: found | {"format": "x" * 2**20}),
    "more experts than weights": moefied(num_experts=2**40),
    "a pickle": overwritten(pickle.dumps({})),
    "a list": edited(lambda _: [1]),
    "an earlier format": edited(lambda found: found | {"format": 1}),
    "no layers": edited(lambda found: found.pop("layers") and None),
    "a layer that is a number": edited(lambda found: found | {"layers": {"blocks.1.mlp": 3}}),
    "a module that is not there": edited(lambda found: found | {"layers": {"blocks.9.mlp": None}}),
    "a router by its path": moefied(router="os.system"),
    "an unknown argument": moefied(targets="*"),
    "a number as text": moefied(num_experts="8"),
    "experts below 1": moefied(k=0),
    "arguments of another router": moefied(router_kwargs={"capacity": 3}),
    "arguments that are a list": moefied(router_kwargs=[1]),
    "an unknown start": moefied(start="warm"),
    "too many kept": layer(kept=[0, 9]),
    "none kept": layer(kept=[]),
    "kept by name": layer(kept=["0"]),
    "kept twice": layer(kept=[0, 0]),
    "a word for a truth": layer(dense="no"),
    "an unknown key": layer(code="print()"),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_file_is_an_error_that_names_it(
    tamper: Callable[[Path], None], tmp_path: Path
) -> None:
    gmoe.save(made("timm"), tmp_path)
    tamper(tmp_path)
    with pytest.raises(ValueError, match=r"gmoe\.json: got "):
        gmoe.load(tmp_path, base=BASES["timm"]())


def test_a_damaged_receipt_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Also inputs that the model does not take."""
    path = gmoe.save(made("PyG GCN"), tmp_path, (X, EDGES)) / "receipt.safetensors"
    whole = path.read_bytes()
    receipt = safetensors.load(whole)
    others = (X[:, 1:], X.long(), EDGES.double(), EDGES + 10_000)
    broken = [b"", whole[:-1], bytes(len(whole))]
    broken += [safetensors.save(receipt | {"args.0": one.contiguous()}) for one in others[:2]]
    broken += [safetensors.save(receipt | {"args.1": one}) for one in others[2:]]
    broken += [safetensors.save({"args.1": EDGES}), safetensors.save({"outputs.0": X})]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path}: got [^\n]+$"):
            gmoe.load(tmp_path, base=gnn("GCN"))


def test_damaged_weights_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    gmoe.save(made("timm"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: got "):
        gmoe.load(tmp_path, base=BASES["timm"]())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        gmoe.load(tmp_path, base=BASES["timm"]())


# save_pretrained of transformers -----------------------------------------------------------------


def test_save_pretrained_of_copies_and_pickles_keeps_the_experts(tmp_path: Path) -> None:
    """The method belongs to the copy, whose weights it writes."""
    model: Any = made("transformers ViT")
    inputs = inputs_of("transformers ViT")
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    listed: Any = nn.ModuleList([model])[0]
    for number, saved in enumerate((model, moved(copied), moved(pickled), listed)):
        saved.save_pretrained(tmp_path / str(number))
        again = gmoe.load(tmp_path / str(number))
        assert torch.equal(run(again, inputs), run(saved, inputs))
    assert not torch.equal(run(copied, inputs), run(model, inputs))


class OfAnotherLibrary(nn.Module):
    """A model whose way of saving knows nothing of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm_vit(2)

    def save_pretrained(self, folder: str) -> str:
        """As ``PyTorchModelHubMixin`` and diffusers have it."""
        return folder


def test_save_pretrained_of_other_libraries_is_refused_with_the_line_to_call() -> None:
    model: Any = gmoe.moefy(OfAnotherLibrary(), num_experts=2)
    for refused in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"expected gmoe\.save\(model, 'nowhere'\)"):
            refused.save_pretrained("nowhere")


def test_save_pretrained_works_again_once_all_layers_are_dense(tmp_path: Path) -> None:
    model: Any = gmoe.moefy(BASES["transformers ViT"](), num_experts=2)
    gmoe.densify(model)
    assert not groups_of(model)
    model.save_pretrained(tmp_path)
    again = hf.ViTForImageClassification.from_pretrained(tmp_path)
    inputs = inputs_of("transformers ViT")
    assert torch.equal(run(again.eval(), inputs), run(model, inputs))
