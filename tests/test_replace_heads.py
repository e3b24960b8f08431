"""An attention block is split only where its heads, run apart on a probe, add up to the whole."""
import pytest
import torch

import interlace
from interlace.parallel.mesh import Mesh


class Mixing(torch.nn.Module):
    """Children and sizes of an attention block; its heads see each other, or their number is written down."""

    def __init__(self, how):
        super().__init__()
        self.how, self.head_dim = how, 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden_states, attention_mask=None):
        q, k, v = (c(hidden_states).unflatten(-1, (4 if self.how == "fixed" else -1, 4)).transpose(1, 2)
                   for c in (self.q_proj, self.k_proj, self.v_proj))
        score = (q @ k.transpose(-1, -2)).softmax(-1)
        if self.how == "mixed":
            score = score.softmax(1)
        return self.o_proj((score @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["", "mixed", "fixed"])
def test_heads_that_do_not_add_up_stay_whole(how):
    report = interlace.replace_(torch.nn.Sequential(Mixing(how)), Mesh(tp=interlace.Axis("tp", 2)), dry_run=True)
    assert ("do not add up to the whole: whole on every rank" in str(report)) == bool(how), report
    assert any(r.sharding == "heads" for r in report.replaced) == (not how)
