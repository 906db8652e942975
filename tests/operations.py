"""Differentiable operations of torch that take a tensor and a parameter, as data.

Each is ``f(x, p) -> (n, ...)`` for examples x ``(n, 4)`` and one parameter ``p``, with the parameter's shape. The
values in x are distinct, where the operations are smooth; the last example is far from the others.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor, Tensor], Tensor]


def square(x: Tensor) -> Tensor:
    """Matrices (n, 2, 2) of good condition, from x."""
    return x.reshape(-1, 2, 2).tanh() + 2 * torch.eye(2, dtype=x.dtype)


def definite(x: Tensor, p: Tensor) -> Tensor:
    """Symmetric positive definite matrices (n, 2, 2), from x."""
    A = square(x) + p
    return A @ A.mT + torch.eye(2, dtype=x.dtype)


def ids(x: Tensor, count: int) -> Tensor:
    """Row numbers (n, 4), from the values of x."""
    return (x.detach().abs() * 7).long() % count


def unit(x: Tensor) -> Tensor:
    """Values between 0 and 1, from x."""
    return x.sigmoid()


# name -> (shape of the parameter, the operation)
OPERATIONS: dict[str, tuple[tuple[int, ...], Operation]] = {
    # products
    "matmul": ((4, 3), lambda x, p: x @ p),
    "matmul, left": ((3, 4), lambda x, p: (p @ x.T).T),
    "mm": ((4, 3), torch.mm),
    "mv": ((4,), lambda x, p: torch.mv(x, p)[:, None]),
    "linear": ((3, 4), F.linear),
    "linear, rows": ((3, 2), lambda x, p: F.linear(x.view(-1, 2, 2), p)),
    "addmm": ((4, 3), lambda x, p: torch.addmm(x[:, :3], x, p, beta=0.5, alpha=2.0)),
    "addmv": ((4,), lambda x, p: torch.addmv(x[:, 0], x, p)[:, None]),
    "addr": ((4,), lambda x, p: torch.addr(x, x[:, 0].detach() * 0 + 1, p)),
    "bmm": ((2, 2), lambda x, p: torch.bmm(x.view(-1, 2, 2), p.expand(len(x), 2, 2))),
    "baddbmm": ((2, 2), lambda x, p: torch.baddbmm(x.view(-1, 2, 2), x.view(-1, 2, 2), p.expand(len(x), 2, 2))),
    "chain_matmul": ((4, 4), lambda x, p: torch.linalg.multi_dot([x, p, p])),
    "einsum": ((4, 3), lambda x, p: torch.einsum("ni,ij->nj", x, p)),
    "einsum, three": (
        (2, 2, 3),
        lambda x, p: torch.einsum("nab,abc,nac->nc", x.view(-1, 2, 2), p, x[:, :1, None].expand(-1, 2, 3)),
    ),
    "einsum, diagonal": ((2, 2), lambda x, p: torch.einsum("nab,bb->na", x.view(-1, 2, 2), p)),
    "tensordot": ((2, 2, 3), lambda x, p: torch.tensordot(x.view(-1, 2, 2), p, dims=2)),
    "bilinear": ((3, 2, 2), lambda x, p: F.bilinear(x[:, :2], x[:, 2:], p)),
    "inner": ((3, 4), torch.inner),
    "outer": ((3,), lambda x, p: torch.stack([torch.outer(row, p) for row in x])),
    "kron": ((2, 2), lambda x, p: torch.stack([torch.kron(row.view(2, 2), p) for row in x])),
    "vecdot": ((4,), lambda x, p: torch.linalg.vecdot(x, p)[:, None]),
    "cross": ((3,), lambda x, p: torch.linalg.cross(x[:, :3], p.expand(len(x), 3))),
    # element by element
    "add": ((4,), torch.add),
    "sub": ((4,), lambda x, p: torch.sub(x, p, alpha=2)),
    "rsub": ((4,), lambda x, p: torch.rsub(p, x)),
    "mul": ((4,), torch.mul),
    "div": ((4,), torch.div),
    "div by data": ((4,), lambda x, p: p / (x.abs() + 1)),
    "pow": ((4,), lambda x, p: torch.pow(x.abs() + 0.5, p)),
    "power of it": ((4,), lambda x, p: torch.pow(p.abs() + 0.5, x)),
    "float_power": ((4,), lambda x, p: torch.float_power(x.abs() + 0.5, p)),
    "atan2": ((4,), torch.atan2),
    "hypot": ((4,), torch.hypot),
    "fmod": ((4,), lambda x, p: torch.fmod(x, p.abs() + 0.3)),
    "remainder": ((4,), lambda x, p: torch.remainder(x, p.abs() + 0.3)),
    "maximum": ((4,), torch.maximum),
    "minimum": ((4,), torch.minimum),
    "fmax": ((4,), torch.fmax),
    "fmin": ((4,), torch.fmin),
    "where": ((4,), lambda x, p: torch.where(x > 0, p, x * p)),
    "lerp": ((4,), lambda x, p: torch.lerp(x, p, 0.3)),
    "lerp, weight": ((4,), lambda x, p: torch.lerp(x, x.flip(1), p)),
    "addcmul": ((4,), lambda x, p: torch.addcmul(x, x, p, value=0.7)),
    "addcdiv": ((4,), lambda x, p: torch.addcdiv(x, x, p.abs() + 1)),
    "clamp": ((4,), lambda x, p: torch.clamp(x, max=p)),
    "copysign": ((4,), lambda x, p: torch.copysign(p, x)),
    "ldexp": ((4,), lambda x, p: torch.ldexp(x, p)),
    "logaddexp": ((4,), torch.logaddexp),
    "logaddexp2": ((4,), torch.logaddexp2),
    "xlogy": ((4,), lambda x, p: torch.special.xlogy(x, p.abs() + 0.5)),
    "xlog1py": ((4,), lambda x, p: torch.special.xlog1py(x, p.abs())),
    "heaviside": ((4,), lambda x, p: torch.heaviside(x, p.detach()) * p),
    "threshold": ((4,), lambda x, p: F.threshold(x * p, 0.1, 0.2)),
    "square in place": ((4,), lambda x, p: (x * p).mul_(p).add_(x)),
    "rows in place": ((2,), lambda x, p: _with_rows(x, p)),
    "exp": ((4,), lambda x, p: torch.exp(x.tanh() * p)),
    "special.erf": ((4,), lambda x, p: torch.special.erf(x * p)),
    "special.log_ndtr": ((4,), lambda x, p: torch.special.log_ndtr(x * p)),
    "special.gammaln": ((4,), lambda x, p: torch.special.gammaln(1 + (x * p).abs())),
    "special.digamma": ((4,), lambda x, p: torch.special.digamma(1 + (x * p).abs())),
    "special.bessel_j0": ((4,), lambda x, p: torch.special.i0(x.tanh() * p)),
    "special.i1e": ((4,), lambda x, p: torch.special.i1e(x.tanh() * p)),
    "special.entr": ((4,), lambda x, p: torch.special.entr(unit(x * p))),
    "special.logit": ((4,), lambda x, p: torch.special.logit(0.1 + 0.8 * unit(x * p))),
    "special.sinc": ((4,), lambda x, p: torch.special.sinc(x * p)),
    "special.zeta": ((4,), lambda x, p: torch.special.polygamma(1, 1 + (x * p).abs())),
    # activations
    "prelu": ((1,), F.prelu),
    "glu": ((4,), lambda x, p: F.glu(x * p)),
    "softmax": ((4,), lambda x, p: F.softmax(x * p, dim=1)),
    "log_softmax": ((4,), lambda x, p: F.log_softmax(x + p, dim=-1)),
    "logsumexp": ((4,), lambda x, p: torch.logsumexp(x * p, dim=1, keepdim=True)),
    "gelu": ((4,), lambda x, p: F.gelu(x * p)),
    "silu": ((4,), lambda x, p: F.silu(x + p)),
    "hardswish": ((4,), lambda x, p: F.hardswish(x * p)),
    "rrelu": ((4,), lambda x, p: F.rrelu(x * p, training=False)),
    "rows of x": ((4,), lambda x, p: torch.stack([row * p for row in x])),
    "softplus": ((4,), lambda x, p: F.softplus(x * p, beta=2)),
    "normalize": ((4,), lambda x, p: F.normalize(x + p, dim=1)),
    # norms of layers
    "layer_norm": ((4,), lambda x, p: F.layer_norm(x, (4,), p)),
    "layer_norm, bias": ((4,), lambda x, p: F.layer_norm(x, (4,), None, p)),
    "rms_norm": ((4,), lambda x, p: F.rms_norm(x, (4,), p)),
    "group_norm": ((4,), lambda x, p: F.group_norm(x, 2, p)),
    "instance_norm": ((2,), lambda x, p: F.instance_norm(x.view(-1, 2, 2), weight=p)),
    "batch_norm": ((4,), lambda x, p: F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x), p)),
    "batch_norm, mean": ((4,), lambda x, p: F.batch_norm(x, p, torch.ones(4).to(x))),
    "local_response_norm": ((4,), lambda x, p: F.local_response_norm((x * p)[:, :, None], 2)),
    "weight_norm": ((3, 4), lambda x, p: F.linear(x, torch._weight_norm(p, p.norm(dim=1, keepdim=True) ** 2, 0))),
    # convolutions, pooling, images
    "conv1d": ((3, 1, 2), lambda x, p: F.conv1d(x[:, None], p)),
    "conv1d, groups": ((4, 1, 1), lambda x, p: F.conv1d(x[:, :, None], p, groups=4)),
    "conv2d": ((3, 1, 2, 2), lambda x, p: F.conv2d(x.view(-1, 1, 2, 2), p, padding=1)),
    "conv3d": ((2, 1, 1, 2, 2), lambda x, p: F.conv3d(x.view(-1, 1, 1, 2, 2), p)),
    "conv_transpose1d": ((1, 2, 3), lambda x, p: F.conv_transpose1d(x[:, None], p, stride=2)),
    "conv_transpose2d": ((1, 2, 2, 2), lambda x, p: F.conv_transpose2d(x.view(-1, 1, 2, 2), p)),
    "conv_tbc": (
        (2, 2, 3),
        lambda x, p: torch.conv_tbc(x.view(-1, 2, 2).transpose(0, 1), p, torch.zeros(3).to(x)).transpose(0, 1),
    ),
    "conv of it": ((1, 4), lambda x, p: torch.stack([F.conv1d(p[None], row[None, None, :2])[0] for row in x])),
    "unfold": ((1, 2, 2), lambda x, p: F.unfold(x.view(-1, 1, 2, 2) * p, 2)),
    "fold": ((4, 1), lambda x, p: F.fold(x[:, :, None] * p, (2, 2), 2)),
    "max_pool1d": ((4,), lambda x, p: F.max_pool1d((x * p)[:, None], 2)),
    "avg_pool1d": ((4,), lambda x, p: F.avg_pool1d((x * p)[:, None], 2)),
    "adaptive_avg_pool2d": ((2, 2), lambda x, p: F.adaptive_avg_pool2d(x.view(-1, 1, 2, 2) * p, 1)),
    "adaptive_max_pool1d": ((4,), lambda x, p: F.adaptive_max_pool1d((x * p)[:, None], 2)),
    "lp_pool1d": ((4,), lambda x, p: F.lp_pool1d((x * p).abs()[:, None], 3.0, 2)),
    "interpolate": ((2, 2), lambda x, p: F.interpolate(x.view(-1, 1, 2, 2) * p, scale_factor=2, mode="bilinear")),
    "grid_sample": (
        (1, 3, 3),
        lambda x, p: F.grid_sample(p.expand(len(x), 1, 3, 3), x.view(-1, 1, 2, 2).tanh(), align_corners=True),
    ),
    "grid_sample, places": (
        (1, 2, 2),
        lambda x, p: F.grid_sample(x.view(-1, 1, 2, 2), p.expand(len(x), 1, 2, 2).tanh() * 0.7, align_corners=True),
    ),
    "affine_grid": (
        (2, 3),
        lambda x, p: F.affine_grid(p.expand(len(x), 2, 3) * x[:, :1, None], [len(x), 1, 2, 2], align_corners=True),
    ),
    "pixel_shuffle": ((4,), lambda x, p: F.pixel_shuffle((x * p)[:, :, None, None], 2)),
    "pad": ((4,), lambda x, p: F.pad((x * p)[:, None], (1, 2), mode="reflect")),
    # indexing and reordering
    "embedding": ((5, 3), lambda x, p: F.embedding(ids(x, 5), p)),
    "embedding, padding": ((5, 3), lambda x, p: F.embedding(ids(x, 5), p, padding_idx=1)),
    "embedding, scaled": ((5, 3), lambda x, p: F.embedding(ids(x, 5), p, scale_grad_by_freq=True)),
    "embedding_bag": ((5, 3), lambda x, p: F.embedding_bag(ids(x, 5), p, mode="mean")),
    "embedding_bag, max": ((5, 3), lambda x, p: F.embedding_bag(ids(x, 5), p, mode="max")),
    "embedding_bag, weighted": ((5, 3), lambda x, p: F.embedding_bag(ids(x, 5), p, mode="sum", per_sample_weights=x)),
    "index": ((5, 3), lambda x, p: p[ids(x, 5)]),
    "index_select": ((5,), lambda x, p: p.index_select(0, ids(x, 5).flatten()).view(-1, 4) * x),
    "gather": ((5,), lambda x, p: p.expand(len(x), 5).gather(1, ids(x, 5))),
    "gather data": ((4,), lambda x, p: (x * p).gather(1, ids(x, 4))),
    "take": ((5,), lambda x, p: torch.take(p, ids(x, 5))),
    "take_along_dim": ((4,), lambda x, p: torch.take_along_dim(x * p, ids(x, 4), dim=1)),
    "scatter": ((4,), lambda x, p: torch.scatter(x, 1, torch.tensor([[3, 0, 2, 1]]).expand(len(x), 4), x * p)),
    "scatter_add": ((4,), lambda x, p: torch.scatter_add(x, 1, ids(x, 4), x * p)),
    "scatter_reduce": ((4,), lambda x, p: torch.scatter_reduce(x, 1, ids(x, 4), x * p, "prod")),
    "index_add": ((2,), lambda x, p: torch.index_add(x, 1, torch.tensor([0, 0]), p.expand(len(x), 2) * x[:, 1:3])),
    "index_copy": ((2,), lambda x, p: torch.index_copy(x, 1, torch.tensor([2, 0]), p.expand(len(x), 2) * x[:, 1:3])),
    "index_fill": ((4,), lambda x, p: (x * p).index_fill(1, torch.tensor([2]), 0.3)),
    "masked_fill": ((), lambda x, p: x.masked_fill(x > 0, p)),
    "masked_scatter": ((4,), lambda x, p: x.masked_scatter(torch.tensor([True, False, True, False]), x * p)),
    "select_scatter": ((), lambda x, p: torch.select_scatter(x, p.expand(len(x)) * x[:, 0], 1, 2)),
    "slice_scatter": ((2,), lambda x, p: torch.slice_scatter(x, x[:, :2] * p, 1, 1, 3)),
    "diagonal_scatter": ((2,), lambda x, p: torch.diagonal_scatter(x.view(-1, 2, 2), x[:, :2] * p, dim1=1, dim2=2)),
    "index_put": (
        (4,),
        lambda x, p: (x * 1).index_put((torch.arange(len(x))[:, None], ids(x, 4)), x * p, accumulate=True),
    ),
    "sort": ((4,), lambda x, p: torch.sort(x * p, dim=1).values),
    "topk": ((4,), lambda x, p: torch.topk(x * p, 2).values),
    "kthvalue": ((4,), lambda x, p: torch.kthvalue(x * p, 2).values[:, None]),
    "median": ((4,), lambda x, p: torch.median(x + p, dim=1).values[:, None]),
    "quantile": ((4,), lambda x, p: torch.quantile(x * p, 0.4, dim=1, keepdim=True)),
    "mode": ((4,), lambda x, p: torch.mode(x * p, dim=1).values[:, None]),
    "amax": ((4,), lambda x, p: torch.amax(x * p, dim=1, keepdim=True)),
    "max": ((4,), lambda x, p: torch.max(x * p, dim=1, keepdim=True).values),
    "aminmax": ((4,), lambda x, p: torch.cat(torch.aminmax(x * p, dim=1, keepdim=True), dim=1)),
    "roll": ((4,), lambda x, p: torch.roll(x * p, 1, dims=1) * p),
    "flip": ((4,), lambda x, p: torch.flip(p, (0,)) * x),
    "repeat_interleave": ((2,), lambda x, p: p.repeat_interleave(2) * x),
    "tril": ((2, 2), lambda x, p: torch.tril(x.view(-1, 2, 2) @ p)),
    "block_diag": ((2, 2), lambda x, p: x @ torch.block_diag(p, p)),
    "diag_embed": ((4,), lambda x, p: torch.diag_embed(x * p)),
    "unbind": ((2, 4), lambda x, p: sum(part * x for part in p.unbind())),
    "split": ((4,), lambda x, p: torch.cat([a * b for a, b in zip(x.split(2, 1), p.split(2), strict=True)], 1)),
    "cat": ((1, 2), lambda x, p: torch.cat([x, p.expand(len(x), 2)], dim=1)),
    "stack": ((4,), lambda x, p: torch.stack([x, p.expand_as(x)], dim=1)),
    # sums and running sums
    "cumsum": ((4,), lambda x, p: torch.cumsum(x * p, dim=1)),
    "cumprod": ((4,), lambda x, p: torch.cumprod(x + p, dim=1)),
    "cummax": ((4,), lambda x, p: torch.cummax(x * p, dim=1).values),
    "logcumsumexp": ((4,), lambda x, p: torch.logcumsumexp(x * p, dim=1)),
    "prod": ((4,), lambda x, p: torch.prod(x * p, dim=1, keepdim=True)),
    "var": ((4,), lambda x, p: torch.var(x * p, dim=1, keepdim=True)),
    "std_mean": ((4,), lambda x, p: torch.cat(torch.std_mean(x * p, dim=1, keepdim=True), dim=1)),
    "norm": ((4,), lambda x, p: torch.norm(x - p, p=3, dim=1, keepdim=True)),
    "renorm": ((4,), lambda x, p: torch.renorm(x * p, 2, 0, 1.0)),
    "trapezoid": ((4,), lambda x, p: torch.trapezoid(x * p, dim=1)[:, None]),
    "diff": ((4,), lambda x, p: torch.diff(x * p, dim=1)),
    "nansum": ((4,), lambda x, p: torch.nansum(x * p, dim=1, keepdim=True)),
    "gradient": ((4,), lambda x, p: torch.gradient(x * p, dim=1)[0]),
    # distances and losses
    "cdist": ((3, 4), torch.cdist),
    "cdist, 1": ((3, 4), lambda x, p: torch.cdist(x, p, p=1.0)),
    "cdist, by example": ((3, 2), lambda x, p: torch.cdist(x.view(-1, 2, 2), p.expand(len(x), 3, 2))),
    "pdist": ((4,), lambda x, p: torch.stack([F.pdist((row * p).view(2, 2)) for row in x])),
    "dist": ((4,), lambda x, p: torch.stack([torch.dist(row, p, p=3) for row in x])[:, None]),
    "pairwise_distance": ((4,), lambda x, p: F.pairwise_distance(x, p.expand_as(x), keepdim=True)),
    "cosine_similarity": ((4,), lambda x, p: F.cosine_similarity(x, p, dim=1)[:, None]),
    "cosine_embedding_loss": (
        (4,),
        lambda x, p: F.cosine_embedding_loss(x, p.expand_as(x), torch.ones(len(x)), reduction="none")[:, None],
    ),
    "mse_loss": ((4,), lambda x, p: F.mse_loss(x, p.expand_as(x), reduction="none")),
    "l1_loss": ((4,), lambda x, p: F.l1_loss(x, p.expand_as(x), reduction="none")),
    "huber_loss": ((4,), lambda x, p: F.huber_loss(x * p, x.flip(1), reduction="none")),
    "kl_div": ((4,), lambda x, p: F.kl_div(F.log_softmax(x * p, 1), F.softmax(x, 1), reduction="none")),
    "cross_entropy": ((4,), lambda x, p: F.cross_entropy(x * p, ids(x, 4)[:, 0], reduction="none")[:, None]),
    "cross_entropy, weight": (
        (4,),
        lambda x, p: F.cross_entropy(x, ids(x, 4)[:, 0], weight=p, reduction="none")[:, None],
    ),
    "nll_loss": ((4,), lambda x, p: F.nll_loss(F.log_softmax(x * p, 1), ids(x, 4)[:, 0], reduction="none")[:, None]),
    "binary_cross_entropy": ((4,), lambda x, p: F.binary_cross_entropy(unit(x * p), unit(x), reduction="none")),
    "bce, pos_weight": (
        (4,),
        lambda x, p: F.binary_cross_entropy_with_logits(x, unit(x), pos_weight=p, reduction="none"),
    ),
    "poisson_nll_loss": ((4,), lambda x, p: F.poisson_nll_loss(x.tanh() * p, x.abs(), reduction="none")),
    "gaussian_nll_loss": (
        (4,),
        lambda x, p: F.gaussian_nll_loss(x, x.flip(1), p.expand_as(x) ** 2 + 1, reduction="none"),
    ),
    "margin_ranking_loss": (
        (4,),
        lambda x, p: F.margin_ranking_loss(x, x * p, torch.ones_like(x), 20.0, reduction="none"),
    ),
    "triplet_margin_loss": (
        (4,),
        lambda x, p: F.triplet_margin_loss(x, x * p, x.flip(1), margin=50.0, reduction="none")[:, None],
    ),
    "multi_margin_loss": ((4,), lambda x, p: F.multi_margin_loss(x * p, ids(x, 4)[:, 0], reduction="none")[:, None]),
    "soft_margin_loss": ((4,), lambda x, p: F.soft_margin_loss(x * p, x.detach().sign(), reduction="none")),
    # matrices
    "inv": ((2, 2), lambda x, p: torch.linalg.inv(square(x) + 0.1 * p)),
    "pinv": ((2, 2), lambda x, p: torch.linalg.pinv(square(x) + 0.1 * p)),
    "det": ((2, 2), lambda x, p: torch.linalg.det(square(x) + p)[:, None]),
    "slogdet": ((2, 2), lambda x, p: torch.linalg.slogdet(definite(x, p))[1][:, None]),
    "logdet": ((2, 2), lambda x, p: torch.logdet(definite(x, p))[:, None]),
    "solve": ((2, 2), lambda x, p: torch.linalg.solve(square(x) + 0.1 * p, x.view(-1, 2, 2))),
    "solve for it": ((2, 3), lambda x, p: torch.linalg.solve(square(x), p.expand(len(x), 2, 3))),
    "solve, one matrix": ((4, 4), lambda x, p: torch.linalg.solve(p + 5 * torch.eye(4).to(x), x, left=False)),
    "lu_solve": (
        (2, 2),
        lambda x, p: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(x) + 0.1 * p), x.view(-1, 2, 2)),
    ),
    "lstsq": ((2, 2), lambda x, p: torch.linalg.lstsq(square(x) + 0.1 * p, x.view(-1, 2, 2)).solution),
    "solve_triangular": (
        (2, 2),
        lambda x, p: torch.linalg.solve_triangular(p + 3 * torch.eye(2).to(x), x.view(-1, 2, 2), upper=True),
    ),
    "cholesky": ((2, 2), lambda x, p: torch.linalg.cholesky(definite(x, p))),
    "cholesky_solve": (
        (2, 2),
        lambda x, p: torch.cholesky_solve(x.view(-1, 2, 2), torch.linalg.cholesky(definite(x, p))),
    ),
    "cholesky_inverse": ((2, 2), lambda x, p: torch.cholesky_inverse(torch.linalg.cholesky(definite(x, p)))),
    "eigh": ((2, 2), lambda x, p: torch.linalg.eigh(definite(x, p))[0]),
    "eigvals": ((2, 2), lambda x, p: torch.linalg.eigvals(definite(x, p)).real.sum(1, keepdim=True)),
    "svdvals": ((2, 2), lambda x, p: torch.linalg.svdvals(square(x) + p)),
    "qr": ((2, 2), lambda x, p: torch.linalg.qr(square(x) + p)[1].abs()),
    "lu": ((2, 2), lambda x, p: torch.linalg.lu(square(x) + 0.1 * p)[2]),
    "matrix_exp": ((2, 2), lambda x, p: torch.linalg.matrix_exp(x.view(-1, 2, 2).tanh() @ p)),
    "matrix_power": ((2, 2), lambda x, p: torch.linalg.matrix_power(square(x) + p, 3)),
    "matrix_norm": ((2, 2), lambda x, p: torch.linalg.matrix_norm(square(x) + p, "nuc")[:, None]),
    "cond": ((2, 2), lambda x, p: torch.linalg.cond(square(x) + 0.1 * p)[:, None]),
    "householder_product": ((2,), lambda x, p: torch.linalg.householder_product(square(x), p.expand(len(x), 2))),
    "trace": ((2, 2), lambda x, p: torch.stack([torch.trace(row.view(2, 2) @ p) for row in x])[:, None]),
    "vander": ((4,), lambda x, p: torch.linalg.vander((x * p).tanh(), N=3)),
    # transforms
    "fft": ((4,), lambda x, p: torch.view_as_real(torch.fft.fft(x * p))),
    "rfft": ((4,), lambda x, p: torch.fft.rfft(x * p).abs()),
    "irfft": ((3,), lambda x, p: torch.fft.irfft(torch.fft.rfft(x) * p, n=4)),
    "fft2": ((2, 2), lambda x, p: torch.fft.fft2(x.view(-1, 2, 2) * p).real),
    "hfft": ((4,), lambda x, p: torch.fft.hfft(x * p)),
    "stft": (
        (4,),
        lambda x, p: torch.view_as_real(torch.stft(x * p, 4, 2, window=p, center=False, return_complex=True)),
    ),
    "complex": ((4,), lambda x, p: torch.complex(x, p.expand_as(x)).angle()),
    "polar": ((4,), lambda x, p: torch.polar(x.abs() + 1, x * p).real),
    "stft, data": ((4,), lambda x, p: torch.stft(x * p, 4, 2, center=False, return_complex=True).abs()),
    "dct by products": ((4, 4), lambda x, p: torch.fft.fft(x, dim=1).real @ p),
    # custom derivatives
    "double where": ((4,), lambda x, p: torch.where(x * p > 0, torch.log1p((x * p).abs()), x)),
    "loop over it": ((3,), lambda x, p: sum(w * x**k for k, w in enumerate(p, 1))),
    "branch by value": ((4,), lambda x, p: x * p if bool((x > 0).all()) else x - p),
    "half": ((4,), lambda x, p: x * p.to(torch.float32).to(x.dtype)),
    "as_strided": ((4,), lambda x, p: x * p.as_strided((4,), (1,))),
    "set by mask": ((4,), lambda x, p: _with_mask(x, p)),
    "outputs by name": ((4,), lambda x, p: torch.add(x, p, alpha=3).view(-1, 2, 2).movedim(1, 2).reshape(-1, 4)),
    # attention and recurrent cells
    "scaled_dot_product_attention": (
        (2, 2),
        lambda x, p: F.scaled_dot_product_attention(x.view(-1, 2, 2) @ p, x.view(-1, 2, 2), x.view(-1, 2, 2)),
    ),
    "attention, mask": ((2, 2), lambda x, p: F.scaled_dot_product_attention(*[x.view(-1, 2, 2)] * 3, attn_mask=p)),
    "lstm_cell": ((12, 4), lambda x, p: torch.lstm_cell(x, (x[:, :3], x[:, 1:]), p, p[:, :3])[0]),
    "gru_cell": ((9, 4), lambda x, p: torch.gru_cell(x, x[:, :3], p, p[:, 1:])),
    "rnn_tanh_cell": ((3, 4), lambda x, p: torch.rnn_tanh_cell(x, x[:, :3], p, p[:, :3])),
    "lstm": (
        (12, 3),
        lambda x, p: torch.lstm(
            x[:, None, :3], (x[None, :, :3], x[None, :, 1:]), [p, p], False, 1, 0.0, False, False, True
        )[0],
    ),
    "multi_head_attention": (
        (6, 2),
        lambda x, p: F.multi_head_attention_forward(
            *[x.view(-1, 2, 2).transpose(0, 1)] * 3, 2, 1, p, None, None, None, False, 0.0, p[:2], None
        )[0].transpose(0, 1),
    ),
}


def _with_mask(x: Tensor, p: Tensor) -> Tensor:
    found = x * 1
    found[found > 0] *= p[0]
    return found * p


def _with_rows(x: Tensor, p: Tensor) -> Tensor:
    found = x.clone()
    found[:, 1:3] = x[:, :2] * p
    found[:, 0] += p.sum()
    return found
