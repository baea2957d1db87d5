"""Moefied models that are saved to a folder and made again from their dense base."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.optim.swa_utils import AveragedModel
from torch_geometric import nn as pyg

import gmoe
from gmoe.moe import MoELayer
from gmoe.pruning import groups_of
from tests.helpers.huggingface import build
from tests.helpers.shrunk import EDGES, WIDTH, Mine, X, moved
from tests.helpers.vits import images, timm_vit, torchvision_vit

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
    assert gmoe.save(model, first) == first
    loaded = gmoe.load(first, base=base)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    assert not loaded.training
    gmoe.save(loaded, second)
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


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": partial(torch.compile, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "averaged by timm": ModelEmaV3,
    "set up by Fabric": lambda model: Fabric(accelerator="cpu").setup(model),
    "compiled, averaged": lambda model: torch.compile(AveragedModel(model), backend="eager"),
}


@pytest.mark.parametrize("base", [None, "timm", "PyG GCN"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_model_inside_of_a_wrapper_is_saved_and_a_wrapped_one_is_not_changed(
    wrap: Any, base: str | None, tmp_path: Path
) -> None:
    model = gmoe.GNNMoE(WIDTH, 6, 3).double().eval() if base is None else made(base)
    gmoe.save(wrap(model), tmp_path)
    loaded = gmoe.load(tmp_path, base=None if base is None else BASES[base]())
    inputs = inputs_of(base or "PyG")
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    if base is not None:
        with pytest.raises(ValueError, match="expected the model inside"):
            gmoe.moefy(wrap(BASES[base]()))


@pytest.mark.parametrize("base", ["timm", "transformers ViT", "PyG GCN", "PyG PNA"])
@pytest.mark.parametrize("start", ["shared", "copies"])
def test_a_pruned_model_comes_back(base: str, start: Any, tmp_path: Path) -> None:
    model = made(base, start=start)
    first, second = groups_of(model)
    first.keep((0, 1, 3))
    first.keep((0, 2))
    check_comes_back(model, BASES[base](), inputs_of(base), tmp_path / "one")
    second.keep((2,))
    check_comes_back(model, BASES[base](), inputs_of(base), tmp_path / "both")


def test_a_class_is_saved_by_its_name_however_layers_start(tmp_path: Path) -> None:
    def made(router: Any, start: Any) -> Any:
        options: dict[str, Any] = {"num_experts": 3, "k": 2, "start": start}
        return moved(gmoe.moefy(BASES["timm"](), router=router, **options))

    for router in (gmoe.TokenChoice, gmoe.RandomRouter):
        for start in (None, "copies"):
            folder = tmp_path / f"{router.__name__}-{start}"
            check_comes_back(made(router, start), BASES["timm"](), images(), folder)
    own = gmoe.GNNMoE(WIDTH, 8, 3, num_layers=3, router=gmoe.TokenChoice)
    assert own.config["router"] == "token_choice"


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


@pytest.mark.filterwarnings("ignore:EdgeConv runs on the whole graph")
def test_convs_whose_widths_only_the_gnn_knows_come_back(tmp_path: Path) -> None:
    """An EdgeConv has no ``in_channels``, and its first matrix is twice as wide."""

    def base() -> Any:
        return pyg.models.EdgeCNN(WIDTH, 4, 3, 2).double().eval()

    for targets in (None, "convs.[01]"):
        model = moved(gmoe.moefy(base(), targets=targets, num_experts=2))
        check_comes_back(model, base(), (X, EDGES), tmp_path)


def test_tensors_that_are_shared_come_back(tmp_path: Path) -> None:
    """safetensors takes no two names for one memory."""

    def base() -> Any:
        vit = BASES["timm"]()
        vit.blocks[2].attn.qkv.weight = vit.blocks[0].attn.qkv.weight
        return vit

    model = moved(gmoe.moefy(base(), num_experts=2))
    loaded = check_comes_back(model, base(), images(), tmp_path)
    assert loaded.blocks[2].attn.qkv.weight is loaded.blocks[0].attn.qkv.weight


def test_the_dtypes_of_the_file_come_back(tmp_path: Path) -> None:
    model = made("timm").bfloat16()
    inputs = images().bfloat16()
    check_comes_back(model, BASES["timm"]().float(), inputs, tmp_path)


@pytest.mark.parametrize("shared_router", [True, False])
@pytest.mark.parametrize("conv", ["sage", ["graph", "sage", "gin", "gcn"]])
def test_a_gnn_of_gmoe_that_was_pruned_comes_back(
    conv: Any, shared_router: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"conv": conv, "num_experts": 4, "shared_router": shared_router}
    torch.manual_seed(0)
    model = moved(gmoe.GNNMoE(WIDTH, 6, 3, 4, **options).double())
    for group in groups_of(model):
        group.keep((1, 3))
    base = gmoe.GNNMoE(WIDTH, 6, 3, 4, **options)
    check_comes_back(model, base, (X, EDGES), tmp_path)
    check_comes_back(model, None, (X, EDGES), tmp_path)


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
    if kept is not None and options != "uniform":  # of which no expert can be taken away
        for group in groups_of(model):
            group.keep(kept)
    gmoe.save(model, tmp_path)
    layer: Any = next(part for part in model.modules() if isinstance(part, MoELayer))
    changes = options_of(layer.router)
    assert len(changes) >= 3
    for part, name in changes:
        before = getattr(part, name)
        setattr(part, name, another(before))
        with pytest.raises(ValueError, match=rf"^(\w+\.)*{name}: got {another(before)!r} of"):
            gmoe.save(model, tmp_path)
        setattr(part, name, before)
    gmoe.save(model, tmp_path)


def test_what_changes_no_output_is_saved(tmp_path: Path) -> None:
    """Attached losses, hooks, compiled parts, recomputation, frozen parts, another precision."""
    model: Any = made("timm", router_kwargs={"balance": "switch"})
    gmoe.attach_aux_loss(model)
    model.set_grad_checkpointing(True)
    model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    model.blocks[3].mlp.compile(backend="eager")
    model.train()(images()).sum().backward()
    model.blocks[1].mlp.requires_grad_(False)
    check_comes_back(model.eval().float(), BASES["timm"](), images().float(), tmp_path)


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

    refused(set_members, r"^model: got blocks\.1\.mlp\.experts\.members, Sequential, expected none")
    refused(set_experts, r"^model: got blocks\.1\.mlp\.experts, Own, expected MLPExperts")
    refused(set_router, r"^model: got blocks\.1\.mlp\.router, Mine, expected TokenChoice")
    refused(set_up, "up, Bilinear, expected LinearExperts, as it was built")
    refused(
        gmoe.unstack, r"^model: got blocks\.1\.mlp\.experts\.up, UnstackedLinears, .*state_dict"
    )
    quantized = partial(quantize_dynamic, qconfig_spec={nn.Linear})
    refused(quantized, r"^model: got blocks\.1\.mlp\.shared_expert\.fc1\.weight, .*state_dict")
    base = quantize_dynamic(timm_vit(2), {nn.Linear})
    with pytest.raises(ValueError, match=r"^model: got \S+, a \w+, expected plain tensors"):
        gmoe.save(base, tmp_path / "model")


def test_a_layer_whose_widths_are_open_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"conv": gmoe.MoEConv("gcn", -1, 4)})
    with pytest.raises(ValueError, match=r"^model: got conv, whose widths are open, expected"):
        gmoe.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    unordered: Any = gmoe.load, gmoe.save
    for call in unordered:
        with pytest.raises(ValueError, match=r"^(base|model): got .*Path, expected a module"):
            call(*((timm_vit(2), tmp_path) if call is gmoe.load else (tmp_path, timm_vit(2))))


def test_a_base_of_another_size_or_class_is_found_out(tmp_path: Path) -> None:
    gmoe.save(made("timm"), tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: got .*blocks\.4"):
        gmoe.load(tmp_path, base=timm_vit(6))
    with pytest.raises(ValueError, match=r"gmoe\.json: got .*base: got a GCN"):
        gmoe.load(tmp_path, base=gnn("GCN"))


def edited(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = json.loads((folder / "gmoe.json").read_text())
        (folder / "gmoe.json").write_text(json.dumps(change(found) or found))

    return edit


def call(**changes: Any) -> Callable[[Path], None]:
    return edited(lambda found: found["moefy"][0].update(changes))


def kept(ids: Any) -> Callable[[Path], None]:
    return edited(lambda found: found.update(kept={"blocks.1.mlp": ids}))


def overwritten(content: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "gmoe.json").write_bytes(content)

    return edit


TAMPERED: dict[str, Callable[[Path], None]] = {
    "no JSON": overwritten(b"{"),
    "lists in lists": overwritten(b"[" * 100_000),
    "more experts than weights": call(num_experts=2**40),
    "a pickle": overwritten(pickle.dumps({})),
    "a list": edited(lambda _: [1]),
    "a config.json of transformers": edited(lambda _: {"model_type": "vit"}),
    "no calls": edited(lambda found: found.pop("moefy") and None),
    "a call that is a number": edited(lambda found: found | {"moefy": [3]}),
    "a module that is not there": call(targets=["blocks.9.mlp"]),
    "all modules": call(targets="*"),
    "a router by its path": call(router="os.system"),
    "an unknown argument": call(code="print()"),
    "a number as text": call(num_experts="8"),
    "experts below 1": call(k=0),
    "arguments of another router": call(router_kwargs={"capacity": 3}),
    "arguments that are a list": call(router_kwargs=[1]),
    "an unknown start": call(start="warm"),
    "another class": edited(lambda found: found | {"model": "x" * 2**20}),
    "too many kept": kept([0, 9]),
    "kept by name": kept(["0"]),
    "kept twice": kept([0, 0]),
    "kept as a number": kept(1),
    "an unknown key": edited(lambda found: found | {"code": "print()"}),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_file_is_an_error_that_names_it(
    tamper: Callable[[Path], None], tmp_path: Path
) -> None:
    gmoe.save(made("timm"), tmp_path)
    tamper(tmp_path)
    with pytest.raises(ValueError, match=r"gmoe\.json: got [^\n]{1,1500}$"):
        gmoe.load(tmp_path, base=BASES["timm"]())


def test_experts_that_do_not_have_the_weights_of_those_kept_are_refused(tmp_path: Path) -> None:
    gmoe.save(made("timm"), tmp_path)
    kept([0, 1])(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: got .*blocks\.1\.mlp"):
        gmoe.load(tmp_path, base=BASES["timm"]())


def test_damaged_or_missing_weights_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    gmoe.save(made("timm"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: got "):
        gmoe.load(tmp_path, base=BASES["timm"]())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: got no such file, expected"):
        gmoe.load(tmp_path, base=BASES["timm"]())
    (tmp_path / "gmoe.json").unlink()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"config\.json: got no such file, expected"):
            gmoe.load(folder, base=BASES["timm"]())


def test_nothing_but_json_and_tensors_is_written(tmp_path: Path) -> None:
    gmoe.save(made("timm"), tmp_path)
    assert files(tmp_path).keys() == {"gmoe.json", "model.safetensors"}
    spec = json.loads((tmp_path / "gmoe.json").read_text())
    assert spec.keys() == {"model", "arguments", "moefy", "kept"}
    assert [call["targets"] for call in spec["moefy"]] == [["blocks.1.mlp", "blocks.3.mlp"]]
    assert load_file(tmp_path / "model.safetensors").keys() == made("timm").state_dict().keys()


OF_PARTS: dict[str, Callable[[Any], Any]] = {
    "activation": lambda layer: setattr(layer.experts, "activation", nn.ReLU()),
    "dropout": lambda layer: setattr(layer.experts.hidden_dropout, "p", 0.5),
    "shared_expert": lambda layer: setattr(layer.shared_expert.drop1, "p", 0.5),
    "act": lambda layer: setattr(layer.shared_expert, "act", nn.Tanh()),
}


@pytest.mark.parametrize("change", OF_PARTS.values(), ids=OF_PARTS)
def test_an_option_of_another_part_of_a_layer_that_was_changed_is_refused(
    change: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = made("timm")
    change(model.blocks[1].mlp)
    with pytest.raises(ValueError, match=r"^(model: got )?\S+: got|^model: got blocks\.1\.mlp"):
        gmoe.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
