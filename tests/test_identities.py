"""The identities of SPEC section 3, by their numbers there, each against something that is not MARS.

    e_t = beta e_{t-1} + (1-beta) g_t        zero start, clip off, constant gamma, k = gamma*beta/(1-beta)

Everything is float64; 1e-12 is a few thousand roundings, and the polar factor gets 1e-9 for its conditioning.
The other side of each comparison is torch.optim, a recurrence written here, or a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from mars_optim import MARS
from problems import BACKENDS, ELEMENTWISE, POLAR, TYPES, make_parameters, momentum

NUM_STEPS = 20
SVD = {"polar_method": "svd", "polar_dtype": torch.float64}
backends = pytest.mark.parametrize("backend", BACKENDS)


def exact_polar(M: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=atol, rtol=0)


def matrix(seed: int = 0, rows: int = 4, cols: int = 3) -> Parameter:
    generator = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(rows, cols, dtype=torch.float64, generator=generator))


def random_gradients(shape: tuple[int, ...], num_steps: int = NUM_STEPS, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(num_steps)]


def mars(parameters: Any, backend: str, **options: Any) -> MARS:
    """Clip off and the zero start: how the identities are stated."""
    base = {"lr": 1e-2, "clip_norm": None, "first_step": "zero", **BACKENDS[backend]}
    return MARS(parameters, **{**base, **SVD, **options})


def trajectory(optimizer: MARS, p: Parameter, gradients: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    for t, g in enumerate(gradients):
        p.grad = g.clone()
        optimizer.step()
        yield t, g


def direction(mars_type: str, m: Tensor) -> Tensor:
    """The update of the types without a second moment."""
    rows, cols = m.shape
    if mars_type == "lion":
        return m.sign()
    return exact_polar(m) * (max(1.0, rows / cols) ** 0.5 if mars_type == "shampoo" else 0.2 * max(rows, cols) ** 0.5)


# ------------------------------------------------------------------ 1


@backends
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("first_step", ["paper", "zero"])
@pytest.mark.parametrize("is_approx", [True, False])
def test_1_no_correction_no_clip_is_adamw(
    backend: str, weight_decay: float, amsgrad: bool, maximize: bool, first_step: str, is_approx: bool
) -> None:
    ours, theirs = make_parameters(), make_parameters()
    common: dict[str, Any] = {
        "lr": 2e-2,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
    }
    optimizer = mars(ours, backend, gamma=0.0, optimize_1d=True, first_step=first_step, is_approx=is_approx, **common)
    adamw = torch.optim.AdamW(theirs, foreach=False, **common)
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_STEPS):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn(q.shape, dtype=torch.float64, generator=generator)
            p.grad = q.grad.clone()
        if is_approx:
            optimizer.step()
        else:  # the closure gives the gradients again, whichever weights it sees
            gradients = [p.grad for p in ours]

            def closure(gradients: list[Any] = gradients) -> float:
                for p, g in zip(ours, gradients, strict=True):
                    p.grad = g.clone()
                return 0.0

            optimizer.step(closure)
        adamw.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p, q)


# ------------------------------------------------------------------ 2


@backends
@pytest.mark.parametrize("mars_type", TYPES)
@pytest.mark.parametrize("gamma", [0.025, 0.3, 1.0])
def test_2_unclipped_approx_is_quasi_hyperbolic_momentum(backend: str, mars_type: str, gamma: float) -> None:
    """m_t = (1-gamma) e_t + gamma g_t. gamma = 1 gives m_t = g_t: no variance reduction."""
    p, beta = matrix(), 0.9
    optimizer = mars([p], backend, mars_type=mars_type, gamma=gamma, betas=(beta, 0.99))
    e = torch.zeros_like(p)
    for _, g in trajectory(optimizer, p, random_gradients((4, 3))):
        e = beta * e + (1 - beta) * g
        close(momentum(optimizer, p), (1 - gamma) * e + gamma * g)


@backends
@pytest.mark.parametrize("mars_type", ["lion", *POLAR])
def test_2_the_weights_follow_quasi_hyperbolic_momentum(backend: str, mars_type: str) -> None:
    """The same from the outside: only weights are compared."""
    p, beta, gamma, lr, decay = matrix(), 0.9, 0.3, 1e-2, 0.1
    optimizer = mars([p], backend, mars_type=mars_type, gamma=gamma, betas=(beta, 0.99), weight_decay=decay)
    x, e = p.detach().clone(), torch.zeros_like(p)
    for _, g in trajectory(optimizer, p, random_gradients((4, 3))):
        e = beta * e + (1 - beta) * g
        x = x - lr * (direction(mars_type, (1 - gamma) * e + gamma * g) + decay * x)
        close(p, x, atol=1e-9)


def noise_variance_ratio(beta: float, gamma: float) -> float:
    """Var[(1-gamma) e + gamma g] / Var[e] for independent g: a sum over the squared weights of g_{t-s}."""
    return (1 - gamma) ** 2 + 2 * gamma * (1 - gamma) * (1 + beta) + gamma**2 * (1 + beta) / (1 - beta)


@pytest.mark.parametrize(("gamma", "published"), [(0.025, 1.070), (0.05, 1.185)])
def test_2_noise_variance_ratio_in_closed_form(gamma: float, published: float) -> None:
    assert abs(noise_variance_ratio(0.95, gamma) - published) < 5e-4


@backends
@pytest.mark.parametrize("mars_type", TYPES)
@pytest.mark.parametrize(("gamma", "published"), [(0.025, 1.070), (0.05, 1.185)])
def test_2_noise_variance_ratio_from_the_impulse_response(
    backend: str, mars_type: str, gamma: float, published: float
) -> None:
    """One unit gradient, then zeros: exp_avg walks through the weights of g_{t-s} in m_t.

    0.95^(2*400) < 1e-17, so 400 steps are all of the sum.
    """
    beta = 0.95
    variance = {}
    for g in (0.0, gamma):
        p = Parameter(torch.zeros(1, 1, dtype=torch.float64))
        optimizer = mars([p], backend, mars_type=mars_type, gamma=g, lr=0.0)
        impulse = [torch.ones(1, 1, dtype=torch.float64)] + [torch.zeros(1, 1, dtype=torch.float64)] * 400
        variance[g] = sum(float(momentum(optimizer, p).square()) for _ in trajectory(optimizer, p, impulse))
    assert abs(variance[0.0] - (1 - beta) / (1 + beta)) < 1e-12
    ratio = variance[gamma] / variance[0.0]
    assert abs(ratio - noise_variance_ratio(beta, gamma)) < 1e-9
    assert abs(ratio - published) < 5e-4


@backends
@pytest.mark.parametrize(("gamma", "published"), [(0.025, 1.070), (0.05, 1.185)])
def test_2_noise_variance_ratio_on_noise(backend: str, gamma: float, published: float) -> None:
    """Gaussian gradients, the same for both optimizers: 10000 entries, 100 stationary steps.

    The two estimates share their noise; what is left of the error of their ratio is below 0.3%.
    """
    parameters = [Parameter(torch.zeros(100, 100, dtype=torch.float64)) for _ in range(2)]
    optimizers = [
        mars([p], backend, mars_type="lion", gamma=g, lr=0.0) for p, g in zip(parameters, (0.0, gamma), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    total = [0.0, 0.0]
    for t in range(250):
        g = torch.randn(100, 100, dtype=torch.float64, generator=generator)
        for i, (p, optimizer) in enumerate(zip(parameters, optimizers, strict=True)):
            p.grad = g.clone()
            optimizer.step()
            if t >= 150:
                total[i] += float(momentum(optimizer, p).square().mean())
    assert abs(total[1] / total[0] - published) < 0.004


# ------------------------------------------------------------------ 3


@backends
@pytest.mark.parametrize("mars_type", TYPES)
def test_3_the_paper_start_differs_by_a_decaying_first_gradient(backend: str, mars_type: str) -> None:
    p, q, beta, gamma = matrix(), matrix(), 0.9, 0.3
    gradients = random_gradients((4, 3))
    paper = mars([p], backend, mars_type=mars_type, gamma=gamma, betas=(beta, 0.99), first_step="paper")
    zero = mars([q], backend, mars_type=mars_type, gamma=gamma, betas=(beta, 0.99))
    for (t, _), _ in zip(trajectory(paper, p, gradients), trajectory(zero, q, gradients), strict=True):
        difference = momentum(paper, p) - momentum(zero, q)
        close(difference, -gamma * beta ** (t + 1) * gradients[0])


# ------------------------------------------------------------------ 4


@backends
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.95, 0.98)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_4_lion_as_published(backend: str, b1: float, b2: float, weight_decay: float) -> None:
    """Lion: x -= lr (sign(b1 m + (1-b1) g) + decay x), then m = b2 m + (1-b2) g."""
    p, lr = matrix(), 1e-2
    gamma = (b2 - b1) / b2
    optimizer = mars([p], backend, mars_type="lion", betas=(b2, 0.5), gamma=gamma, weight_decay=weight_decay, lr=lr)
    x, m = p.detach().clone(), torch.zeros_like(p)
    for _, g in trajectory(optimizer, p, random_gradients((4, 3))):
        x = x - lr * (torch.sign(b1 * m + (1 - b1) * g) + weight_decay * x)
        m = b2 * m + (1 - b2) * g
        close(p, x)


def test_4_the_papers_gamma_is_not_lion() -> None:
    """gamma = 1 - b2, as the paper has it, interpolates otherwise."""
    b1, b2 = 0.9, 0.99
    p = matrix()
    optimizer = mars([p], "reference", mars_type="lion", betas=(b2, 0.5), gamma=1 - b2)
    m, differs = torch.zeros_like(p), False
    for t, g in trajectory(optimizer, p, random_gradients((4, 3))):
        interpolated = b1 * m + (1 - b1) * g
        differs |= t > 0 and bool((momentum(optimizer, p) - interpolated).abs().max() > 1e-3)
        m = b2 * m + (1 - b2) * g
    assert differs


# ------------------------------------------------------------------ 5


@pytest.fixture
def muon_with_exact_polar(monkeypatch: pytest.MonkeyPatch) -> type[torch.optim.Muon]:
    """torch.optim.Muon orthogonalises in bfloat16; for an equality in float64 it gets the exact factor."""
    import torch.optim._muon as muon

    monkeypatch.setattr(muon, "_zeropower_via_newtonschulz", lambda grad, *_: exact_polar(grad))
    return torch.optim.Muon


MUON_CASES = [
    pytest.param({"nesterov": True, "adjust_lr_fn": "original"}, "shampoo", id="nesterov-original"),
    pytest.param({"nesterov": True, "adjust_lr_fn": "match_rms_adamw"}, "m", id="nesterov-match_rms_adamw"),
    pytest.param({"nesterov": False, "adjust_lr_fn": "original"}, "shampoo", id="plain-original"),
    pytest.param({"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}, "m", id="plain-match_rms_adamw"),
]


@backends
@pytest.mark.parametrize(("muon_options", "mars_type"), MUON_CASES)
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (4, 4)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_5_muon(
    muon_with_exact_polar: type[torch.optim.Muon],
    backend: str,
    muon_options: dict[str, Any],
    mars_type: str,
    shape: tuple[int, int],
    weight_decay: float,
) -> None:
    p, q, mu = matrix(0, *shape), matrix(0, *shape), 0.9
    gamma = 1 - mu if muon_options["nesterov"] else 0.0
    optimizer = mars([p], backend, mars_type=mars_type, betas=(mu, 0.9), gamma=gamma, weight_decay=weight_decay)
    muon = muon_with_exact_polar([q], lr=1e-2, momentum=mu, weight_decay=weight_decay, **muon_options)
    for _, g in trajectory(optimizer, p, random_gradients(shape)):
        q.grad = g.clone()
        muon.step()
        close(p, q, atol=1e-9)


@backends
@pytest.mark.parametrize(("muon_options", "mars_type"), MUON_CASES)
def test_5_muon_as_shipped(backend: str, muon_options: dict[str, Any], mars_type: str) -> None:
    """Newton-Schulz with Jordan's five steps in bfloat16 on both sides, roundings in different places.

    bfloat16 keeps 8 bits; five steps whose slope at 1 stays below one in size leave about 1e-2 of an entry. The
    weights move by 20 * lr * scale; 5% of one step each is the room given here.
    """
    p, q, mu, lr = matrix(0, 8, 5), matrix(0, 8, 5), 0.9, 1e-2
    gamma = 1 - mu if muon_options["nesterov"] else 0.0
    optimizer = mars(
        [p],
        backend,
        mars_type=mars_type,
        betas=(mu, 0.9),
        gamma=gamma,
        lr=lr,
        polar_method="newton-schulz",
        polar_coefficients="jordan",
        polar_steps=5,
        polar_dtype=torch.bfloat16,
    )
    muon = torch.optim.Muon([q], lr=lr, momentum=mu, weight_decay=0.0, **muon_options)
    for _, g in trajectory(optimizer, p, random_gradients((8, 5))):
        q.grad = g.clone()
        muon.step()
    assert (p - q).abs().max() < 0.05 * lr * NUM_STEPS


# ------------------------------------------------------------------ 6


@backends
@pytest.mark.parametrize("mars_type", TYPES)
def test_6_adans_momentum(backend: str, mars_type: str) -> None:
    """y = EMA of g, z = EMA of g_t - g_{t-1}, both from zero; y + beta z."""
    p, beta = matrix(), 0.9
    optimizer = mars([p], backend, mars_type=mars_type, betas=(beta, 0.9), gamma=1 - beta)
    y, z, last = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for _, g in trajectory(optimizer, p, random_gradients((4, 3))):
        y = beta * y + (1 - beta) * g
        z = beta * z + (1 - beta) * (g - last)
        last = g
        close(momentum(optimizer, p), y + beta * z)


# ------------------------------------------------------------------ 7, 8, 9: exact mode


class NoisyQuadratic:
    """F(x) = x'Hx/2 for each column of x, with additive noise xi_t on the gradient."""

    def __init__(self, shape: tuple[int, int] = (4, 3)):
        generator = torch.Generator().manual_seed(2)
        A = torch.randn(shape[0], shape[0], dtype=torch.float64, generator=generator)
        self.H = A @ A.T / shape[0]
        self.noise = random_gradients(shape, seed=3)

    def gradient(self, x: Tensor, t: int) -> Tensor:
        return self.H @ x.detach() + self.noise[t]


