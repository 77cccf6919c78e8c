"""Layers with a declared spectral-norm bound, the projection onto it, and the certificate (privacy.md, section 1).

A network here is a chain of affine maps with GroupSort between them and a fixed diagonal scale behind the last one:
g = diag(scale) ∘ W_L ∘ a ∘ … ∘ a ∘ W_1. Since a is 1-Lipschitz, Lip(g) ≤ max(1, scale) ∏ ‖W_l‖₂.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# The certificate is a float64 SVD times this factor, which covers the rounding of LAPACK's singular values by far.
CERTIFICATE_SLACK = 1.0 + 1e-6
# The fast float32 projection aims this far inside the ball: an order of magnitude above the error of its eigenvalues.
FAST_MARGIN = 2e-5
# A step that left the ball is cut this far inside it: 3 to 14 times fewer decompositions, the same loss (tests/bench).
RETREAT = 0.01
# Beyond this σ²/bound² the errors of float32 eigenvalues, which are relative to the largest one, would reach the bound.
FAST_REACH = 16.0


def group_sort(x: Tensor) -> Tensor:
    """GroupSort with groups of two: sorts the pairs (i, i + n/2) of the last axis, whose length n must be even.

    A permutation at every point, hence 1-Lipschitz and gradient-norm preserving (Anil, Lucas, Grosse 2019), and
    a(0) = 0. Shape is kept.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((torch.maximum(first, second), torch.minimum(first, second)), dim=-1)


def spectral_norm_bound(weight: Tensor) -> float:
    """Upper bound of ‖weight‖₂ for a matrix of shape (out, in): float64 SVD times 1 + 1e-6.

    Infinity if an entry is not finite, so that a broken network can never pass a certificate.
    """
    matrix = weight.detach().to("cpu", torch.float64)
    if not torch.isfinite(matrix).all():
        return math.inf
    return float(torch.linalg.matrix_norm(matrix, ord=2)) * CERTIFICATE_SLACK


def certificate(weights: Iterable[Tensor], output_scale: float = 1.0) -> float:
    """L_d = max(1, output_scale) ∏ ‖W_l‖₂ over the weight matrices of a network: an upper bound of its modulus."""
    return max(1.0, output_scale) * math.prod(spectral_norm_bound(weight) for weight in weights)


def project_spectral(weight: Tensor, bound: float) -> Tensor:
    """P_s(W) = U min(Σ, s) Vᵀ, the Frobenius-nearest matrix with ‖·‖₂ ≤ s; non-expansive (privacy.md, section 1).

    Computed in float64 and returned in the dtype of `weight`; the result satisfies
    `spectral_norm_bound(result) <= bound`, rounding included. A matrix that satisfies it already is returned as it is.
    `ValueError` if an entry is not finite.
    """
    norm = spectral_norm_bound(weight)
    if norm <= bound:
        return weight.detach().clone()
    if not math.isfinite(norm):
        raise ValueError("the matrix has entries that are not finite")
    left, singular, right = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    # Slack for the certificate's own factor and for rounding the entries back to float32.
    slack = 4.0 * torch.finfo(torch.float32).eps
    projected = (left * singular.clamp(max=bound / CERTIFICATE_SLACK * (1.0 - slack))) @ right
    result = projected.to(weight.dtype)
    while spectral_norm_bound(result) > bound:
        # Rounding of a large matrix, or of entries below float32's normal range: shrinking the whole matrix stays
        # inside the ball, and ends at zero at the latest.
        projected *= 1.0 - slack
        slack = min(2.0 * slack, 1.0)
        result = projected.to(weight.dtype)
    return result.to(weight.device)


