"""Synthetic rows made at the site: its own encoder, Gaussian noise, the global decoder (privacy.md, section 2).

x → μ(x) → z = Π_R μ(x) + σ_z ξ → x̃ ~ p(· | g(s z)). The encoder's certificate and the radius R are enforced here,
whatever training did; what happens behind the noise, the public scale s included, is post-processing. Nothing in this
file compares a synthetic row with a patient: that would be a query.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.encoding import EncodedTable, TableEncoding
from common.errors import CertificateError
from common.generation import BATCH_ROWS, decode_latent
from common.model.vae import Decoder, Encoder
from common.privacy.channel_release import latent_scale
from common.privacy.events import ChannelRelease
from common.privacy.noise import RandomNumbers
from common.study import Study

# In a seeded simulation these streams must differ from each other and from those of the training.
CHANNEL_STREAM, DECODING_STREAM, ENCODER_STREAM = 0x6368616E, 0x6465636F, 0x656E636F
SYNTHETIC_BATCH, SYNTHETIC_STEPS, SYNTHETIC_RATE = 256, 1000, 2e-3


@dataclass(frozen=True)
class ChannelInputs:
    """What a release is made from. `data` holds the patients of the release role and no others.

    `seed=None` draws everything from the operating system; a seed is for simulations, whose ε is then "as if".
    """

    study: Study
    encoding: TableEncoding
    data: EncodedTable
    encoder: Encoder
    decoder: Decoder
    event: ChannelRelease
    seed: int | None


def channel_rows(inputs: ChannelInputs) -> NDArray[np.float64]:
    """The release: `event.rows` synthetic rows, float64 (rows, columns), NaN for missing; checked against the schema.

    Each row draws one patient of the release role uniformly and independently. `CertificateError` if the encoder
    cannot be brought within its bound.
    """
    event, patients = inputs.event, len(inputs.data)
    if patients != event.patients:
        raise ValueError(f"the event counts {event.patients} patients, the table has {patients}")
    random = RandomNumbers(None if inputs.seed is None else inputs.seed ^ CHANNEL_STREAM)
    codes = bounded_codes(inputs.encoder, inputs.data, inputs.study)
    drawn = np.minimum((random.uniform(event.rows) * patients).astype(np.int64), patients - 1)
    noise = random.normal(event.rows * codes.shape[1]).reshape(event.rows, -1)
    latent = codes[drawn] + event.latent_noise * noise
    latent = torch.from_numpy(latent * latent_scale(inputs.study, event.latent_noise)).to(torch.float32)
    seed = secrets.randbits(63) if inputs.seed is None else inputs.seed ^ DECODING_STREAM
    generator, uniform = torch.Generator().manual_seed(seed), np.random.Generator(np.random.PCG64(seed))
    parts = [decode_latent(inputs.decoder, inputs.encoding, z, generator, uniform) for z in latent.split(BATCH_ROWS)]
    return np.vstack([part.values for part in parts])


@torch.no_grad()
def bounded_codes(encoder: Encoder, data: EncodedTable, study: Study) -> NDArray[np.float64]:
    """Π_R μ(x) of every patient, float64 (n, latent_dim); the encoder is brought within its declared bound first.

    In double precision, so that rounding cannot push two codes further apart than T3's Δ by more than 1e-12.
    """
    bound, radius = study.model.encoder_lipschitz, study.channel.latent_radius
    encoder = encoder.cpu().eval()
    encoder.network.project(exact=True)
    if not encoder.network.certificate() <= bound:
        raise CertificateError(
            "the encoder cannot be brought within its Lipschitz bound", fix="this is a defect; nothing was released"
        )
    mean = encoder.double()(data.inputs.double())[0].numpy()
    if not np.isfinite(mean).all():
        raise CertificateError("the encoder's codes are not finite", fix="this is a defect; nothing was released")
    norms = np.linalg.norm(mean, axis=1, keepdims=True)
    return mean * np.minimum(1.0, radius * (1.0 - 1e-12) / np.maximum(norms, 1e-300))


def synthetic_encoder(decoder: Decoder, encoding: TableEncoding, study: Study, seed: int) -> Encoder:
    """A fresh encoder trained on samples of the decoder alone: it holds nothing of a patient that the decoder has not.

    Maximises E log q(z | x) over z ~ N(0, I) and rows x ~ p(· | g(z)), the "sleep" phase of Hinton, Dayan, Frey and
    Neal (1995), under the encoder's Lipschitz bound. No privacy rests on what is random here.
    """
    generator = torch.Generator().manual_seed(seed ^ ENCODER_STREAM)
    uniform = np.random.Generator(np.random.PCG64(seed ^ ENCODER_STREAM))
    encoder = Encoder(encoding, study.model, generator)
    optimiser = torch.optim.Adam(encoder.parameters(), fused=True)
    for step in range(SYNTHETIC_STEPS):
        latent = torch.randn(SYNTHETIC_BATCH, study.model.latent_dim, generator=generator)
        inputs = encoding.encode(decode_latent(decoder, encoding, latent, generator, uniform)).inputs
        mean, log_variance = encoder(inputs)
        loss = 0.5 * ((latent - mean).square() * torch.exp(-log_variance) + log_variance).sum(dim=-1).mean()
        optimiser.param_groups[0]["lr"] = SYNTHETIC_RATE * 0.5 * (1.0 + math.cos(math.pi * step / SYNTHETIC_STEPS))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        encoder.network.project()
    encoder.network.project(exact=True)
    return encoder
