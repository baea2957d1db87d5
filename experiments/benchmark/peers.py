"""What others do with the same router and the same weights. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import MLPExperts, MoE


class NonzeroLoop(nn.Module):
    """A loop over experts that looks for the tokens of each with nonzero, as in most published code.

    Args:
        layer: whose router and experts it runs.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.experts = layer.experts

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`gmoe.MoE`."""
        assert isinstance(self.experts, MLPExperts)
        up, down = self.experts.up, self.experts.down
        weight_TE = self.router(x).to_dense()
        x_TD = x.reshape(-1, x.size(-1))
        y_TD = None
        for expert in range(self.experts.num_experts):
            token = weight_TE[:, expert].nonzero().squeeze(1)
            h = F.linear(x_TD[token], up.weight[expert].T, None if up.bias is None else up.bias[expert])
            h = self.experts.activation(h)
            h = F.linear(h, down.weight[expert].T, None if down.bias is None else down.bias[expert])
            h = h * weight_TE[token, expert].to(h.dtype)[:, None]
            if y_TD is None:
                y_TD = h.new_zeros(x_TD.size(0), h.size(1))
            y_TD = y_TD.index_add(0, token, h)
        assert y_TD is not None
        return y_TD.view(*x.shape[:-1], -1)