@torch.no_grad()
def project_spectral_(weight: Tensor, bound: float, retreat: float = 0.0) -> None:
    """Bring `weight` (out, in) in place into ‖·‖₂ ≤ bound, fast: the version for every optimiser step.

    In units of b = bound (1 - 2e-5), with G = WᵀW (or WWᵀ, whichever is smaller): a Cholesky factor of I - G exists
    only if all singular values are below b, so its success proves that nothing is to be done. Otherwise
    W (I - V diag(1 - t/σ)₊ Vᵀ) with the eigenvectors V of G is U min(Σ, t) Vᵀ, t = 1 - retreat: the nearest matrix for
    retreat = 0, and for a small positive one a point slightly inside, from which the next steps seldom leave the ball,
    so that most of them cost a Cholesky factor and no eigenvectors. A matrix so far outside that float32 would lose the
    small eigenvalues goes through `project_spectral`; so does what leaves a site or the server, and the float64
    certificate: nothing relies on this function's float32 arithmetic.
    """
    inner = bound * (1.0 - FAST_MARGIN)
    scaled = weight / inner
    tall = weight.shape[0] >= weight.shape[1]
    gram = scaled.mT @ scaled if tall else scaled @ scaled.mT
    margin = (-gram).diagonal_scatter(1.0 - gram.diagonal())
    if int(torch.linalg.cholesky_ex(margin).info) == 0:
        return
    spectrum = _eigh_within(gram, FAST_REACH)
    if spectrum is None:
        weight.copy_(project_spectral(weight, bound))
        return
    eigenvalues, vectors = spectrum
    target = 1.0 - retreat
    shrink = 1.0 - target * eigenvalues.clamp_min(target * target).rsqrt()
    excess = shrink > 0
    vectors, shrink = vectors[:, excess], shrink[excess]
    if tall:
        weight -= ((weight @ vectors) * shrink) @ vectors.mT
    else:
        weight -= vectors @ (shrink[:, None] * (vectors.mT @ weight))


def _eigh_within(gram: Tensor, reach: float) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors of a positive semidefinite matrix, None if its norm exceeds `reach` or is NaN."""
    if not float(gram.diagonal().max()) <= reach:  # no diagonal entry exceeds the norm
        return None
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return (eigenvalues, vectors) if float(eigenvalues[-1]) <= reach else None


class LipschitzMLP(nn.Module):
    """Affine maps with GroupSort between them, every weight inside its declared spectral ball.

    Maps (..., widths[0]) to (..., widths[-1]). `lipschitz` is the certificate of the whole network with
    `output_scale`, a buffer of shape (widths[-1],), behind the last layer; each of the L layers gets the same share
    s = (lipschitz / max(1, max|output_scale|))^(1/L). `lipschitz=None` builds the same network without constraint.
    `initialise=False` leaves out the orthogonal start, for a network whose weights are loaded at once.
    """

    output_scale: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        lipschitz: float | None,
        output_scale: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        if any(width % 2 for width in widths[1:-1]):
            raise ValueError(f"hidden widths must be even, GroupSort sorts pairs (found {list(widths[1:-1])})")
        scale = torch.ones(widths[-1]) if output_scale is None else output_scale.to(torch.float32)
        self.register_buffer("output_scale", scale, persistent=False)
        depth = len(widths) - 1
        share = None if lipschitz is None else (lipschitz / max(1.0, float(scale.abs().max()))) ** (1.0 / depth)
        self.bounds: list[float | None] = [share] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        if not initialise:
            return
        for layer, bound in zip(self.linears, self.bounds, strict=True):
            nn.init.orthogonal_(layer.weight, gain=1.0 if bound is None else bound, generator=generator)
            nn.init.zeros_(layer.bias)
        self.project(exact=True)

    @property
    def linears(self) -> list[nn.Linear]:
        """The affine layers in order."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network to (..., widths[0])."""
        *inner, last = self.linears
        for layer in inner:
            x = group_sort(layer(x))
        return last(x) * self.output_scale

    @torch.no_grad()
    def project(self, *, exact: bool = False) -> None:
        """Move every weight into its ball: fast after an optimiser step, `exact` before anything relies on it."""
        for layer, bound in zip(self.linears, self.bounds, strict=True):
            if bound is None:
                continue
            if exact:
                layer.weight.copy_(project_spectral(layer.weight, bound))
            else:
                project_spectral_(layer.weight, bound, RETREAT)

    def certificate(self) -> float:
        """Upper bound of the network's Lipschitz constant, computed from its weights in float64."""
        return certificate([layer.weight for layer in self.linears], float(self.output_scale.abs().max()))
