from pathlib import Path

import pytest
import sklearn.neighbors  # noqa: F401  (it brings the pools that are looked for)
import threadpoolctl
import torch

from training import hardware
from training.hardware import decide, decide_once
from training.settings import HardwareSettings
from training.stage_files import OutputsError


def test_a_narrow_network_stays_in_float32_on_cpu() -> None:
    found = decide(HardwareSettings(device="cpu"), embed_dim=128)
    assert (found.device, found.precision) == ("cpu", "float32")


@pytest.mark.parametrize(("computes", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_wide_network_takes_bfloat16_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, computes: bool, expected: str
) -> None:
    monkeypatch.setattr(hardware, "_cpu_info", lambda field: " avx512_bf16" * computes)
    assert decide(HardwareSettings(device="cpu"), embed_dim=512).precision == expected


def test_what_is_set_is_taken() -> None:
    settings = HardwareSettings(device="cpu", precision="bfloat16", threads=3)
    found = decide(settings, embed_dim=16)
    assert (found.precision, found.threads) == ("bfloat16", 3)


def test_a_resume_decides_as_the_first_attempt_did(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        first = HardwareSettings(device="cpu", precision="bfloat16", threads=1)
        decided = decide_once(tmp_path, first, embed_dim=16)
        later = decide_once(tmp_path, HardwareSettings(device="cpu"), embed_dim=16)
        assert later == decided
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("3", 3), (" 2,1 ", 2), ("99", 5), ("0", 5), ("", 5), ("many", 5), ("-1", 5)],
)
def test_fewer_threads_than_processors_are_taken_where_openmp_is_told_so(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: int
) -> None:
    monkeypatch.setattr(hardware, "available_processors", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert decide(HardwareSettings(device="cpu"), embed_dim=16).threads == expected
    assert decide(HardwareSettings(device="cpu", threads=7), embed_dim=16).threads == 7


def test_numpy_and_scikit_learn_compute_on_as_many_threads_as_torch(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        with threadpoolctl.threadpool_limits(2):
            decide_once(tmp_path, HardwareSettings(device="cpu", threads=1), embed_dim=16)
            pools = threadpoolctl.threadpool_info()
            assert {pool["user_api"] for pool in pools} == {"blas", "openmp"}
            assert {pool["num_threads"] for pool in pools} == {1}
    finally:
        torch.set_num_threads(threads)


def test_autocast_computes_in_the_precision_that_was_decided() -> None:
    layer = torch.nn.Linear(3, 5)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        settings = HardwareSettings.model_validate({"device": "cpu", "precision": precision})
        with decide(settings, embed_dim=16).autocast():
            assert layer(torch.zeros(2, 3)).dtype == dtype


def test_a_damaged_decision_is_not_guessed_anew(tmp_path: Path) -> None:
    (tmp_path / "hardware.json").write_bytes(b'{"device": "cp')
    with pytest.raises(OutputsError, match=r"hardware\.json must say"):
        decide_once(tmp_path, HardwareSettings(device="cpu"), embed_dim=16)


@pytest.mark.parametrize("wanted", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_network_is_compiled_where_that_is_wanted(wanted: bool) -> None:
    found = decide(HardwareSettings(device="cpu", compile=wanted), embed_dim=16)
    model = torch.nn.Linear(3, 2)
    called = found.for_training(model)
    assert isinstance(called, torch._dynamo.OptimizedModule) == wanted
    assert list(model.state_dict()) == ["weight", "bias"], "names in checkpoints stay"
