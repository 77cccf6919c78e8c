"""The variational autoencoder: an encoder that never leaves its site, a decoder that travels as projected updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.encoding import TableEncoding
from common.errors import CertificateError
from common.model.head import ObservationHead
from common.model.lipschitz import LipschitzMLP
from common.study import ModelSection

# Log-variances outside this range have no meaning for a N(0, I) prior and would overflow float32 in the KL term.
LOG_VARIANCE_RANGE = (-12.0, 6.0)
# q(z|x) starts narrower than the prior, so that the first steps see which code belongs to which row.
LOG_VARIANCE_START = -1.0


class Decoder(nn.Module):
    """g: z (n, latent_dim) → θ (n, head width), certified; and the observation head that reads θ."""

    def __init__(
        self,
        encoding: TableEncoding,
        model: ModelSection,
        generator: torch.Generator | None = None,
        *,
        constrained: bool = True,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.head = ObservationHead(encoding.blocks, model.logit_scale)
        self.network = LipschitzMLP(
            (model.latent_dim, *model.hidden, self.head.width),
            model.decoder_lipschitz if constrained else None,
            output_scale=torch.full((self.head.width,), model.logit_scale),
            generator=generator,
            initialise=initialise,
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Natural parameters θ of the observation model."""
        return self.network(latent)

    @property
    def size(self) -> int:
        """Number of parameters: the dimension of an update."""
        return sum(parameter.numel() for parameter in self.parameters())

    def arrays(self) -> dict[str, Tensor]:
        """The decoder's parameters by name, detached copies on the CPU in float32: what messages carry."""
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self.named_parameters()}

    @torch.no_grad()
    def load_arrays(self, arrays: Mapping[str, Tensor]) -> None:
        """Take over parameters by name; shapes must have been checked."""
        for name, parameter in self.named_parameters():
            parameter.copy_(arrays[name])

    def certificate(self) -> float:
        """Upper bound of the Lipschitz constant of z ↦ θ, logit_scale included."""
        return self.network.certificate()

    def require_certificate(self, bound: float) -> float:
        """The certificate, or `CertificateError` if it exceeds `bound`."""
        value = self.certificate()
        if not value <= bound:
            raise CertificateError(
                f"the decoder's Lipschitz certificate is {value:.6g}, the study declares at most {bound:.6g}",
                fix="this is a defect of the software or a tampered checkpoint; do not use this decoder",
            )
        return value


class Encoder(nn.Module):
    """x (n, input_width) → mean and log-variance of q(z | x), each (n, latent_dim); never leaves the site."""

    def __init__(
        self,
        encoding: TableEncoding,
        model: ModelSection,
        generator: torch.Generator | None = None,
        *,
        constrained: bool = True,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.network = LipschitzMLP(
            (encoding.input_width, *model.hidden, 2 * model.latent_dim),
            model.encoder_lipschitz if constrained else None,
            generator=generator,
            initialise=initialise,
        )

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance."""
        mean, log_variance = self.network(inputs).chunk(2, dim=-1)
        return mean, (log_variance + LOG_VARIANCE_START).clamp(*LOG_VARIANCE_RANGE)


def negative_elbo(
    encoder: Encoder,
    decoder: Decoder,
    inputs: Tensor,
    levels: Tensor,
    kl_weight: float,
    generator: torch.Generator | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """-ELBO in nats per row, shape (n,): reconstruction plus kl_weight · KL(q(z|x) ‖ N(0, I)), one latent sample.

    `base` (n, len(decoder.head.base)), if given, is the observation head's base for every row; see its `logits`.
    """
    mean, log_variance = encoder(inputs)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    latent = mean + noise * torch.exp(0.5 * log_variance)
    reconstruction = decoder.head.negative_log_likelihood(decoder(latent), levels, base)
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0).sum(dim=-1)
    return reconstruction + kl_weight * divergence
