"""GemNet-OC (Gasteiger et al. 2022, as in JMP), adapters and heads; CGCNN as a second backbone. MoMa section 2.2, B.2.

The backbone contract
---------------------
A backbone is an nn.Module made by `build_backbone(arch)`. Everything else in this project relies on this list only:

    .arch             dict, JSON-able: every constructor argument and the graph settings; build_backbone(arch) repeats
                      it. Adapters read its num_blocks (L - 1) and emb_size_atom (= adapter_width)
    .width            C, channels of the representation
    .adapter_width    channels of the per-block atom features that adapters read
    .num_features     L, how many of them an atom has (blocks + 1)
    atom_features(batch) -> (A, L, adapter_width)        constants while the backbone is frozen
    readout(features, adapters=None) -> (A, C)           adapters sit between the features and the readout
    forward(batch, adapters=None) -> (A, C)              readout(atom_features(batch))
    embed(batch, adapters=None) -> (B, C)                per-crystal representation x_i^j: the mean over atoms
    edge_features(batch) -> ((A, C), (E, C_edge))        only backbones that can be pre-trained on forces

`batch` is what `data.collate` returns: Z (A,), pos (A, 3) in angstrom, cell (B, 3, 3), batch (A,), num_atoms (B,), the
edges of up to four graphs and their per-atom tables. A fork adds one class, its name in BACKBONES and its presets in
PRESETS.

Shapes: B crystals, A atoms, E main edges, Q qint edges, K edges of one atom (padded), R radial and S angular functions.
An edge is s -> t: the image of atom s displaced by n @ cell sends to t. An angle is written c -> a <- b, a dihedral
d -> b -> a <- c.

Left out of GemNet-OC: learnable radial bases, scaled basis functions, dropout inside the blocks, forces coupled by
symmetrisation. Triplets and quadruplets are never listed: every sum over them is a batched matrix product over the
edges that share an atom (see `Bases`). Where that departs from the original: cos(theta) of a dihedral is computed
directly from two normals, without atan2 (see `cos_dihedral`).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import GraphConfig, edge_vectors

# --------------------------------------------------------------------------------------------------------------- leaves


def act(x):
    """Scaled SiLU."""
    return F.silu(x).mul_(1 / 0.6)


def he_orthogonal_(weight, fan_in, axis):
    """Orthogonal, then zero mean and unit variance along the input axes, then 1 / sqrt(fan_in)."""
    with torch.no_grad():
        nn.init.orthogonal_(weight.view(-1, weight.shape[-1]) if weight.dim() == 3 else weight)
        var, mean = torch.var_mean(weight, dim=axis, correction=1, keepdim=True)
        weight.sub_(mean).div_((var + 1e-6).sqrt()).mul_(fan_in**-0.5)


class Dense(nn.Module):
    """Linear without bias, then the activation (unless activation=False)."""

    def __init__(self, n_in, n_out, activation=True):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=False)
        self.activation = activation
        he_orthogonal_(self.linear.weight, n_in, 1)

    def forward(self, x):
        x = self.linear(x)
        return act(x) if self.activation else x


class Residual(nn.Module):
    """(x + Dense(Dense(x))) / sqrt 2."""

    def __init__(self, n):
        super().__init__()
        self.dense_mlp = nn.Sequential(Dense(n, n), Dense(n, n))

    def forward(self, x):
        return (x + self.dense_mlp(x)).mul_(0.5**0.5)


def residuals(number, n):
    return [Residual(n) for _ in range(number)]


class ScaleFactor(nn.Module):
    """Multiplies by a constant that keeps variances near one; 0 means "not applied". `fit_scale_factors` sets it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale_factor", torch.zeros(()))
        self.fitting = False
        self.unset = None  # the buffer's value is read once, not at every step: a read would wait for the GPU

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.unset = None

    def forward(self, x, reference=None):
        if self.fitting:
            var, target = (1.0 if r is None else float((r - r.mean(0)).square().mean()) for r in (x, reference))
            noise = 1e-6 * float(x.square().mean())
            known = var > noise and target > noise  # not with no rows, or one, or equal ones
            self.scale_factor.fill_((target / var) ** 0.5 if known else 1.0)
            self.unset = False
        if self.unset is None:
            self.unset = float(self.scale_factor) == 0.0
        return x if self.unset else x * self.scale_factor


