"""Memory: what a study's table and training will need at this site, and the limit under which they run.

The estimate is a formula of the study and the number of patients; it counts what grows with them, and not the Python
process with its libraries (see docs/site-policy.md).
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from client.admission import RefusedError
from client.policy import PolicySection
from common.encoding import TableEncoding
from common.messages import Status
from common.model.vae import Decoder, Encoder
from common.study import Protocol

MEBIBYTE = 2**20
LARGEST_PIECE = 1024  # rows that the mode dpsgd works through at once
CELL_BYTES = 32  # a cell as text in Arrow and as a number
INPUT_BYTES = 8  # encoded float32, and its pieces before they are joined
LEVEL_BYTES = 18  # encoded int64, likewise
COPIES = 8  # of every weight: itself, gradient, two moments, state, update
ACTIVATIONS = {"dpsgd": 8}  # copies of every activation, forward and backward; in the other modes half of it


def needed_mb(protocol: Protocol, patients: int) -> int:
    """MiB for reading and encoding this many patients and for one training step on them, rounded up."""
    study, encoding = protocol.study, TableEncoding(protocol.schema)
    blocks, columns = len(encoding.blocks), len(protocol.schema.columns)
    table = patients * (CELL_BYTES * columns + INPUT_BYTES * encoding.input_width + LEVEL_BYTES * blocks)
    networks = (
        Encoder(encoding, study.model, initialise=False),
        Decoder(encoding, study.model, initialise=False),
    )
    weights = sum(parameter.numel() for network in networks for parameter in network.parameters())
    largest = LARGEST_PIECE if study.training.mode == "dpsgd" else study.training.batch_size
    levels = sum(block.size for block in encoding.blocks)
    width = encoding.input_width + 2 * sum(study.model.hidden) + 4 * study.model.latent_dim + 2 * levels
    step = ACTIVATIONS.get(study.training.mode, 4) * min(patients, largest) * width
    return -(-(table + 4 * (COPIES * weights + step)) // MEBIBYTE)


def require_memory(policy: PolicySection, protocol: Protocol, patients: int) -> None:
    """`RefusedError` with the numbers if the study needs more than `max_memory_mb`."""
    limit = policy.max_memory_mb
    if limit is not None and (needed := needed_mb(protocol, patients)) > limit:
        raise RefusedError(
            Status.REFUSED_BY_POLICY,
            f"the table of {patients} patients and training need about {needed} MiB, max_memory_mb is {limit}",
        )


@contextmanager
def memory_limit(policy: PolicySection, device: torch.device | None = None) -> Iterator[None]:
    """At most `max_memory_mb` more than the process holds now; work that needs more ends as `RefusedError`.

    On the CPU a soft RLIMIT_DATA, lifted afterwards; on CUDA PyTorch's share of the device.
    """
    limit = policy.max_memory_mb
    if limit is None:
        yield
        return
    message = f"the work needed more than max_memory_mb = {limit}; nothing of it was used"
    with _data_limit(limit * MEBIBYTE), _cuda_limit(limit * MEBIBYTE, device):
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise RefusedError(Status.REFUSED_BY_POLICY, message) from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # PyTorch's words on the CPU
                raise
            raise RefusedError(Status.REFUSED_BY_POLICY, message) from None


@contextmanager
def _data_limit(more: int) -> Iterator[None]:
    held = _held()
    if held is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [held + more] + [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _held() -> int | None:
    """Bytes that RLIMIT_DATA counts for this process now; None where Linux is not beneath."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)


@contextmanager
def _cuda_limit(most: int, device: torch.device | None) -> Iterator[None]:
    if device is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
