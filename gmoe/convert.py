"""Put MoE in place of the MLPs of a transformer, or of the convs of a PyG GNN.

Shapes: B images, T tokens, D width, E experts.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from gmoe._checks import check, check_count
from gmoe.dispatch import Backend
from gmoe.experts import MLPExperts
from gmoe.moe import MoE
from gmoe.routers import Router, RouterLike, build_router

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where torch keeps the hooks of a module."""


def moefy(
    model: nn.Module,
    every: int | None = None,
    k: int = 2,
    router: RouterLike = "token_choice",
    num_experts: int = 8,
    upcycle: bool = True,
    *,
    blocks: Sequence[int] | None = None,
    router_kwargs: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
) -> nn.Module:
    r"""Replace the MLP of every n-th transformer block by a MoE; turn a dense PyG GNN into a :class:`gmoe.GNNMoE`.

    A transformer (torchvision's or timm's ``VisionTransformer``, or any model whose blocks lie in a ``ModuleList`` or
    ``Sequential`` and each hold an ``mlp`` of linear, activation, linear) is changed in place and returned. Its MLPs
    must see tokens as (B, T, D): the tokens of an image are a group, padding included, so that in a model that pads its
    sequences (timm's NaFlexViT) padding takes places where experts choose, and counts in all loads. A PyG ``GCN``,
    ``GraphSAGE``, ``GIN``, ``GAT``, ... is left alone, and a new model is returned.

    With ``upcycle`` every expert starts as a copy of the dense MLP (sparse upcycling, Komatsuzaki et al., 2023), so
    that the layer starts as ``(sum of the token's weights) * mlp(x)``. What that means for each router:

    - ``"token_choice"`` and ``"multi_centroid"`` at K >= 2 (normalized), ``"random"`` and ``"uniform"``, whose
      weights sum to 1: the first forward equals the dense model's.
    - at K = 1, ``"token_choice"`` (straight-through) equals it too; ``"multi_centroid"`` (by score) scales the MLP's
      output by the top probability, between 1 / E and 1, unless ``weight="straight_through"``.
    - ``"expert_choice"`` by score: scaled by the sum of the probabilities of the experts that took the token; zero for
      tokens that none took. ``weight="normalized"`` equals the dense one for all tokens that are taken.
    - ``"attention_vote"``, and expert choice with softmax along tokens: weights average 1 over the chosen pairs, not
      over a token's own, and tokens that none took get zero.

    Args:
        model: the dense model.
        every: n; block or layer ``i`` becomes MoE where ``i % n == n - 1`` (default 2 of a transformer, 1 of a GNN,
            whose output layer stays dense).
        k: K, experts per token (default 2).
        router: a name or factory (default ``"token_choice"``); one router is built a layer.
        num_experts: E (default 8).
        upcycle: start the experts as copies of the dense MLP (default), frozen where it is frozen, or afresh.
        blocks: of a transformer, indices of the blocks that become MoE, in place of ``every`` (default ``None``).
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.dispatch.grouped_linear`.

    Returns:
        The model with MoE layers; collect their routings with :func:`gmoe.record_routing`.

    Raises:
        ValueError: no such blocks, fewer than ``every``, or an argument out of range; an MLP of another form, without
            values (on the meta device), with a parametrized weight (weight norm, spectral norm, pruning), or with
            hooks: experts would lose them.
    """
    check(isinstance(model, nn.Module), "model", type(model).__name__, "a transformer or a PyG GNN")
    if every is not None:
        check_count("every", every)
    if isinstance(router, Router):
        raise ValueError("router: got an instance, expected a name or a factory, since several layers are built")
    pyg = sys.modules.get("torch_geometric.nn.models.basic_gnn")  # who has a PyG model has imported it
    if pyg is not None and isinstance(model, pyg.BasicGNN):
        check(blocks is None, "blocks", f"{blocks} for a GNN", "None and `every`")
        options = {"k": k, "router": router, "num_experts": num_experts, "router_kwargs": router_kwargs}
        return _moefy_gnn(model, upcycle, every=every or 1, backend=backend, **options)
    found = _blocks(model)
    chosen = [found[i] for i in choose_blocks(len(found), every or 2, blocks)]
    layers = []
    for block in chosen:  # build all before changing any: an error leaves the model as it was
        experts = _experts_like(block.mlp, num_experts, upcycle, backend)
        first = experts.up.weight
        layer = MoE(build_router(router, experts.in_features, num_experts, k, router_kwargs), experts)
        layers.append(layer.to(device=first.device, dtype=first.dtype).train(block.mlp.training))
    for block, layer in zip(chosen, layers, strict=True):
        block.mlp = layer
    return model