class Recompute(torch.autograd.Function):
    """f(*inputs) without keeping f's inner arrays: the backward pass computes them again. For cheap products of large
    arrays; parameters that f uses must be inputs."""

    @staticmethod
    def forward(ctx, f, *inputs):
        device = inputs[0].device.type
        ctx.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.f = f
        ctx.save_for_backward(*inputs)
        return f(*inputs)

    @staticmethod
    def backward(ctx, grad):
        again = torch.is_grad_enabled()  # a gradient of this gradient is wanted, so the inputs keep their history
        with torch.enable_grad(), ctx.autocast:
            own = [x.view_as(x) if again else x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
            y = ctx.f(*own)
        grads = torch.autograd.grad(y, [x for x in own if x.requires_grad], grad, create_graph=again)
        grads = iter(grads)
        return None, *(next(grads) if x.requires_grad else None for x in own)


def gather(x, table):
    """Rows of x by an index table: (E, C), (A, K) -> (A, K, C). Padding, len(x), reads the last row: what is padded
    meets a zero of the bases' masks."""
    return x.index_select(0, table.reshape(-1).clamp(max=len(x) - 1)).view(*table.shape, *x.shape[1:])


def sum_to(x, index, number):
    """Sum of rows by index, in float32 or better: (E, C) -> (number, C)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.new_zeros(number, *x.shape[1:]).index_add(0, index, x)


# ---------------------------------------------------------------------------------------------------------------- bases


class Gaussians(nn.Module):
    """Radial basis: envelope(x) * exp(-t (x - offset_k)^2) with x = d / cutoff. d: (E,) -> (E, R)."""

    def __init__(self, num_radial, cutoff):
        super().__init__()
        self.cutoff = cutoff
        self.rbf = nn.Module()  # published buffer names: radial_basis.rbf.offset
        self.rbf.register_buffer("offset", torch.linspace(0, 1, num_radial))
        self.rbf.register_buffer("temps", torch.full((num_radial,), 0.5 * (num_radial - 1) ** 2))

    def forward(self, d):
        x = d / self.cutoff
        envelope = torch.where(x < 1, 1 + x**5 * (-21 + x * (35 - 15 * x)), 0)
        return envelope[:, None] * torch.exp(-self.rbf.temps * (x[:, None] - self.rbf.offset) ** 2)


def legendre(z, S, dim):
    """Y_l(z) = sqrt((2l + 1) / 4 pi) P_l(z) for l = 0..S-1, stacked along a new axis `dim`.

    From (l + 1) P_{l+1} = (2l + 1) z P_l - l P_{l-1}, with the factors of the Y_l worked in.
    """
    z = z.clamp(-1, 1)
    norm = [math.sqrt((2 * l + 1) / (4 * math.pi)) for l in range(S + 1)]
    Y = [torch.full_like(z, norm[0]), norm[1] * z]
    for l in range(1, S - 1):
        a, b = (2 * l + 1) / (l + 1) * norm[l + 1] / norm[l], l / (l + 1) * norm[l + 1] / norm[l - 1]
        Y.append((z * Y[l]).mul_(a).sub_(Y[l - 1], alpha=b))
    return torch.stack(Y[:S], dim=dim)


def cos_dihedral(u, w):
    """cos(theta) = u.w / max(|u||w|, eps) of normals u (Q, Kc, 3) and w (Q, Kd, 3) -> (Q, Kc, Kd).

    A normal vanishes where an angle is straight; its direction is then rounding noise, and the gradient 0. In float64
    the value is the published one, whose clamp is 1e-9; in float32 noise is larger and the value is 0.
    """
    exact = u.dtype == torch.float64
    eps = 1e-9 if exact else 1e-5
    length = lambda x: (x.square().sum(-1) + 1e-30).sqrt()  # noqa: E731; 1e-30: a finite gradient at 0
    dot, product = u @ w.transpose(1, 2), length(u)[:, :, None] * length(w)[:, None, :]
    return torch.where(product > eps, dot / product.clamp(min=eps), dot.detach() / eps if exact else 0)


class AngularWeights(nn.Module):
    """Per-edge weights of the angular functions: radial (E, R) -> (E, C, S)."""

    def __init__(self, R, S, C):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(R, S, C))
        he_orthogonal_(self.weight, R * S, (0, 1))

    def forward(self, rbf):
        R, S, C = self.weight.shape
        # Published layout: flat (S, C) is *reshaped*, not transposed, to (C, S). Trained weights depend on it.
        return (rbf @ self.weight.reshape(R, S * C)).view(-1, C, S)


class EdgeEmbedding(nn.Module):
    """act(W [h_s, h_t, f]): (A, n_atom), (E, n_edge) -> (E, n_out)."""

    def __init__(self, n_atom, n_edge, n_out):
        super().__init__()
        self.dense = Dense(2 * n_atom + n_edge, n_out)

    def forward(self, h, f, src, dst):
        n = h.shape[1]
        W = self.dense.linear.weight  # W [h_s, h_t, f] = W_s h_s + W_t h_t + W_f f: the first two once per atom
        by_source, by_target = h @ W[:, :n].T, h @ W[:, n : 2 * n].T
        return act(by_source.index_select(0, src) + by_target.index_select(0, dst) + f @ W[:, 2 * n :].T)


class Bases(nn.Module):
    """Everything that depends on geometry only, shared by all blocks, and its shared down-projections.

    No triplet is listed. The bilinear layer of an output edge i = (c -> a) sums over its triplets, j = (b -> a),

        B vec( sum_j [sum_s W_i[:, s] Y_s(cos angle_ij)] x_j^T )  =  B vec( W_i M_i ),   M_i = sum_j Y(cos angle_ij) x_j^T

    and W_i (C, S), which depends on the length of i, is the same for all j: so M_i (S, n) comes first. With the edges
    into an atom padded to K, the M_i of an atom are one product of (K S, K) with (K, n) matrices; excluded pairs are
    zeros in Y. The quadruplet basis is an outer product, Y_l(cos phi_cab) Y_m(cos theta_cabd), so its sum takes two
    steps: over d, for each qint edge b -> a, and then over b.
    """

    def __init__(self, a):
        super().__init__()
        R, S = a["num_radial"], a["num_spherical"]
        rbf, cbf, sbf = a["emb_size_rbf"], a["emb_size_cbf"], a["emb_size_sbf"]
        self.S = S
        self.radial_basis = Gaussians(R, a["rbf_cutoff"])
        if a["quad_interaction"]:
            self.mlp_rbf_qint = Dense(R, rbf, activation=False)
            self.mlp_cbf_qint = AngularWeights(R, S, cbf)
            self.mlp_sbf_qint = AngularWeights(R, S * S, sbf)
        if a["atom_edge_interaction"]:
            self.mlp_rbf_aeint = Dense(R, rbf, activation=False)
            self.mlp_cbf_aeint = AngularWeights(R, S, cbf)
        if a["edge_atom_interaction"]:
            self.mlp_rbf_eaint = Dense(R, rbf, activation=False)
            self.mlp_cbf_eaint = AngularWeights(R, S, cbf)
        if a["atom_interaction"]:
            self.mlp_rbf_aint = nn.Linear(R, rbf, bias=False)
            he_orthogonal_(self.mlp_rbf_aint.weight, R, 1)
        if a["trip_interaction"]:
            self.mlp_rbf_tint = Dense(R, rbf, activation=False)
            self.mlp_cbf_tint = AngularWeights(R, S, cbf)
        self.mlp_rbf_h = Dense(R, rbf, activation=False)
        self.mlp_rbf_out = Dense(R, rbf, activation=False)
        self.edge_emb = EdgeEmbedding(a["emb_size_atom"], R, a["emb_size_edge"])
        self.a = a

    def forward(self, g):
        """g: batch. Returns a dict: the indices of the batch and one entry for each basis."""
        a, S = self.a, self.S
        dtype = self.radial_basis.rbf.offset.dtype
        d, V = edge_vectors(g, "main", dtype)
        rbf = self.radial_basis(d)
        table = g["main.table"]  # (A, K) edges into each atom
        A, K = table.shape
        V_in = gather(V, table)  # (A, K, 3)
        out = {"num_atoms": A, "rbf": rbf, "V": V, "src": g["main.src"], "dst": g["main.dst"], "swap": g["main.swap"]}
        out |= {"table": table, "slot": g["main.slot"], "kept": 1 - g.get("edge_dropout", 0.0)}
        out |= {"rad_h": self.mlp_rbf_h(rbf), "rad_out": self.mlp_rbf_out(rbf)}

        if a["trip_interaction"]:  # c -> a <- b, both main
            Y = legendre(V_in @ V_in.transpose(1, 2), S, 2).mul_(g["e2e.mask"][:, :, None, :])  # (A, K, S, K)
            out["e2e"] = (self.mlp_rbf_tint(rbf), Y.view(A, K * S, K), self.mlp_cbf_tint(rbf))

        if a["atom_edge_interaction"] or a["edge_atom_interaction"]:
            d2, V2 = edge_vectors(g, "a2ee2a", dtype)
            table2 = g["a2ee2a.table"]  # (A, K2)
            K2 = table2.shape[1]
            rbf2 = self.radial_basis(d2)
            z = V_in @ gather(V2, table2).transpose(1, 2)  # (A, K, K2)
            out |= {"src2": g["a2ee2a.src"], "table2": table2}
        if a["atom_edge_interaction"]:  # output main edge c -> a, input atom b
            Y = legendre(z, S, 2).mul_(g["a2e.mask"][:, :, None, :])  # (A, K, S, K2)
            out["a2e"] = (self.mlp_rbf_aeint(rbf2), Y.view(A, K * S, K2), self.mlp_cbf_aeint(rbf))
        if a["edge_atom_interaction"]:  # output atom a through c -> a, input main edge b -> a
            Y = legendre(z.transpose(1, 2), S, 2).mul_(g["a2e.mask"].transpose(1, 2)[:, :, None, :])  # (A, K2, S, K)
            W = gather(self.mlp_cbf_eaint(rbf2), table2)  # (A, K2, C, S)
            # the sum over c is the same in every block: sum_c W_c Y_c is one (C, K) matrix an atom
            W = W.transpose(1, 2).reshape(A, W.shape[2], K2 * S)
            out["e2a"] = (self.mlp_rbf_eaint(rbf), torch.bmm(W, Y.reshape(A, K2 * S, K)))

        if a["atom_interaction"]:  # images of one pair share the source's feature: their radial values are added first
            d, _ = edge_vectors(g, "a2a", dtype)
            rad = self.mlp_rbf_aint(sum_to(self.radial_basis(d), g["a2a.pair"], len(g["a2a.pair_src"])))
            rad = torch.cat([rad, rad.new_zeros(1, rad.shape[1])])  # for the padding: this product has no mask
            out["a2a"] = (gather(rad, g["a2a.table"]).transpose(1, 2), g["a2a.table_src"])  # (A, C, N), (A, N)

        if a["quad_interaction"]:
            dq, Vq = edge_vectors(g, "qint", dtype)  # (Q, 3) b -> a
            src, dst = g["qint.src"], g["qint.dst"]
            Q = len(src)
            V_ca, V_db = V_in.index_select(0, dst), V_in.index_select(0, src)  # (Q, K, 3) both
            u = torch.linalg.cross(V_ca, Vq[:, None].expand_as(V_ca))
            w = torch.linalg.cross(V_db, Vq[:, None].expand_as(V_db))
            Y_theta = legendre(cos_dihedral(u, w), S, 2).mul_(g["quad.mask"][:, :, None, :])  # (Q, Kc, S, Kd)
            cos_cab = gather((V_ca * Vq[:, None]).sum(-1), g["qint.table"]).transpose(1, 2)  # (A, K, KQ)
            Y_phi = legendre(cos_cab, S, 2).mul_(g["qint.mask"][:, :, None, :])  # (A, Kc, S, KQ)
            rbf_q = self.radial_basis(dq)
            Y_abd = legendre((V_db * Vq[:, None]).sum(-1), S, 2)  # (Q, Kd, S)
            cbf = Y_abd @ self.mlp_cbf_qint(rbf_q).transpose(1, 2)  # (Q, Kd, C)
            out["quad"] = (self.mlp_rbf_qint(rbf), cbf, Y_theta.view(Q, K * S, K), Y_phi, self.mlp_sbf_qint(rbf))
            out |= {"table_d": table.index_select(0, src), "table_q": g["qint.table"]}
        return out


# --------------------------------------------------------------------------------------------------------- interactions


class Bilinear(nn.Module):
    """Per output edge: (C, S) weights times the (S, n_in) sum over inputs, flattened, then linear to n_out."""

    def __init__(self, C, n_in, n_out):
        super().__init__()
        self.bilinear = Dense(C * n_in, n_out, activation=False)

    def forward(self, W, M):
        product = lambda W, M, weight: F.linear(torch.bmm(W, M).flatten(1), weight)  # noqa: E731
        return Recompute.apply(product, W, M, self.bilinear.linear.weight)


class Interaction(nn.Module):
    """The projections that interactions share; `down` reads what a subclass made in its constructor."""

    def down(self, z, rad):
        """Activate, weight by distance, project to the width of the sum: (N, n) before the activation -> (N, n_in)."""

        def product(z, rad, W_rbf, W_down):
            x = act(z)
            return F.linear(self.scale_rbf(x * F.linear(rad, W_rbf), x), W_down)

        weights = self.mlp_rbf.linear.weight, self.down_projection.linear.weight
        return act(Recompute.apply(product, z, rad, *weights))

    def add_up_projections(self, n_in, n_edge):
        self.up_projection_ca = Dense(n_in, n_edge)
        self.up_projection_ac = Dense(n_in, n_edge)

    def up(self, x, swap):
        """Back to edge width, once for c -> a and once for its reverse."""
        return (self.up_projection_ca(x) + self.up_projection_ac(x.index_select(0, swap))).mul_(0.5**0.5)


class TripletInteraction(Interaction):
    """Edge to edge (e2e): main edges b -> a to main edges c -> a."""

    def __init__(self, a):
        super().__init__()
        edge, n_in, n_out = a["emb_size_edge"], a["emb_size_trip_in"], a["emb_size_trip_out"]
        self.dense_ba = Dense(edge, edge)
        self.mlp_rbf = Dense(a["emb_size_rbf"], edge, activation=False)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Bilinear(a["emb_size_cbf"], n_in, n_out)
        self.scale_cbf_sum = ScaleFactor()
        self.down_projection = Dense(edge, n_in)
        self.add_up_projections(n_out, edge)

    def forward(self, m, g):
        rad, Y, W = g["e2e"]
        x = self.down(self.dense_ba.linear(m), rad)  # (E, n_in)
        M = torch.bmm(Y, gather(x, g["table"]))  # (A, K S, n_in)
        M = M.view(-1, W.shape[2], x.shape[1]).index_select(0, g["slot"])  # (E, S, n_in)
        return self.up(self.scale_cbf_sum(self.mlp_cbf(W, M)), g["swap"])


class AtomEdgeInteraction(Interaction):
    """Atom to edge (a2e): atoms b near a to main edges c -> a."""

    def __init__(self, a):
        super().__init__()
        atom, n_in, n_out = a["emb_size_atom"], a["emb_size_trip_in"], a["emb_size_trip_out"]
        self.dense_ba = Dense(atom, atom)
        self.mlp_rbf = Dense(a["emb_size_rbf"], atom, activation=False)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Bilinear(a["emb_size_cbf"], n_in, n_out)
        self.scale_cbf_sum = ScaleFactor()
        self.down_projection = Dense(atom, n_in)
        self.add_up_projections(n_out, a["emb_size_edge"])

    def forward(self, h, g):
        rad, Y, W = g["a2e"]
        x = self.down(self.dense_ba.linear(h).index_select(0, g["src2"]), rad)  # (E2, n_in)
        M = torch.bmm(Y, gather(x, g["table2"]))  # (A, K S, n_in)
        M = M.view(-1, W.shape[2], x.shape[1]).index_select(0, g["slot"])  # (E, S, n_in)
        return self.up(self.scale_cbf_sum(self.mlp_cbf(W, M)), g["swap"])


class EdgeAtomInteraction(Interaction):
    """Edge to atom (e2a): main edges b -> a to the atom a, weighted by its neighbours c -> a."""

    def __init__(self, a):
        super().__init__()
        edge, n_in, n_out = a["emb_size_edge"], a["emb_size_trip_in"], a["emb_size_trip_out"]
        self.dense_ba = Dense(edge, edge)
        self.mlp_rbf = Dense(a["emb_size_rbf"], edge, activation=False)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Bilinear(a["emb_size_cbf"], n_in, n_out)
        self.scale_cbf_sum = ScaleFactor()
        self.down_projection = Dense(edge, n_in)
        self.up_projection_ca = Dense(n_out, a["emb_size_atom"])

    def forward(self, m, g):
        rad, G = g["e2a"]
        x = self.down(self.dense_ba.linear(m), rad)
        x = self.mlp_cbf(G, gather(x, g["table"]))  # (A, C, K) @ (A, K, n_in)
        return self.up_projection_ca(self.scale_cbf_sum(x))


class AtomInteraction(nn.Module):
    """Atom to atom (a2a): every atom of the crystal, its images already summed in the radial values."""

    def __init__(self, a):
        super().__init__()
        atom, n_in, n_out = a["emb_size_atom"], a["emb_size_aint_in"], a["emb_size_aint_out"]
        self.bilinear = Dense(a["emb_size_rbf"] * n_in, n_out, activation=False)
        self.scale_rbf_sum = ScaleFactor()
        self.down_projection = Dense(atom, n_in)
        self.up_projection = Dense(n_out, atom)

    def forward(self, h, g):
        rad, table = g["a2a"]
        x = torch.bmm(rad, gather(self.down_projection(h), table))  # (A, C, N) @ (A, N, n_in)
        return self.up_projection(self.scale_rbf_sum(self.bilinear(x.flatten(1))))


class QuadrupletInteraction(Interaction):
    """Quadruplets d -> b -> a <- c: main edges d -> b to main edges c -> a through qint edges b -> a."""

    def __init__(self, a):
        super().__init__()
        edge, n_in, n_out = a["emb_size_edge"], a["emb_size_quad_in"], a["emb_size_quad_out"]
        self.dense_db = Dense(edge, edge)
        self.mlp_rbf = Dense(a["emb_size_rbf"], edge, activation=False)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Dense(a["emb_size_cbf"], n_in, activation=False)
        self.scale_cbf = ScaleFactor()
        self.mlp_sbf = Bilinear(a["emb_size_sbf"], n_in, n_out)
        self.scale_sbf_sum = ScaleFactor()
        self.down_projection = Dense(edge, n_in)
        self.add_up_projections(n_out, edge)

    def forward(self, m, g):
        rad, cbf, Y_theta, Y_phi, W = g["quad"]
        A, K, S, KQ = Y_phi.shape
        x = self.down(self.dense_db.linear(m), rad)  # (E, n)

        def weighted(x, cbf, W_cbf):
            x = gather(x, g["table_d"])  # (Q, Kd, n) edges d -> b
            return self.scale_cbf(x * F.linear(cbf, W_cbf), x.flatten(0, 1) if self.scale_cbf.fitting else None)

        x = Recompute.apply(weighted, x, cbf, self.mlp_cbf.linear.weight)
        M = torch.bmm(Y_theta, x).view(len(x), K, S * x.shape[2])  # (Q, Kc, S n) sum over d
        M = gather(M, g["table_q"]).transpose(1, 2)  # (A, Kc, KQ, S n)
        M = Y_phi @ M  # (A, Kc, S, S n) sum over b
        M = M.reshape(A * K, S * S, x.shape[2]).index_select(0, g["slot"])  # (E, S^2, n)
        return self.up(self.scale_sbf_sum(self.mlp_sbf(W, M)), g["swap"])


class AtomUpdate(nn.Module):
    """Sum over main edges into an atom of m * W rad, then a stack of residual layers: (E, n_edge) -> (A, n_atom)."""

    def __init__(self, a):
        super().__init__()
        atom, edge = a["emb_size_atom"], a["emb_size_edge"]
        self.dense_rbf = Dense(a["emb_size_rbf"], edge, activation=False)
        self.scale_sum = ScaleFactor()
        first = [Dense(edge, atom)] if edge != atom else []
        self.layers = nn.ModuleList(first + residuals(a["num_atom"], atom))

    def forward(self, m, g, rad, kept=1.0):
        messages = lambda m, rad, W: sum_to(m * F.linear(rad, W), g["dst"], g["num_atoms"])  # noqa: E731
        x = Recompute.apply(messages, m, rad, self.dense_rbf.linear.weight) / kept
        x = self.scale_sum(x, m if self.scale_sum.fitting else None)
        for layer in self.layers:
            x = layer(x)
        return x


class InteractionBlock(nn.Module):
    """One block: all interactions read the same (h, m); returns the new (h, m)."""

    def __init__(self, a):
        super().__init__()
        atom, edge = a["emb_size_atom"], a["emb_size_edge"]
        self.dense_ca = Dense(edge, edge)
        self.trip_interaction = TripletInteraction(a) if a["trip_interaction"] else None
        self.quad_interaction = QuadrupletInteraction(a) if a["quad_interaction"] else None
        self.atom_edge_interaction = AtomEdgeInteraction(a) if a["atom_edge_interaction"] else None
        self.edge_atom_interaction = EdgeAtomInteraction(a) if a["edge_atom_interaction"] else None
        self.atom_interaction = AtomInteraction(a) if a["atom_interaction"] else None
        self.layers_before_skip = nn.Sequential(*residuals(a["num_before_skip"], edge))
        self.layers_after_skip = nn.Sequential(*residuals(a["num_after_skip"], edge))
        self.atom_emb_layers = nn.Sequential(*residuals(a["num_atom_emb_layers"], atom))
        self.atom_update = AtomUpdate(a)
        self.concat_layer = EdgeEmbedding(atom, edge, edge)
        self.residual_m = nn.Sequential(*residuals(a["num_concat"], edge))

    def forward(self, h, m, g):
        def total(x, *interactions):
            """x and what the interactions give, divided by the square root of their number."""
            parts = [x, *(f(y, g) for f, y in interactions if f)]
            return sum(parts[1:], parts[0]) * len(parts) ** -0.5

        on_edges = (self.trip_interaction, m), (self.quad_interaction, m), (self.atom_edge_interaction, h)
        on_atoms = (self.edge_atom_interaction, m), (self.atom_interaction, h)
        x = self.layers_before_skip(total(self.dense_ca(m), *on_edges))
        h = self.atom_emb_layers(total(h, *on_atoms))
        m = self.layers_after_skip((m + x).mul_(0.5**0.5))
        h = (h + self.atom_update(m, g, g["rad_h"])) * 0.5**0.5
        m2 = self.residual_m(self.concat_layer(h, m, g["src"], g["dst"]))
        return h, (m + m2).mul_(0.5**0.5)


class OutputBlock(AtomUpdate):
    """Contribution of one block to the atoms (x_E) and, with forces, to the edges (x_F)."""

    def __init__(self, a):
        super().__init__(a)
        self.seq_energy2 = nn.Sequential(*residuals(a["num_output_afteratom"], a["emb_size_atom"]))
        if a["forces"]:
            self.scale_rbf_F = ScaleFactor()
            self.seq_forces = nn.Sequential(*residuals(a["num_atom"], a["emb_size_edge"]))
            self.dense_rbf_F = Dense(a["emb_size_rbf"], a["emb_size_edge"], activation=False)

    def forward(self, h, m, g, with_edges=False):
        x_E = self.seq_energy2((super().forward(m, g, g["rad_out"], g["kept"]) + h) * 0.5**0.5)
        if not with_edges:
            return x_E, None
        x = self.seq_forces(m)
        return x_E, self.scale_rbf_F(x * self.dense_rbf_F(g["rad_out"]), x)


# ------------------------------------------------------------------------------------------------------------ backbones


class Backbone(nn.Module):
    """What both backbones share; see the contract above."""

    interactions = ()  # what the names of the interaction blocks' parameters start with (finetune.py --freeze)

    def forward(self, batch, adapters=None):
        return self.readout(self.atom_features(batch), adapters)

    def embed(self, batch, adapters=None):
        return pool(self(batch, adapters), batch, "mean")


class GemNetOC(Backbone):
    """GemNet-OC. The parameters' names are those of the published checkpoints without `backbone.`."""

    interactions = ("int_blocks.",)
    checkpointing = False  # keep no array of a block for the backward pass, compute it again: less memory, more time

    def __init__(self, arch):
        super().__init__()
        a = self.arch = arch
        self.width = self.adapter_width = a["emb_size_atom"]
        self.num_features = a["num_blocks"] + 1
        self.embedding = nn.Embedding(a["num_elements"], a["emb_size_atom"])
        self.bases = Bases(a)
        self.int_blocks = nn.ModuleList(InteractionBlock(a) for _ in range(a["num_blocks"]))
        self.out_blocks = nn.ModuleList(OutputBlock(a) for _ in range(a["num_blocks"] + 1))
        self.out_mlp_E = self.out_mlp(self.width, a)
        if a["forces"]:
            self.out_mlp_F = self.out_mlp(a["emb_size_edge"], a)

    def out_mlp(self, n, a):
        mlp = nn.Module()  # published name: out_mlp_E.out_mlp.0.linear.weight
        layers = residuals(a["num_global_out_layers"], n)
        mlp.out_mlp = nn.Sequential(Dense((a["num_blocks"] + 1) * n, n), *layers)
        return mlp

    def states(self, batch, with_edges=False):
        """Yields (h, m, x_E, x_F, bases) before the first and after every interaction block."""
        device = batch["Z"].device.type
        with torch.autocast(device, enabled=False):  # angles need all digits
            g = self.bases(batch)
        if torch.is_autocast_enabled(device):  # lower the bases here once, not in every block
            lower = lambda x: x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x  # noqa: E731
            g |= {key: tuple(map(lower, basis)) for key, basis in g.items() if isinstance(basis, tuple)}
        h = self.embedding(batch["Z"] - 1)
        m = self.bases.edge_emb(h, g["rbf"], g["src"], g["dst"])
        yield h, m, *self.out_blocks[0](h, m, g, with_edges), g
        for block, out_block in zip(self.int_blocks, self.out_blocks[1:]):

            def step(h, m, block=block, out_block=out_block):  # bound now: the backward pass may call it again
                h, m = block(h, m, g)
                return h, m, *out_block(h, m, g, with_edges)

            h, m, x_E, x_F = checkpoint(step, h, m, use_reentrant=False) if self.checkpointing else step(h, m)
            yield h, m, x_E, x_F, g

    def atom_features(self, batch):
        return torch.stack([x_E for _, _, x_E, _, _ in self.states(batch)], dim=1)

    def readout(self, features, adapters=None):
        if adapters is not None:
            features = adapters(features)
        return self.out_mlp_E.out_mlp(features.flatten(1))

    def edge_features(self, batch):
        """Final atom and edge features for energy and force heads: x_E (A, C), x_F (E, C_edge), V (E, 3)."""
        *_, x_E, x_F, g = zip(*self.states(batch, with_edges=True))
        x_E = self.readout(torch.stack(x_E, dim=1))
        return x_E, self.out_mlp_F.out_mlp(torch.cat(x_F, dim=1)), g[0]["V"]

    def shared_gradient_divisors(self):
        """{parameter name: how many blocks share it}; JMP divides these gradients by it before clipping."""
        blocks = self.arch["num_blocks"]
        names = [n for n, _ in self.bases.named_parameters() if not n.startswith("edge_emb")]
        return {f"bases.{n}": blocks + n.startswith("mlp_rbf_out") for n in names}


class CGCNN(Backbone):
    """Crystal graph convolutional network (Xie and Grossman 2018) behind the same contract: a fork's worked example.

    h_i <- softplus(h_i + sum_j sigmoid(z_ij W_f + b_f) * softplus(z_ij W_s + b_s)), z_ij = [h_i, h_j, gaussians(d_ij)],
    with batch norm after each linear map and each sum. Departures: a learned embedding of the element instead of the
    92 tabulated features, and the head of this project, which reads atoms before pooling.
    """

    interactions = ("fc_full.", "bn1.", "bn2.")

    def __init__(self, arch):
        super().__init__()
        a = self.arch = arch
        C = self.width = self.adapter_width = a["emb_size_atom"]
        self.num_features = a["num_blocks"] + 1
        self.embedding = nn.Embedding(a["num_elements"], C)
        self.radial_basis = Gaussians(a["num_radial"], a["rbf_cutoff"])
        self.fc_full = nn.ModuleList(nn.Linear(2 * C + a["num_radial"], 2 * C) for _ in range(a["num_blocks"]))
        self.bn1 = nn.ModuleList(nn.BatchNorm1d(2 * C) for _ in range(a["num_blocks"]))
        self.bn2 = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(a["num_blocks"]))
        self.conv_to_fc = nn.Linear(C, C)

    def atom_features(self, batch):
        src, dst = batch["main.src"], batch["main.dst"]
        d, _ = edge_vectors(batch, "main", self.radial_basis.rbf.offset.dtype)
        rbf = self.radial_basis(d)
        h = self.embedding(batch["Z"] - 1)
        features = [h]
        for fc, bn1, bn2 in zip(self.fc_full, self.bn1, self.bn2):
            z = torch.cat([h.index_select(0, dst), h.index_select(0, src), rbf], dim=1)  # (E, 2 C + R)
            gate, core = bn1(fc(z)).chunk(2, dim=1) if len(z) > 1 or not self.training else fc(z).chunk(2, dim=1)
            messages = sum_to(torch.sigmoid(gate) * F.softplus(core), dst, len(h))
            h = F.softplus(h + (bn2(messages) if len(h) > 1 or not self.training else messages))
            features.append(h)
        return torch.stack(features, dim=1)

    def readout(self, features, adapters=None):
        x = features[:, -1]
        if adapters is not None:  # the readout reads the last block; adapters of the others add what they change
            x = x + (adapters(features) - features).sum(1)
        return F.softplus(self.conv_to_fc(x))


