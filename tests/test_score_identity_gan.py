"""The GAN term of few-step SiD: what both players minimise, and the student's gradient, by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.methods.sid_few_step import SiDFewStep
from tests.method_fakes import PROCESSES, FakePipeline, batches


def test_the_gan_by_hand() -> None:
    """Logits are the middle layer's mean over channels, of data and samples under one time and noise, given the prompt: half of
    -log of the right answers; and -log of being taken for real, each sample weighted by the identity's 1 / mean|x - x0 of the
    guided teacher|. On a flow."""
    pipeline = FakePipeline(PROCESSES["flow"], (3, 4, 4), "flow")
    method = SiDFewStep(gan_weight=0.3, critic_weight=0.8, guidance=2.0, prompt_dropout=0.0)
    method.setup(pipeline)  # type: ignore[arg-type]
    for weight in method.critic.fake.parameters():
        nn.init.normal_(weight, 0, 0.3)
    batch, x = next(batches(pipeline, 16)), torch.randn(16, 3, 4, 4, requires_grad=True)
    method.generate = lambda batch: x  # type: ignore[method-assign]
    assert batch.latents is not None and batch.condition.null is not None
    mask, null = batch.condition.inputs["components"], batch.condition.null.inputs["components"]

    def noised(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * eps

    def guided(network: nn.Module, xt: Tensor, t: Tensor) -> Tensor:
        yes, no = (network(xt, t, which, None) for which in (mask, null))
        return no + 2 * (yes - no)

    def chance(xt: Tensor, t: Tensor) -> Tensor:
        """That it is real, at each place."""
        features = method.critic.fake(xt, t, batch.condition, features=("middle",)).features
        assert features is not None
        return features["middle"].mean(1).flatten(1).sigmoid()

    torch.manual_seed(3)
    found = method.fake_loss(batch)
    torch.manual_seed(3)
    t, eps = 0.02 + 0.96 * torch.rand(16), torch.randn(16, 3, 4, 4)
    xt, real = noised(x.detach(), eps, t), noised(batch.latents, eps, t)
    score = (guided(method.critic.fake.network, xt, t) - (eps - x.detach())).square().mean()
    torch.testing.assert_close(found["score"], score, rtol=1e-4, atol=1e-5)
    gan = 0.8 / 2 * (-(1 - chance(xt, t)).log().mean() - chance(real, t).log().mean())
    torch.testing.assert_close(found["gan"], gan, rtol=1e-4, atol=1e-5)

    torch.manual_seed(3)
    found = method.student_loss(batch)
    xt = noised(x, eps, t)
    with torch.no_grad():
        gap = x - (xt - t.view(-1, 1, 1, 1) * guided(pipeline.base, xt, t))
    gan = 0.3 * (-chance(xt, t).log().mean(1) / gap.abs().mean((1, 2, 3))).mean()
    torch.testing.assert_close(found["gan"], gan, rtol=1e-4, atol=1e-5)
    pulls = [torch.autograd.grad(loss, x)[0] for loss in (found["gan"], gan)]
    assert pulls[0].abs().max() > 1e-4
    torch.testing.assert_close(*pulls, rtol=1e-3, atol=1e-7)
