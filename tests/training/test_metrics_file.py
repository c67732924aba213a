import json
import os
import resource
from pathlib import Path

import pytest

from training.metrics_file import MetricsFile, MetricsTail


def steps(directory: Path) -> list[int]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_resume_takes_back_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsFile(tmp_path, position=None) as metrics:
        metrics.log({"train/loss": 1.0}, step=1, epoch=0.5)
        metrics.log({"train/loss": 0.9}, step=2, epoch=1.0)
        position = metrics.position()
        metrics.log({"train/loss": 0.8}, step=3, epoch=1.5)
    with MetricsFile(tmp_path, position=position) as metrics:
        metrics.log({"train/loss": 0.8}, step=3, epoch=1.5)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_fresh_start_keeps_no_old_lines(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsFile(tmp_path, position=None) as metrics:
            metrics.log({"train/loss": 1.0}, step=1, epoch=1.0)
    assert steps(tmp_path) == [1]


def test_lines_wait_for_space_on_a_full_disk_and_none_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsFile(tmp_path, position=None) as metrics:
        metrics.log({"train/loss": 1.0}, step=1, epoch=0.25)
        try:  # room for half a line more
            size = (tmp_path / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
            metrics.log({"train/loss": 1.0}, step=2, epoch=0.5)
            metrics.log({"train/loss": 1.0}, step=3, epoch=0.75)
            with pytest.raises(OSError, match="too large"):
                metrics.position()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caplog.text.count("wait for better times") == 1
        metrics.log({"train/loss": 1.0}, step=4, epoch=1.0)
        assert steps(tmp_path) == [1, 2, 3, 4]
        assert metrics.position() == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_file_shorter_than_the_checkpoint_says_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsFile(tmp_path, position=None) as metrics:
        metrics.log({"train/loss": 1.0}, step=1, epoch=1.0)
        position = metrics.position()
    os.truncate(tmp_path / "metrics.jsonl", 10)
    with MetricsFile(tmp_path, position=position):
        assert f"has 10 bytes, the checkpoint counted {position}" in caplog.text


def test_a_reader_meanwhile_gets_every_row_once_and_all_again_after_a_cut(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path)
    assert tail.new_rows() == []
    with MetricsFile(tmp_path, position=None) as metrics:
        metrics.log({"train/loss": 1.0}, step=1, epoch=0.5)
        position = metrics.position()
        metrics.log({"train/loss": 0.9}, step=2, epoch=1.0)
        assert [row["step"] for row in tail.new_rows()] == [1, 2]
        metrics.log({"train/loss": 0.8}, step=3, epoch=1.5)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "half')  # of a line that is being written
    assert [row["step"] for row in tail.new_rows()] == [3]
    assert tail.new_rows() == []
    with MetricsFile(tmp_path, position=position) as metrics:  # a resume, with a longer line
        metrics.log({"train/loss": 0.123456789, "train/lr": 0.01}, step=2, epoch=1.0)
        metrics.log({"train/loss": 0.123456789, "train/lr": 0.01}, step=3, epoch=1.5)
    assert [row["step"] for row in tail.new_rows()] == [1, 2, 3]
