"""The channel of a study at one site, in declared constants: who is drawn from, how much noise, what it spends.

Everything here is a function of the study, the schema's diameter and the number of patients, which is public.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import StudyError
from common.privacy.channel import calibrate_latent_noise, channel_sensitivity
from common.privacy.events import ChannelRelease
from common.privacy.holdout import participants
from common.study import Study


@lru_cache(maxsize=64)
def role_slots(digest: str, patients: int, release_share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The slots (row numbers, ascending) that train and those that release; without roles both are all of them.

    round(release_share · n) slots release: those whose SHA-256 of study digest and slot number is smallest. Never a
    function of what a slot holds, by which replacing a patient could move others between the roles (privacy.md,
    section 0). `StudyError` if a role would be empty.
    """
    everyone = np.arange(patients)
    if release_share == 0:
        return everyone, everyone
    released = release_patients(patients, release_share)
    order = sorted(range(patients), key=lambda slot: hashlib.sha256(f"{digest}/{slot}".encode()).digest())
    release = np.sort(np.asarray(order[:released], dtype=np.int64))
    return np.setdiff1d(everyone, release), release


def release_patients(patients: int, release_share: float) -> int:
    """How many patients the channel draws from; `StudyError` if the share leaves a role without patients."""
    if release_share == 0:
        return patients
    released = round(release_share * patients)
    if not 0 < released < patients:
        raise StudyError(
            f"[channel] release_share = {release_share:g} leaves {released} of {patients} patients to release and"
            f" {patients - released} to train",
            fix="choose a share that leaves patients for both, or 0 for no roles",
        )
    return released


def fit_patients(study: Study, patients: int) -> int:
    """How many of a site's n = `patients` train: those who are not held out and do not only release."""
    taking_part, share = participants(study, patients), study.channel.release_share
    return taking_part if share == 0 else taking_part - release_patients(taking_part, share)


def channel_event(study: Study, diameter: float, patients: int, rows: int) -> ChannelRelease:
    """What a release of `rows` rows spends at a site with n = `patients`; its noise is calibrated to [channel] epsilon.

    `diameter` is diam 𝒳 of the encoding. Only T3 is used: categories are sampled by softmax, which T4 does not cover.
    `StudyError` if the study has no channel, a role would be empty, or no noise reaches ε.
    """
    channel = study.channel
    if channel.epsilon is None:
        raise StudyError("[channel] epsilon is missing: the channel calibrates its noise to it", fix="set epsilon")
    drawn = release_patients(participants(study, patients), channel.release_share)
    sensitivity = channel_sensitivity(channel.latent_radius, study.model.encoder_lipschitz, diameter)
    try:
        noise = calibrate_latent_noise(channel.epsilon, study.privacy.delta, drawn, rows, sensitivity)
    except ValueError as error:
        raise StudyError(
            f"[channel] epsilon = {channel.epsilon:g} is out of reach for {rows} rows of {drawn} patients ({error})",
            fix="ask for a larger epsilon or fewer rows",
        ) from None
    return ChannelRelease(
        round=study.training.rounds + 1,
        rows=rows,
        patients=drawn,
        sensitivity=sensitivity,
        latent_noise=noise,
        observation_noise=0.0,
        decoder_lipschitz=study.model.decoder_lipschitz,
        all_coordinates_noised=False,
        role="all" if channel.release_share == 0 else "release",
        networks_accounted=networks_accounted(study),
    )


def networks_accounted(study: Study) -> bool:
    """Whether encoder and decoder come out of accounted mechanisms only (privacy.md, section 2, scope iii).

    DP-SGD trains both. Noise on the updates covers the decoder, and the encoder only if it is trained on the decoder's
    samples; a training encoder is fitted to patients without noise.
    """
    if study.training.mode == "dpsgd":
        return True
    return study.privacy.update_noise > 0 and study.channel.encoder == "synthetic"


def latent_scale(study: Study, latent_noise: float) -> float:
    """The public factor on a noised code before the decoder, which was trained on codes of variance 1: post-processing.

    1/√(min(1, R²/d) + σ_z²) for a d-dimensional code, whose variance in the ball of radius R is at most R²/d.
    """
    spread = min(1.0, study.channel.latent_radius**2 / study.model.latent_dim)
    return 1.0 / math.sqrt(spread + latent_noise**2)
