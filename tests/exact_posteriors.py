"""Guidance of mixtures in closed form, written once more, for tests."""

import torch

from cldsde import GaussianMixture
from cldsde.score import Observation


def wide_mixture():
    """Five overlapping components in eight dimensions, three numbers observed."""
    g = torch.Generator().manual_seed(11)
    root = torch.randn(5, 8, 8, generator=g, dtype=torch.float64) / 8
    covariances = root @ root.mT + 0.05 * torch.eye(8)
    means = torch.randn(5, 8, generator=g, dtype=torch.float64)
    A = torch.randn(3, 8, generator=g, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])
    y = A @ means[1] + 0.1 * torch.randn(3, generator=g, dtype=torch.float64)
    return GaussianMixture(weights, means, covariances), Observation.matrix(A, y, 0.1)


def guided_prediction(data, seen, sde, z, t):
    """Cov[x_0 | û], E[x_0 | û, y], its moment matching, and log N(y; A D, A V Aᵀ + s²I).

    By û = ψᵀΣ⁻¹z / ψᵀΣ⁻¹ψ and Bayes' rule for each component.
    """
    law = sde.marginal(t)
    psi, precision = law.mean[:, 0], torch.linalg.inv(law.covariance)
    q = psi @ precision @ psi
    u = torch.einsum("k,bkd->bd", precision @ psi / q, z)
    A, y, s2, eye = seen.dense((8,)), seen.y.double(), seen.noise_std**2, torch.eye(8).double()
    logs, logs_y, Es, Vs, Ds = [], [], [], [], []
    normal = torch.distributions.MultivariateNormal
    for w, m, C in zip(data.weights, data.means, data.covariances, strict=True):
        gain = C @ torch.linalg.inv(C + eye / q)
        E, V = m + (u - m) @ gain.T, gain / q
        V = (V + V.T) / 2
        R = A @ V @ A.T + s2 * torch.eye(len(A)).double()
        logs.append(w.log() + normal(m, C + eye / q).log_prob(u))
        logs_y.append(logs[-1] + normal(E @ A.T, R).log_prob(y))
        Es.append(E)
        Vs.append(V)
        Ds.append(E + (y - E @ A.T) @ torch.linalg.solve(R, A @ V))
    rho, rho_y = (torch.stack(x, 1).softmax(1) for x in (logs, logs_y))
    E, V, exact = torch.stack(Es, 1), torch.stack(Vs), torch.stack(Ds, 1)
    D = torch.einsum("bn,bnd->bd", rho, E)
    second = torch.einsum("bn,bni,bnj->bij", rho, E, E) + torch.einsum("bn,nij->bij", rho, V)
    V = second - D[:, :, None] * D[:, None]
    R = A @ V @ A.T + s2 * torch.eye(len(A)).double()
    weight = torch.linalg.solve(R, (y - D @ A.T).unsqueeze(-1))
    matched = D + (V @ A.T @ weight).squeeze(-1)
    log_likelihood = normal(D @ A.T, (R + R.mT) / 2).log_prob(y)
    return V, torch.einsum("bn,bnd->bd", rho_y, exact), matched, log_likelihood