def choose_blocks(count: int, every: int, blocks: Sequence[int] | None) -> list[int]:
    """Which of ``count`` blocks become MoE: every n-th, or those that are named.

    Raises:
        ValueError: no block, or one that is not there or is named twice.
    """
    if blocks is None:
        check(every <= count, "every", every, f"at most the number of blocks, {count}")
        return list(range(every - 1, count, every))
    if not isinstance(blocks, Iterable):
        raise ValueError(f"blocks: got {blocks!r}, expected a list of numbers of blocks")
    blocks = tuple(blocks)
    whole = all(isinstance(block, Integral) for block in blocks)  # NumPy's too
    legal = blocks and whole and len(set(blocks)) == len(blocks) and set(blocks) <= set(range(count))
    check(legal, "blocks", blocks, f"some of 0 to {count - 1}, each once")
    return sorted(map(int, blocks))


def _blocks(model: nn.Module) -> list[Any]:
    """The transformer blocks in order."""
    stages = [
        list(container)
        for container in model.modules()
        if isinstance(container, nn.ModuleList | nn.Sequential)
        and len(container)
        and all(isinstance(getattr(block, "mlp", None), nn.Module) for block in container)
    ]
    if len(stages) == 1:
        return stages[0]
    expected = "torchvision's or timm's VisionTransformer"
    if stages:
        problem = (
            f"whose blocks lie in several stages; expected one sequence of blocks on tokens (B, T, D), as in {expected}"
        )
    else:
        problem = f"expected a transformer with blocks that hold an `mlp`, such as {expected}, or a PyG BasicGNN"
    raise ValueError(f"model: got {type(model).__name__}, {problem}")


def _experts_like(mlp: nn.Module, num_experts: int, upcycle: bool, backend: Backend) -> MLPExperts:
    """Experts of the form of a dense MLP, and with ``upcycle`` copies of it, which is verified on random tokens."""
    check(not isinstance(mlp, MoE), "model", "a block whose mlp is a MoE already", "a dense one; see `blocks`")
    _refuse_what_would_be_lost(mlp)
    up, activation, down, dropout = _form(mlp)
    check(not up.weight.is_meta, "model", "parameters on the meta device", "ones with values")
    sizes = up.in_features, up.out_features, down.out_features, num_experts
    options: Any = {"activation": copy.deepcopy(activation), "dropout": dropout, "bias": up.bias is not None}
    experts = MLPExperts(*sizes, **options, backend=backend).to(device=up.weight.device, dtype=up.weight.dtype)
    copies = copy.deepcopy(experts)
    for part, linear in ((copies.up, up), (copies.down, down)):
        part.copy_(slice(None), linear.weight.T, linear.bias)
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(linear.get_parameter(name).requires_grad)
    _verify_form(mlp, copies)
    return copies if upcycle else experts


def _refuse_what_would_be_lost(mlp: nn.Module) -> None:
    """Weights that are computed from other parameters, and hooks: experts would take over neither."""
    for name, part in mlp.named_modules():
        hooks = [hook for kind in HOOKS for hook in getattr(part, kind).values()]
        if isinstance(part, nn.Linear) and not {"weight", "bias"} <= part._parameters.keys():
            got, expected = "a parametrized weight (weight norm, spectral norm, pruning)", "a plain one"
        elif hooks:
            called = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
            got, expected = f"hooks ({called})", "none"
        else:
            continue
        where = f"mlp.{name}" if name else "mlp"
        raise ValueError(
            f"model: got {where} with {got}, expected {expected}, since experts would not run it; remove it first, or "
            "leave the block out of `blocks`"
        )