BACKBONES = {"gemnet_oc": GemNetOC, "cgcnn": CGCNN}

# --------------------------------------------------------------------------------------- adapters, heads and pooling


class Adapters(nn.Module):
    """One bottleneck for each per-block atom output: x + up(dropout(relu(down(layer_norm(x))))). (A, L, C) -> same."""

    def __init__(self, arch, dropout=0.1):
        super().__init__()
        C, L = arch["emb_size_atom"], arch["num_blocks"] + 1
        self.norm = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.down = nn.ModuleList(nn.Linear(C, C // 2) for _ in range(L))
        self.up = nn.ModuleList(nn.Linear(C // 2, C) for _ in range(L))
        self.dropout = nn.Dropout(dropout)
        for linear in [*self.down, *self.up]:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, features):
        out = []
        for x, norm, down, up in zip(features.unbind(1), self.norm, self.down, self.up, strict=True):
            out.append(x + up(self.dropout(F.relu(down(norm(x))))))
        return torch.stack(out, dim=1)


def new_adapters(arch, seed=0):
    """Initial adapters; the same values for every module of a hub."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adapters(arch)


def mlp(n, n_out=1):
    """JMP's head: five linear layers, activation between them, the last without bias."""
    layers = []
    for _ in range(4):
        layers += [nn.Linear(n, n), ScaledSiLU()]
    return nn.Sequential(*layers, nn.Linear(n, n_out, bias=False))


class ScaledSiLU(nn.Module):
    def forward(self, x):
        return act(x)


def pool(x, batch, how):
    """Over the atoms of each crystal: (A, C) -> (B, C). how: mean, sum or max."""
    index, B = batch["batch"], len(batch["num_atoms"])
    if how == "max":
        lowest = x.new_full((B, *x.shape[1:]), -math.inf)
        return lowest.scatter_reduce(0, index.view(-1, *[1] * (x.dim() - 1)).expand_as(x), x, "amax")
    total = sum_to(x, index, B)
    if how == "sum":
        return total
    if how == "mean":
        return total / batch["num_atoms"].to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    raise ValueError(f"pooling {how!r}: use mean, sum or max")


class PropertyModel(nn.Module):
    """Backbone (with or without adapters) and a property head. model(batch) -> (B,) normalised predictions.

    With stored atom features in the batch ("features", (A, L, C)) the backbone's blocks are not run: adapters train on
    features that were encoded once.
    """

    def __init__(self, backbone, pooling, adapters=None):
        super().__init__()
        self.backbone, self.pooling, self.adapters = backbone, pooling, adapters
        self.head = mlp(backbone.width)

    def forward(self, batch):
        features = batch["features"] if "features" in batch else self.backbone.atom_features(batch)
        y = self.head(self.backbone.readout(features, self.adapters)).squeeze(-1)  # (A,)
        return pool(y, batch, self.pooling)


class PretrainModel(nn.Module):
    """JMP's pre-training model: an energy head and, where a set has forces, a force head for each data set.

    model(batch, task) -> energy (B,), the sum over atoms, and forces (A, 3) or None; both normalised. Direct forces:
    the force on atom t is the sum over main edges into t of scalar_e * V_e.
    """

    def __init__(self, backbone, tasks):
        super().__init__()
        self.backbone = backbone
        self.out_energy = nn.ModuleDict({name: mlp(backbone.width) for name in tasks})
        with_forces = [name for name, has_forces in tasks.items() if has_forces]
        self.out_forces = nn.ModuleDict({name: mlp(backbone.arch["emb_size_edge"]) for name in with_forces})

    def forward(self, batch, task):
        if task not in self.out_forces:
            return pool(self.out_energy[task](self.backbone(batch)), batch, "sum").squeeze(-1), None
        x_E, x_F, V = self.backbone.edge_features(batch)
        energy = pool(self.out_energy[task](x_E), batch, "sum").squeeze(-1)
        return energy, sum_to(self.out_forces[task](x_F) * V, batch["main.dst"], len(x_E))


# -------------------------------------------------------------------------------------------------------------- presets

GEMNET = dict(
    num_elements=120, num_radial=128, num_spherical=7, num_blocks=4, emb_size_atom=256, emb_size_edge=512,
    emb_size_trip_in=64, emb_size_trip_out=64, emb_size_quad_in=32, emb_size_quad_out=32, emb_size_aint_in=64,
    emb_size_aint_out=64, emb_size_rbf=16, emb_size_cbf=16, emb_size_sbf=32, num_before_skip=2, num_after_skip=2,
    num_concat=1, num_atom=3, num_output_afteratom=3, num_atom_emb_layers=2, num_global_out_layers=2, rbf_cutoff=12.0,
    trip_interaction=True, quad_interaction=True, atom_edge_interaction=True, edge_atom_interaction=True,
    atom_interaction=True, forces=False,
)  # fmt: skip
JMP_L = dict(num_blocks=6, emb_size_edge=1024, emb_size_trip_out=128, emb_size_quad_in=64, emb_size_rbf=32,
             emb_size_sbf=64, num_concat=4)  # fmt: skip
SMALL = dict(
    num_radial=32, num_spherical=5, num_blocks=2, emb_size_atom=128, emb_size_edge=64, emb_size_trip_in=16,
    emb_size_trip_out=16, emb_size_quad_in=8, emb_size_quad_out=8, emb_size_aint_in=32, emb_size_aint_out=32,
    emb_size_rbf=16, emb_size_cbf=8, emb_size_sbf=8, num_before_skip=1, num_after_skip=1, num_concat=1, num_atom=1,
    num_output_afteratom=1, num_atom_emb_layers=1, num_global_out_layers=1, rbf_cutoff=6.0, quad_interaction=False,
)  # fmt: skip
TINY = SMALL | dict(num_radial=16, num_spherical=4, num_blocks=1, emb_size_atom=32, emb_size_edge=24,
                    emb_size_aint_in=16, emb_size_aint_out=16, emb_size_rbf=8)  # fmt: skip
GEMNET_PRESETS = {  # constructor arguments, graph settings
    "tiny": (GEMNET | TINY, dict(cutoff=6.0, max_neighbors=8, max_neighbors_a2ee2a=8, max_neighbors_qint=4)),
    "small": (GEMNET | SMALL, dict(cutoff=6.0, max_neighbors=12, max_neighbors_a2ee2a=12, max_neighbors_qint=6)),
    "base": (GEMNET, {}),  # JMP-S
    "large": (GEMNET | JMP_L, {}),  # JMP-L
}
CGCNN_FULL = dict(num_elements=120, num_radial=41, num_blocks=3, emb_size_atom=64, rbf_cutoff=8.0)
CGCNN_GRAPH = dict(cutoff=8.0, max_neighbors=12)
CGCNN_PRESETS = {name: (CGCNN_FULL, CGCNN_GRAPH) for name in ("small", "base", "large")}
CGCNN_PRESETS["tiny"] = (CGCNN_FULL | dict(emb_size_atom=32, num_blocks=2), CGCNN_GRAPH)
PRESETS = {"gemnet_oc": GEMNET_PRESETS, "cgcnn": CGCNN_PRESETS}


def preset(name, backbone="gemnet_oc", **overrides):
    """Architecture and graph settings by name, a JSON-able dict. Overrides: constructor arguments, or graph={...}."""
    if backbone not in BACKBONES:
        raise ValueError(f"--backbone {backbone}: use one of {', '.join(BACKBONES)}")
    if name not in PRESETS[backbone]:
        raise ValueError(f"--preset {name}: use one of {', '.join(PRESETS[backbone])}")
    arch, graph = PRESETS[backbone][name]
    graph_overrides = overrides.pop("graph", {})
    unknown = set(overrides) - set(arch)
    if unknown:
        raise ValueError(f"{backbone} has no setting {', '.join(sorted(unknown))}; it has {', '.join(arch)}")
    arch = arch | overrides
    cutoff = graph.get("cutoff", 12.0)
    graph = dict(graph)
    for key in ("cutoff_a2ee2a", "cutoff_qint", "cutoff_a2a"):
        graph.setdefault(key, cutoff)
    graph["a2ee2a"] = bool(arch.get("atom_edge_interaction") or arch.get("edge_atom_interaction"))
    graph["qint"] = bool(arch.get("quad_interaction"))
    graph["a2a"] = bool(arch.get("atom_interaction"))
    graph = vars(GraphConfig(**(graph | graph_overrides)))
    return {"backbone": backbone, "preset": name, **arch, "graph": dict(graph)}


def build_backbone(arch):
    """The backbone that `arch` describes, with fresh weights (torch's global seed)."""
    return BACKBONES[arch["backbone"]](arch)


@torch.no_grad()
def fit_scale_factors(backbone, batch):
    """Set every scale factor of a fresh GemNet-OC from one batch, in the order the layers run.

    Each becomes sqrt(var(reference) / var(x)), or 1 / sqrt(var(x)) without a reference; variances are kept.
    """
    factors = [module for module in backbone.modules() if isinstance(module, ScaleFactor)]
    for factor in factors:
        factor.fitting = True
    training = backbone.training
    backbone.eval()
    if backbone.arch.get("forces"):
        backbone.edge_features(batch)
    else:
        backbone(batch)
    backbone.train(training)
    for factor in factors:
        factor.fitting = False
