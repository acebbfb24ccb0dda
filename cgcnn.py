"""CGCNN (Xie and Grossman 2018): a second backbone, and an example for those who add another.

    h_t <- softplus(h_t + sum_s sigmoid(z_st W_f + b_f) * softplus(z_st W_s + b_s))
    z_st = [h_t, h_s, gaussians(d_st)]

with batch norm after each linear map and each sum. Departures: a learned embedding of the element instead of
the 92 tabulated features, and the head of this project, which reads atoms before pooling. What a backbone
owes the stages is the list at the top of model.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from data import GraphConfig, edge_vectors
from model import BACKBONES, FOR_SMALL, FOR_TINY, PAPER, PRESETS, Backbone, Gaussians, Preset, sum_edges


class CGCNN(Backbone):
    """The features of an atom are the element's embedding and h after each block."""

    interactions = ("fc_full.", "bn1.", "bn2.")
    ranges = {"num_elements": (118, 1000)}

    def __init__(self, arch):
        super().__init__(arch)
        C, R, blocks = arch["emb_size_atom"], arch["num_radial"], arch["num_blocks"]
        self.width = self.adapter_width = C
        self.num_features = blocks + 1
        self.embedding = nn.Embedding(arch["num_elements"], C)
        self.radial_basis = Gaussians(R, arch["rbf_cutoff"])
        self.fc_full = nn.ModuleList(nn.Linear(2 * C + R, 2 * C) for _ in range(blocks))
        self.bn1 = nn.ModuleList(nn.BatchNorm1d(2 * C) for _ in range(blocks))
        self.bn2 = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(blocks))
        self.conv_to_fc = nn.Linear(C, C)

    def atom_features(self, batch):
        src, dst = batch["main.src"], batch["main.dst"]
        d, _ = edge_vectors(batch, "main", self.radial_basis.rbf.offset.dtype)
        rbf = self.radial_basis(d)
        h = self.embedding(batch["Z"] - 1)
        features = [h]
        for fc, bn1, bn2 in zip(self.fc_full, self.bn1, self.bn2):
            z = torch.cat([h.index_select(0, dst), h.index_select(0, src), rbf], dim=1)  # (E, 2 C + R)
            gate, core = self.normalised(bn1, fc(z)).chunk(2, dim=1)
            messages = sum_edges(torch.sigmoid(gate) * F.softplus(core), batch)  # (A, C)
            h = F.softplus(h + self.normalised(bn2, messages))
            features.append(h)
        return torch.stack(features, dim=1)

    def normalised(self, batch_norm, x):
        """Batch norm, but of one row, which has no variance, in evaluation only."""
        return batch_norm(x) if len(x) > 1 or not self.training else x

    def readout(self, features, adapters=None):
        x = features[:, -1]
        if adapters is not None:  # the readout reads the last block; the other adapters add what they change
            x = x + (adapters(features) - features).sum(1)
        return F.softplus(self.conv_to_fc(x))


FULL = dict(num_elements=120, num_radial=41, num_blocks=3, emb_size_atom=64, rbf_cutoff=8.0)
GRAPH = GraphConfig(cutoff=8.0, cutoff_a2ee2a=8.0, cutoff_qint=8.0, cutoff_a2a=8.0, max_neighbors=12,
                    a2ee2a=False, qint=False, a2a=False)  # fmt: skip

BACKBONES["cgcnn"] = CGCNN
PRESETS["cgcnn"] = {
    "tiny": Preset(FULL | dict(emb_size_atom=32, num_blocks=2), GRAPH, FOR_TINY),
    "small": Preset(FULL, GRAPH, FOR_SMALL),
    "base": Preset(FULL, GRAPH, PAPER),
    "large": Preset(FULL, GRAPH, PAPER),
}