def _form(mlp: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear, tuple[float, float]]:
    """The parts of an MLP and its two probabilities of dropout, by the order in which a forward calls them."""
    called = [part for part in _calls(mlp) if not isinstance(part, nn.Dropout) or part.p > 0]
    form = [part for part in called if not isinstance(part, nn.Dropout)]
    drops = "".join("D" if isinstance(part, nn.Dropout) else "x" for part in called)
    match form:
        case [nn.Linear() as up, activation, nn.Linear() as down] if (
            not list(activation.parameters())
            and up.out_features == down.in_features
            and (up.bias is None) == (down.bias is None)
            and drops in ("xxx", "xxDx", "xxxD", "xxDxD")
        ):
            hidden, output = (part.p if isinstance(part, nn.Dropout) else 0.0 for part in (called[2], called[-1]))
            return up, activation, down, (hidden, output)
    names = [
        f"Linear {part.in_features} to {part.out_features}" if isinstance(part, nn.Linear) else type(part).__name__
        for part in called
    ]
    raise ValueError(
        f"model: got an mlp of ({', '.join(names)}), expected (Linear, an activation without parameters, Linear), "
        "as wide as one another between, both with or both without bias, with dropout only before and after the "
        "second; gated MLPs are none"
    )


@torch.no_grad()
def _calls(mlp: nn.Module) -> list[Any]:
    """The innermost modules of an MLP as a forward of it calls them; identities left out."""
    leaves = {name: part for name, part in mlp.named_modules() if next(part.children(), None) is None}
    first = next((part for part in leaves.values() if isinstance(part, nn.Linear)), None)
    if first is None:
        return list(leaves.values())
    called: list[Any] = []
    probe = copy.deepcopy(mlp).eval()
    for name, part in leaves.items():
        if not isinstance(part, nn.Identity):
            probe.get_submodule(name).register_forward_hook(lambda *_, part=part: called.append(part))
    try:
        probe(torch.zeros(1, 5, first.in_features, dtype=first.weight.dtype, device=first.weight.device))
    except Exception as error:
        raise ValueError(
            f"model: got an mlp ({type(mlp).__name__}) that does not take tokens (B, T, {first.in_features}), expected "
            f"one that does ({type(error).__name__}: {error})"
        ) from error
    return called


@torch.no_grad()
def _verify_form(mlp: nn.Module, experts: MLPExperts) -> None:
    """Refuse an mlp whose leaves look right but whose forward does something else than its copies."""
    copies, reference = (
        copy.deepcopy(module).cpu().double() for module in (experts, mlp)
    )  # not every device has doubles
    for part in (*copies.modules(), *reference.modules()):
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    x = torch.randn(5, experts.in_features, dtype=torch.float64)
    offsets = torch.full((experts.num_experts,), 5, dtype=torch.int32)
    for training in (False, True):  # in training too: a dropout that is no module, and is not carried over, shows
        found, expected = copies.train(training)(x, offsets), reference.train(training)(x[None])[0]
        got = f"an mlp ({type(mlp).__name__}) that does not compute linear, activation, linear"
        check(torch.allclose(found, expected, atol=1e-8), "model", got, "one that does")


def _moefy_gnn(model: Any, upcycle: bool, **options: Any) -> nn.Module:
    """A GNNMoE with the options and, with ``upcycle``, the parameters of a dense PyG GNN; without residuals, as it."""
    from gmoe.models.gnn import DenseLayers, GNNMoE

    if not isinstance(model.in_channels, int) or any(p.numel() == 0 for p in model.parameters()):
        raise ValueError("model: got a GNN with bipartite or lazy layers, expected one with known in_channels")
    moe = GNNMoE(
        model.in_channels,
        model.hidden_channels,
        model.out_channels,
        model.num_layers,
        conv=DenseLayers(model, upcycle),
        router_input="node",
        dropout=model.dropout.p,
        act=copy.deepcopy(model.act),
        act_first=model.act_first,
        norm=copy.deepcopy(model.norms[0]),
        jk=model.jk_mode,
        residual="none",
        **options,
    )
    moe.norms = copy.deepcopy(model.norms)
    for name in ("jk", "lin"):
        if hasattr(model, name):
            setattr(moe, name, copy.deepcopy(getattr(model, name)))
    if not upcycle:
        moe.reset_parameters()
    first = next(model.parameters())
    return moe.to(device=first.device, dtype=first.dtype).train(model.training)
