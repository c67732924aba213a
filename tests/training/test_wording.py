"""How stages, scores, times and rates are said."""

import pytest

from training.wording import Pace, duration, scores_in_words


def test_pace_is_what_was_done_in_the_time_between_reports() -> None:
    pace = Pace()
    assert pace.words(0, 65, "steps") == ""
    pace.add(5.0, 30)
    assert pace.words(30, 65, "steps") == ""
    pace.add(7.0, 44)
    assert pace.per_second == 7
    assert pace.words(44, 65, "steps") == "7 steps/s, 3 s left"


def test_pace_leaves_out_what_was_done_before_a_resume() -> None:
    pace = Pace()
    pace.add(0.0, 1_000_000)
    pace.add(10.0, 1_000_030)
    assert pace.per_second == 3


def test_pace_follows_the_last_minute() -> None:
    pace = Pace()
    for second in range(300):
        pace.add(float(second), second * 100)
    for second in range(300, 400):
        pace.add(float(second), 30_000 + (second - 300) * 7)
    assert pace.per_second == pytest.approx(7)


def test_pace_starts_anew_when_the_count_goes_back() -> None:
    pace = Pace()
    pace.add(0.0, 50)
    pace.add(1.0, 60)
    pace.add(2.0, 20)
    pace.add(4.0, 30)
    assert pace.per_second == 5


def test_nothing_is_said_to_be_left_at_the_end() -> None:
    pace = Pace()
    pace.add(0.0, 0)
    pace.add(2.0, 3)
    assert pace.words(3, 3, "images") == "1.5 images/s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (86_399, "1 d 0 h"),
        (187_200, "2 d 4 h"),
    ],
)
def test_times_are_written_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_download_is_said_with_images_and_size() -> None:
    row = {"counts": {"train": 9469, "test": 3925}, "bytes": 341_600_000}
    assert scores_in_words("download", row) == "9,469 train, 3,925 test images, 342 MB"
    small = {"counts": {"train": 8}, "bytes": 131_400}
    assert scores_in_words("download_transfer", small) == "8 train images, 131 kB"
    assert scores_in_words("download", {"counts": {}, "bytes": 0}) == "nothing to download"


def test_frozen_tokens_are_said_with_their_size_and_whether_they_are_kept() -> None:
    row = {"kept": True, "images": 9469, "bytes": 1_958_643_712}
    assert scores_in_words("frozen_tokens", row) == "of 9,469 images, 1,959 MB"
    row["kept"] = False
    assert scores_in_words("frozen_tokens", row) == "of 9,469 images, 1,959 MB: too large to keep"
