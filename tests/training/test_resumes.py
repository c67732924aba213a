from pathlib import Path

import pytest

from training.resumes import note_start, read_resumes


def test_resumes_are_kept_in_order_and_those_undone_are_forgotten(tmp_path: Path) -> None:
    note_start(tmp_path, step=0, epoch=0.0)
    assert read_resumes(tmp_path) == []
    for step in (10, 10, 30, 40, 30):  # the same one again; from an older checkpoint
        note_start(tmp_path, step=step, epoch=step / 20)
    assert read_resumes(tmp_path) == [{"step": 10, "epoch": 0.5}, {"step": 30, "epoch": 1.5}]
    note_start(tmp_path, step=0, epoch=0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ['[{"step": 1', "[1]", '[{"epoch": 1}]', "7"])
def test_a_note_that_is_none_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "resumes.json").write_text(text)
    assert read_resumes(tmp_path) == []
    note_start(tmp_path, step=5, epoch=1.0)
    assert [resume["step"] for resume in read_resumes(tmp_path)] == [5]


def test_a_note_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    note_start(tmp_path / "file", step=5, epoch=1.0)
    assert "The resume at step 5 is not noted" in caplog.text
