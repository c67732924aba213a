from pathlib import Path

from training import stage_files


def test_files_are_hashed_as_the_sha256_command_does(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # The test vector of FIPS 180-4.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert stage_files.sha256_of(tmp_path / "a") == expected
