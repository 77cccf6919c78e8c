"""`cohortium report`: the same page from the files of a run, which stay as they were signed."""

import json
import shutil
from pathlib import Path

import pytest

from common.errors import DataError, OutputError, VerifyError
from server.release import release_simulation, verify_release
from server.report.again import documents_of, report_again
from server.report.page import render
from tests.server.report.documents import Tree
from tests.server.report.test_page import GATES, audit_of
from tests.server.test_release import make_protocol, make_result, make_table


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("again") / "run"
    protocol = make_protocol()
    release_simulation(make_result(out, protocol), make_table(protocol, 80, 2), thorough=False)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def unsigned(run: Path) -> Path:
    (run / "manifest.dsse.json").unlink()
    return run


def test_it_is_the_signed_page_but_for_saying_that_it_is_not(run: Path, tmp_path: Path) -> None:
    written = report_again(run, tmp_path / "again.html", None, None)
    again, signed = (path.read_text() for path in (written, run / "report.html"))
    assert "which are as they were signed. This page itself is not signed" in again
    note = again[again.index('<p class="note">Rendered again') :].split("</p>\n", 1)[0] + "</p>\n"
    assert again.replace(note, "") == signed
    verify_release(run, None)


def test_by_default_it_lies_in_the_working_directory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report_again(run, None, None, None) == Path("run-report.html") and Path("run-report.html").exists()


def test_it_never_lies_beside_a_manifest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("report.html", "other.html"):
        with pytest.raises(OutputError, match="folder of a signed release"):
            report_again(run, run / name, None, None)
    monkeypatch.chdir(run)
    with pytest.raises(OutputError, match="folder of a signed release"):
        report_again(run, None, None, None)
    verify_release(run, None)


def test_a_changed_file_is_named_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    (run / "metrics.json").write_text((run / "metrics.json").read_text().replace("0.", "0.9", 1))
    with pytest.raises(VerifyError, match=r"metrics\.json"):
        report_again(run, tmp_path / "again.html", None, None)
    assert not (tmp_path / "again.html").exists()


def test_without_a_manifest_it_says_that_nobody_signed(run: Path, tmp_path: Path) -> None:
    page = report_again(unsigned(run), tmp_path / "again.html", None, None).read_text()
    assert "which nobody signed" in page


@pytest.mark.parametrize("name", ["study.json", "sites.json", "rounds.jsonl", "privacy.json"])
def test_a_folder_that_lacks_a_file_is_no_run(run: Path, name: str) -> None:
    (unsigned(run) / name).unlink()
    with pytest.raises(DataError, match=rf"not a finished run: it has no {name}"):
        documents_of(run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", "{", "not JSON"),
        ("metrics.json", "[]", "not a JSON object"),
        ("metrics.json", '{"schema_version": 1}', "version 1, expected 2"),
        ("study.json", "{}", "not the protocol of a study"),
        ("rounds.jsonl", "x", "not one JSON object a line"),
        ("rounds.jsonl", "", "has no round"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, text: str, message: str) -> None:
    (unsigned(run) / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        documents_of(run)
    assert name in caught.value.message


def test_an_audit_of_the_study_is_shown_and_of_another_one_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(audit_of("infinity").model_dump_json())
    with pytest.raises(DataError, match="of another study: digest dddddddddddd"):
        documents_of(run, audit=path)
    audit = audit_of("infinity").model_dump(mode="json") | {"study_digest": make_protocol().digest}
    path.write_text(json.dumps(audit))
    page = report_again(run, tmp_path / "again.html", path, None).read_text()
    assert "ε ≥ 0.40" in page and "from the files of the run with an audit" in page
    path.write_text(json.dumps({"lines": []}))
    with pytest.raises(DataError, match="not what `cohortium audit` writes"):
        documents_of(run, audit=path)
    with pytest.raises(DataError, match="cannot be read"):
        documents_of(run, compare=tmp_path / "none.json")


def test_a_folder_without_metrics_is_a_deployment_s_and_gates_are_read(run: Path) -> None:
    (unsigned(run) / "metrics.json").unlink()
    (run / "gates.json").write_text(json.dumps(GATES))
    text = Tree(render(documents_of(run))).text
    assert "a consortium that its files do not name" in text and "Gates failed: minimum patients" in text
