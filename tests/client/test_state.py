import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from client.state import SiteState, StateError, load_state, save_state
from common.errors import OutputError, SiteError
from tests.disk import full_disk

STUDY = "a" * 64


def state(number: int = 3, size: int = 5) -> SiteState:
    generator = torch.Generator().manual_seed(number)
    return SiteState(
        round=number,
        base="b" * 64,
        trainer={
            "encoder.network.layers.0.weight": torch.randn(size, 4, generator=generator),
            "adam.step.x": torch.tensor(17.0),  # Adam's step counter has no dimension
        },
        reply={"network.layers.0.weight": torch.randn(4, size, generator=generator).T, "head.base": torch.zeros(0)},
    )


def assert_equal(left: SiteState, right: SiteState) -> None:
    assert (left.round, left.base) == (right.round, right.base)
    for mine, other in ((left.trainer, right.trainer), (left.reply, right.reply)):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype and mine[name].shape == other[name].shape
            assert torch.equal(mine[name], other[name])


def test_a_site_without_a_file_starts_fresh(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state.safetensors", STUDY) == SiteState(0, "", {}, {})


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "studies" / "x" / "state.safetensors"
    save_state(path, STUDY, state())
    assert_equal(load_state(path, STUDY), state())
    save_state(path, STUDY, state(4))
    assert_equal(load_state(path, STUDY), state(4))
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped header", "text", "other study", "folder"])
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, STUDY, state())
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped header":
        path.write_bytes(bytes([content[0] ^ 0xFF]) + content[1:])
    elif damage == "text":
        path.write_text("not a safetensors file")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    study = "c" * 64 if damage == "other study" else STUDY
    with pytest.raises(StateError) as caught:
        load_state(path, study)
    assert str(path) in str(caught.value) and "damaged or belongs to another study" in str(caught.value)
    assert isinstance(caught.value, SiteError)


def test_a_file_without_our_header_or_with_foreign_sections_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    save_file({"trainer/x": torch.zeros(1)}, path)
    with pytest.raises(StateError):
        load_state(path, STUDY)
    header = f'{{"study": "{STUDY}", "round": 1, "base": ""}}'
    save_file({"optimiser/x": torch.zeros(1)}, path, metadata={"cohortium": header})
    with pytest.raises(StateError):
        load_state(path, STUDY)
    save_file({"trainer/x": torch.zeros(1)}, path, metadata={"cohortium": "[]"})
    with pytest.raises(StateError):
        load_state(path, STUDY)


def test_a_full_disk_leaves_the_old_state_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, STUDY, state())
    with full_disk(4096), pytest.raises(OutputError, match="cannot be written"):
        save_state(path, STUDY, state(4, size=5000))
    assert_equal(load_state(path, STUDY), state())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_state(tmp_path / "file" / "state.safetensors", STUDY, state())


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    program = f"""
import sys, torch
from pathlib import Path
from client.state import SiteState, save_state
number = 0
while True:
    number += 1
    weights = {{"w": torch.full((200_000,), float(number))}}
    save_state(Path({str(path)!r}), {STUDY!r}, SiteState(number, "", weights, {{}}))
    if number == 1:
        print("saved", flush=True)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for delay in (0.0, 0.013, 0.037):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"saved\n"
            signal.sigtimedwait([signal.SIGUSR2], delay)  # waits; nobody sends it
            writer.kill()
        found = load_state(path, STUDY)
        assert found.round >= 1
        assert torch.equal(found.trainer["w"], torch.full((200_000,), float(found.round)))
