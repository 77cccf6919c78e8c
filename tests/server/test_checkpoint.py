import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import ExitCode, OutputError
from common.schema import parse_schema
from common.study import Protocol, Study
from server.checkpoint import build_decoder, load_checkpoint, save_checkpoint
from tests.disk import full_disk


def make_protocol(name: str = "s", mode: str = "constrained", hidden: tuple[int, ...] = (8, 8)) -> Protocol:
    study: dict[str, Any] = {
        "study": {"name": name, "schema": "schema.json"},
        "model": {"latent_dim": 3, "hidden": hidden, "decoder_lipschitz": 12.0},
        "training": {"mode": mode},
    }
    field = {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}}
    return Protocol(Study.model_validate(study), parse_schema({"fields": [field]}))


PROTOCOL = make_protocol()


def test_the_start_is_orthogonal_within_its_bound_and_follows_the_seed() -> None:
    first, again, other = (build_decoder(PROTOCOL, seed).arrays() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.layers.0.weight"], other["network.layers.0.weight"])
    share = (12.0 / 5.0) ** (1 / 3)
    for name, array in first.items():
        if name.endswith("weight"):
            singular = np.linalg.svd(array.numpy().astype(np.float64), compute_uv=False)
            np.testing.assert_allclose(singular, share, rtol=1e-5)
            assert singular.max() <= share
    assert build_decoder(PROTOCOL, 1).certificate() <= 12.0


def test_without_a_seed_every_start_is_another_one() -> None:
    one, two = (build_decoder(PROTOCOL).arrays()["network.layers.0.weight"] for _ in range(2))
    assert not torch.equal(one, two)


def test_the_reference_mode_has_no_bound_to_keep() -> None:
    decoder = build_decoder(make_protocol(mode="none"), 0)
    assert decoder.network.bounds == [None, None, None]


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    path, decoder = tmp_path / "out" / "decoder.safetensors", build_decoder(PROTOCOL, 5)
    save_checkpoint(path, PROTOCOL, 1, build_decoder(PROTOCOL, 4))
    save_checkpoint(path, PROTOCOL, 7, decoder)
    found = load_checkpoint(path, PROTOCOL)
    assert (found.study, found.round) == (PROTOCOL.digest, 7)
    assert all(torch.equal(a, found.decoder.arrays()[n]) for n, a in decoder.arrays().items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_decoder_of_another_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decoder.safetensors"
    save_checkpoint(path, PROTOCOL, 1, build_decoder(PROTOCOL, 5))
    with pytest.raises(OutputError, match="belongs to another study") as caught:
        load_checkpoint(path, make_protocol("another"))
    assert caught.value.exit_code is ExitCode.OUTPUT
    with pytest.raises(OutputError, match="not a decoder checkpoint of this study"):
        load_checkpoint(path, make_protocol("another", hidden=(8, 8, 8)))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "folder", "no header", "odd header"])
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    path, decoder = tmp_path / "decoder.safetensors", build_decoder(PROTOCOL, 5)
    save_checkpoint(path, PROTOCOL, 1, decoder)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a safetensors file")
    elif damage == "no header":
        save_file(decoder.arrays(), path)
    elif damage == "odd header":
        save_file(decoder.arrays(), path, metadata={"cohortium": "[1]"})
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(OutputError) as caught:
        load_checkpoint(path, PROTOCOL)
    assert str(path) in str(caught.value) and "not a decoder checkpoint" in str(caught.value)


def test_an_array_of_another_shape_is_not_stretched_to_fit(tmp_path: Path) -> None:
    path, arrays = tmp_path / "decoder.safetensors", build_decoder(PROTOCOL, 5).arrays()
    header = json.dumps({"study": PROTOCOL.digest, "round": 1})
    save_file(arrays | {"network.layers.0.bias": torch.ones(1)}, path, metadata={"cohortium": header})
    with pytest.raises(OutputError, match="not a decoder checkpoint"):
        load_checkpoint(path, PROTOCOL)


def test_a_full_disk_leaves_the_last_round_whole(tmp_path: Path) -> None:
    path, decoder = tmp_path / "decoder.safetensors", build_decoder(PROTOCOL, 5)
    save_checkpoint(path, PROTOCOL, 1, decoder)
    with full_disk(512), pytest.raises(OutputError, match="cannot be written"):
        save_checkpoint(path, PROTOCOL, 2, build_decoder(PROTOCOL, 6))
    found = load_checkpoint(path, PROTOCOL)
    assert found.round == 1 and all(torch.equal(a, found.decoder.arrays()[n]) for n, a in decoder.arrays().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