def exact_trajectory(
    optimizer: MARS, p: Parameter, gradient: Callable[[Tensor, int], Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Yields t and x_t, the weights that the step started from."""
    for t in range(NUM_STEPS):
        x = p.detach().clone()

        def closure(t: int = t) -> float:
            p.grad = gradient(p, t)
            return 0.0

        optimizer.step(closure)
        yield t, x


@backends
@pytest.mark.parametrize("mars_type", TYPES)
def test_7_exact_with_gamma_one_is_storm(backend: str, mars_type: str) -> None:
    """d_t = g(x_t, xi_t) + beta (d_{t-1} - g(x_{t-1}, xi_t)), d_1 = (1-beta) g_1."""
    problem, p, beta = NoisyQuadratic(), matrix(), 0.9
    optimizer = mars(
        [p], backend, mars_type=mars_type, betas=(beta, 0.9), gamma=1.0, first_step="paper", is_approx=False
    )
    d, x_before = torch.zeros_like(p), p.detach().clone()
    for t, x in exact_trajectory(optimizer, p, problem.gradient):
        if t == 0:
            d = (1 - beta) * problem.gradient(x, t)
        else:
            d = problem.gradient(x, t) + beta * (d - problem.gradient(x_before, t))
        x_before = x
        close(momentum(optimizer, p), d)


@backends
@pytest.mark.parametrize("mars_type", TYPES)
def test_8_exact_with_gamma_one_tracks_the_gradient_up_to_averaged_noise(backend: str, mars_type: str) -> None:
    """m_t - grad F(x_t) = (1-beta) sum_s beta^(t-s) xi_s - beta^t grad F(x_1), on any trajectory."""
    problem, p, beta = NoisyQuadratic(), matrix(), 0.9
    x_1 = p.detach().clone()
    optimizer = mars(
        [p], backend, mars_type=mars_type, betas=(beta, 0.9), gamma=1.0, first_step="paper", is_approx=False, lr=0.05
    )
    for t, x in exact_trajectory(optimizer, p, problem.gradient):
        noise = torch.stack([(1 - beta) * beta ** (t - s) * problem.noise[s] for s in range(t + 1)]).sum(dim=0)
        expected = noise - beta ** (t + 1) * (problem.H @ x_1)
        close(momentum(optimizer, p) - problem.H @ x, expected)


@backends
@pytest.mark.parametrize("mars_type", TYPES)
@pytest.mark.parametrize("gamma", [0.025, 1.0])
def test_9_a_noise_free_linear_loss_has_no_difference(backend: str, mars_type: str, gamma: float) -> None:
    slope = random_gradients((4, 3))[0]
    with_gamma, without = matrix(), matrix()
    options: dict[str, Any] = {"mars_type": mars_type, "first_step": "paper", "is_approx": False, "clip_norm": 1.0}
    one = mars([with_gamma], backend, gamma=gamma, **options)
    other = mars([without], backend, gamma=0.0, **options)
    left = exact_trajectory(one, with_gamma, lambda x, t: slope.clone())
    right = exact_trajectory(other, without, lambda x, t: slope.clone())
    for _ in zip(left, right, strict=True):
        close(with_gamma, without, atol=1e-9 if mars_type in POLAR else 1e-12)


# ------------------------------------------------------------------ 10


@backends
@pytest.mark.parametrize("mars_type", ["lion", *POLAR])
@pytest.mark.parametrize("first_step", ["zero", "paper"])
def test_10_one_buffer_is_enough_without_a_second_moment(backend: str, mars_type: str, first_step: str) -> None:
    """e_t alone gives the weights; the paper start adds identity 3's known multiple of the first gradient.

    So for the paper start a one-buffer build starts from e_0 = -gamma/(1-gamma) g_1.
    """
    p, beta, gamma, lr = matrix(), 0.9, 0.3, 1e-2
    optimizer = mars([p], backend, mars_type=mars_type, gamma=gamma, betas=(beta, 0.9), lr=lr, first_step=first_step)
    gradients = random_gradients((4, 3))
    e = torch.zeros_like(p) if first_step == "zero" else -gamma / (1 - gamma) * gradients[0]
    x = p.detach().clone()
    for _, g in trajectory(optimizer, p, gradients):
        e = beta * e + (1 - beta) * g
        x = x - lr * direction(mars_type, (1 - gamma) * e + gamma * g)
        close(p, x, atol=1e-9)


def test_10_clipping_each_step_breaks_it() -> None:
    p, beta, gamma = matrix(), 0.9, 0.3
    optimizer = mars([p], "reference", mars_type="lion", gamma=gamma, betas=(beta, 0.9), clip_norm=1.0)
    e, gap = torch.zeros_like(p), 0.0
    for _, g in trajectory(optimizer, p, random_gradients((4, 3))):
        e = beta * e + (1 - beta) * g
        m = momentum(optimizer, p)
        combined = (1 - gamma) * e + gamma * g
        gap = max(gap, float((m / m.norm() - combined / combined.norm()).norm()))
    assert gap > 1e-2


# ------------------------------------------------------------------ the authors' formulas


class AuthorsMars:
    """What the authors' code computes (with its fixed 1-D decay), minus the defects ANCHORS lists.

    last_grad starts at zero, and so does g'_1 in exact mode; 1-D tensors get AdamW at lr * lr_1d/lr with
    decay 0.1 and betas_1d; eps is outside the root.
    """

    def __init__(
        self, tensors: list[Tensor], mars_type: str, lr: float, lr_1d: float, weight_decay: float, gamma: float
    ):
        self.x = [tensor.detach().clone() for tensor in tensors]
        self.m = [torch.zeros_like(x) for x in self.x]
        self.v = [torch.zeros_like(x) for x in self.x]
        self.last = [torch.zeros_like(x) for x in self.x]
        self.mars_type, self.lr, self.ratio, self.decay, self.gamma = mars_type, lr, lr_1d / lr, weight_decay, gamma
        self.t = 0

    def step(self, gradients: list[Tensor], other: list[Tensor] | None = None) -> None:
        self.t += 1
        for i, g in enumerate(gradients):
            if self.x[i].ndim < 2:
                beta1, beta2, lr, decay, c = 0.9, 0.95, self.lr * self.ratio, 0.1, g
            else:
                beta1, beta2, lr, decay = 0.95, 0.99, self.lr, self.decay
                last = self.last[i] if other is None or self.t == 1 else other[i]
                c = g + self.gamma * (beta1 / (1 - beta1)) * (g - last)
                if c.norm() > 1:
                    c = c / c.norm()
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * c
            if self.mars_type == "adamw" or self.x[i].ndim < 2:
                self.v[i] = beta2 * self.v[i] + (1 - beta2) * c.square()
                denominator = self.v[i].sqrt() / (1 - beta2**self.t) ** 0.5 + 1e-8
                update = self.m[i] / (1 - beta1**self.t) / denominator
            else:
                update = self.m[i].sign()
            self.last[i] = g
            self.x[i] = self.x[i] - lr * (update + decay * self.x[i])


@backends
@pytest.mark.parametrize("mars_type", ELEMENTWISE)
@pytest.mark.parametrize("is_approx", [True, False], ids=["approx", "exact"])
def test_the_authors_formulas(backend: str, mars_type: str, is_approx: bool) -> None:
    names = ("vector", "wide", "tall", "conv", "scalar")
    parameters = make_parameters(names)
    optimizer = MARS(
        parameters,
        lr=6e-3,
        weight_decay=0.01,
        mars_type=mars_type,
        is_approx=is_approx,
        first_step="zero",
        weight_decay_1d=0.1,
        lr_1d=3e-3,
        **BACKENDS[backend],
    )
    authors = AuthorsMars([*parameters], mars_type, lr=6e-3, lr_1d=3e-3, weight_decay=0.01, gamma=0.025)
    generator = torch.Generator().manual_seed(4)
    targets = [
        [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters] for _ in range(NUM_STEPS)
    ]
    before = [p.detach().clone() for p in parameters]
    for t, z in enumerate(targets):
        size = 0.04 * 2 ** (t % 5)  # below the clip at first, above it later

        def gradients(points: list[Tensor], z: list[Tensor] = z, size: float = size) -> list[Tensor]:
            return [(x.detach() - y) * size for x, y in zip(points, z, strict=True)]

        def closure(gradients: Callable[[list[Tensor]], list[Tensor]] = gradients) -> float:
            for p, g in zip(parameters, gradients([*parameters]), strict=True):
                p.grad = g
            return 0.0

        here, there = gradients(authors.x), None if is_approx else gradients(before)
        before = [x.clone() for x in authors.x]
        authors.step(here, there)
        optimizer.step(closure)
        for p, x in zip(parameters, authors.x, strict=True):
            close(p, x)
