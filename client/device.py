"""The device a site trains on."""

from __future__ import annotations

import torch

from common.errors import SiteError


def pick_device(wish: str) -> torch.device:
    """The device to train on; "auto" is CUDA when there is one. `SiteError` if the wish cannot be met."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SiteError("site.toml asks for CUDA and PyTorch finds no such device", fix='set device = "auto"')
    return device
