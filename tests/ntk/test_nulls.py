"""Null models: exact where they are deterministic, unbiased where they are random."""

import pytest
import torch
from cases import autograd_kernel, batch, classifier, relative_error, tied_gpt2

import ntk


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_subset_of_everything_is_the_kernel():
    model, inputs = classifier("bert"), batch()
    total = sum(p.numel() for p in model.parameters())
    (kernel,) = ntk.random_subset_ntk(model, inputs, total, generator=seeded())
    assert relative_error(kernel, autograd_kernel(model, inputs)) <= 1e-12


def test_random_subsets_are_their_coordinates():
    model, inputs = classifier("bert"), batch()
    total = sum(p.numel() for p in model.parameters())
    kernels = ntk.random_subset_ntk(model, inputs, 40, generator=seeded(), draws=2)
    generator = seeded()
    for kernel in kernels:
        subset = torch.randperm(total, generator=generator)[:40]
        masks, start = {}, 0
        for name, p in model.named_parameters():
            inside = subset[(subset >= start) & (subset < start + p.numel())] - start
            masks[name] = torch.zeros(p.numel()).index_fill(0, inside, 1).reshape(p.shape).double()
            start += p.numel()
        # Fine-tuning a sparse mask: theta = theta_0 + mask * delta, whose Jacobian in delta at 0 is the masked one.
        masked = _masked_kernel(model, inputs, masks)
        assert relative_error(kernel, masked) <= 1e-12


def _masked_kernel(model, inputs, masks):
    left = []
    model.eval()
    for i in range(len(inputs["input_ids"])):
        logits = model(**{key: value[i : i + 1] for key, value in inputs.items()}).logits[0]
        left.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            (g * masks[name]).flatten()
                            for (name, _), g in zip(
                                model.named_parameters(),
                                torch.autograd.grad(value, list(model.parameters()), retain_graph=True),
                                strict=True,
                            )
                        ]
                    )
                    for value in logits
                ]
            )
        )
    J = torch.stack(left)
    return torch.einsum("iap,jbp->ijab", J, J)


def test_gaussian_sketch_has_the_mean_and_the_variance_of_a_sketch():
    J = torch.randn(3, 2, 7, generator=seeded(1), dtype=torch.float64)
    K = torch.einsum("iap,jbp->ijab", J, J)
    m, draws = 20, 4000
    generator = seeded(2)
    sketches = torch.stack([ntk.gaussian_sketch(K, m, generator=generator) for _ in range(draws)])
    # Var <R u, R v> = (|u|^2 |v|^2 + <u, v>^2) / m for R with iid N(0, 1/m) entries.
    diagonal = torch.einsum("iiaa->ia", K)
    variance = (diagonal[:, None, :, None] * diagonal[None, :, None, :] + K**2) / m
    assert ((sketches.mean(0) - K).abs() < 5 * (variance / draws).sqrt()).all()
    assert torch.allclose(sketches.var(0), variance, rtol=0.2)


def test_a_large_sketch_is_the_kernel_and_one_of_few_directions_has_low_rank():
    K = ntk.empirical_ntk(classifier("bert"), batch())
    assert relative_error(ntk.gaussian_sketch(K, 1_000_000, generator=seeded()), K) < 0.02
    spectrum = ntk.spectrum(ntk.gaussian_sketch(K, 2, generator=seeded()))
    assert spectrum[2] < 1e-10 * spectrum[0] < spectrum[1]


def test_permuted_kernels_keep_their_spectrum():
    K = ntk.empirical_ntk(classifier("bert"), batch())
    P = ntk.permuted(K, generator=seeded(3))
    assert torch.allclose(ntk.spectrum(P), ntk.spectrum(K))
    assert not torch.allclose(P, K)


@pytest.mark.parametrize("extra", [0, 5])
def test_hidden_state_kernel(extra):
    model, inputs = classifier("bert").eval(), batch(extra=extra)
    with torch.no_grad():
        states = model.bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    H = (states * mask).sum(1) / mask.sum(1)
    assert relative_error(ntk.hidden_state_kernel(model, inputs), H @ H.T) <= 1e-12


def test_mistakes():
    with pytest.raises(ValueError, match="m must be between 1 and the"):
        ntk.random_subset_ntk(classifier("bert"), batch(), 0, generator=seeded())
    with pytest.raises(ValueError, match="m, the number of directions of a sketch, must be at least 1"):
        ntk.gaussian_sketch(torch.eye(2), 0, generator=seeded())
    with pytest.raises(ValueError, match="hidden states"):
        ntk.hidden_state_kernel(torch.nn.Linear(2, 2), torch.ones(1, 2))
    assert ntk.hidden_state_kernel(tied_gpt2(), batch()).shape == (4, 4)
