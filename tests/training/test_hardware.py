import os
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, cast

import pytest
import sklearn.neighbors  # noqa: F401  (it brings the pools that are looked for)
import threadpoolctl
import torch

from data.splits import Subset
from models.vit import build_vit
from training import hardware
from training.configure import build_settings
from training.hardware import Hardware, decide, decide_once, keeps_images
from training.settings import ConfigError, HardwareSettings
from training.stage_files import OutputsError

COMPILED = Hardware(device="cpu", precision="float32", compile=True, threads=1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma avx2", "float32"),
        ("avx2 avx512f avx512_vnni", "float32"),
        ("avx2 avx512_bf16", "bfloat16"),
        ("amx_bf16 amx_tile", "bfloat16"),
    ],
)
def test_bfloat16_is_taken_on_cpu_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    monkeypatch.setattr(hardware, "_cpu_info", lambda field: f" {flags}" * (field == "flags"))
    found = decide(HardwareSettings(device="cpu"))
    assert (found.device, found.precision) == ("cpu", expected)


def test_what_is_set_is_taken() -> None:
    settings = HardwareSettings(device="cpu", precision="bfloat16", threads=3)
    found = decide(settings)
    assert (found.precision, found.threads) == ("bfloat16", 3)


def test_a_resume_decides_as_the_first_attempt_did(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        first = HardwareSettings(device="cpu", precision="bfloat16", threads=1)
        decided = decide_once(tmp_path, first)
        later = decide_once(tmp_path, HardwareSettings(device="cpu"))
        assert later == decided
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_resume_takes_the_gpu_that_the_first_attempt_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    try:
        first = decide_once(tmp_path, HardwareSettings(precision="float32"))
        assert first.device == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        wanted = HardwareSettings(device="cpu", precision="float32")
        assert decide_once(tmp_path, wanted) == first
        assert not caplog.records
        later = decide_once(tmp_path, HardwareSettings())
        assert (later.device, later.precision) == ("cuda", "bfloat16")
        assert "Started without a GPU" in caplog.text
        caplog.clear()
        assert decide_once(tmp_path, HardwareSettings()) == later
        assert not caplog.records
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("precision", "image_size", "expected"),
    [("bfloat16", 32, "eager"), ("bfloat16", 64, "sdpa"), ("float32", 32, "sdpa")],
)
def test_attention_is_written_out_where_a_processor_trains_short_sequences_in_bfloat16(
    precision: Literal["float32", "bfloat16"], image_size: int, expected: str
) -> None:
    """65 and 257 tokens; both forms give the same answers but for rounding, and export alike."""
    sizes = (image_size, 4, 12, 1, 3, 2, 0.0)
    model = build_vit(*sizes, num_labels=2, label_names=("0", "1"), seed=0)
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, exported = model(pixels).logits, model.config.to_dict()
        Hardware(device="cpu", precision=precision, compile=False, threads=1).place(model)
        torch.testing.assert_close(model(pixels).logits, before, rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == expected
    assert model.config.to_dict() == exported


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("3", 3), (" 2,1 ", 2), ("99", 5), ("0", 5), ("", 5), ("many", 5), ("-1", 5)],
)
def test_fewer_threads_than_processors_are_taken_where_openmp_is_told_so(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: int
) -> None:
    monkeypatch.setattr(hardware, "available_processors", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert decide(HardwareSettings(device="cpu")).threads == expected
    assert decide(HardwareSettings(device="cpu", threads=7)).threads == 7


def test_numpy_and_scikit_learn_compute_on_as_many_threads_as_torch(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        with threadpoolctl.threadpool_limits(2):
            decide_once(tmp_path, HardwareSettings(device="cpu", threads=1))
            pools = threadpoolctl.threadpool_info()
            assert {pool["user_api"] for pool in pools} == {"blas", "openmp"}
            assert {pool["num_threads"] for pool in pools} == {1}
    finally:
        torch.set_num_threads(threads)


def test_autocast_computes_in_the_precision_that_was_decided() -> None:
    layer = torch.nn.Linear(3, 5)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        settings = HardwareSettings.model_validate({"device": "cpu", "precision": precision})
        with decide(settings).autocast():
            assert layer(torch.zeros(2, 3)).dtype == dtype


def test_a_damaged_decision_is_not_guessed_anew(tmp_path: Path) -> None:
    (tmp_path / "hardware.json").write_bytes(b'{"device": "cp')
    with pytest.raises(OutputsError, match=r"hardware\.json must say"):
        decide_once(tmp_path, HardwareSettings(device="cpu"))


@pytest.mark.parametrize("wanted", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_network_is_compiled_where_that_is_wanted(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was compiled is kept where the next process finds it."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = decide(HardwareSettings(device="cpu", compile=wanted), operations=0)
    model = torch.nn.Linear(3, 2)
    called = found.for_training(model, cache=tmp_path / "cache")
    assert isinstance(called, torch._dynamo.OptimizedModule) == wanted
    assert list(model.state_dict()) == ["weight", "bias"], "names in checkpoints stay"
    called(torch.ones(5, 3)).sum().backward()
    assert (tmp_path / "cache").is_dir() == wanted


def test_the_users_own_folder_for_compiled_code_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    COMPILED.for_training(torch.nn.Linear(3, 2), cache=tmp_path / "cache")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("device", "operations", "compiled"),
    [
        ("cuda", 0.9e17, False),
        ("cuda", 1.1e17, True),
        ("cuda", None, False),  # a stage that trains no network
        ("cpu", 1e20, False),
    ],
)
def test_a_long_training_on_a_gpu_is_compiled(
    monkeypatch: pytest.MonkeyPatch, device: str, operations: float | None, compiled: bool
) -> None:
    monkeypatch.setattr(hardware, "_missing_to_compile", lambda device: "")
    settings = HardwareSettings.model_validate({"device": device, "precision": "bfloat16"})
    assert decide(settings, operations=operations).compile == compiled


@pytest.mark.parametrize(("preset", "images"), [("drawn", 3_000), ("imagenet", 1_153_050)])
def test_the_mission_is_long_enough_to_compile_and_the_demo_is_not(
    monkeypatch: pytest.MonkeyPatch, preset: str, images: int
) -> None:
    monkeypatch.setattr(hardware, "_missing_to_compile", lambda device: "")
    settings = build_settings(
        preset, overrides=["hardware.device=cuda", "hardware.precision=bfloat16"]
    )
    passes = 3 * 4 * images * settings.pretrain.epochs
    operations = passes * settings.model.operations_per_image
    found = decide(settings.hardware, operations=operations)
    assert found.compile == (preset == "imagenet")


def test_the_missions_network_takes_the_operations_that_its_matrices_say() -> None:
    assert build_settings("imagenet").model.operations_per_image == pytest.approx(5.329e9, rel=1e-3)
    narrow = build_settings("imagenet", overrides=["model.mlp_ratio=2"])
    assert narrow.model.operations_per_image == pytest.approx(3.635e9, rel=1e-3)


@pytest.mark.parametrize("lacking", ["compiler", "headers"])
def test_without_what_compiling_needs_auto_does_without_and_true_says_what(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str
) -> None:
    compiler = tmp_path / "c++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler if lacking == "headers" else tmp_path / "none"))
    (tmp_path / "Python.h").touch()
    include = tmp_path / "include" if lacking == "headers" else tmp_path
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(include))
    wanted = HardwareSettings(device="cpu", compile=True)
    automatic = HardwareSettings(device="cuda", precision="bfloat16")
    monkeypatch.setattr(hardware, "find_spec", lambda name: "triton")
    monkeypatch.setenv("CC", os.environ["CXX"])
    assert not decide(automatic, operations=1e20).compile
    words = {"compiler": r"a compiler \(.*none\)", "headers": "Python's headers"}[lacking]
    with pytest.raises(ConfigError, match=rf"hardware\.compile=true needs {words}.*=auto"):
        decide(wanted, operations=0)
    assert not decide(wanted).compile, "nothing is trained, nothing is needed"


def test_a_resume_without_the_compiler_that_was_there_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = HardwareSettings(device="cpu", threads=torch.get_num_threads(), compile=True)
    lacking = ""
    monkeypatch.setattr(hardware, "_missing_to_compile", lambda device: lacking)
    assert decide_once(tmp_path, settings, operations=1e20).compile
    assert decide_once(tmp_path, settings).compile, "the stored decision"
    assert not caplog.records
    lacking = "a compiler"
    for same_or_other in (settings, settings.model_copy(update={"compile": "auto"})):
        caplog.clear()
        assert not decide_once(tmp_path, same_or_other, operations=1e20).compile
        assert "goes on without" in caplog.text


IMAGES = cast(Subset, SimpleNamespace(nbytes=1000))


@pytest.mark.parametrize(
    ("wanted", "free", "kept"),
    [("auto", 2600, True), ("auto", 2400, False), (True, 1000, True), (False, 10**9, False)],
)
def test_images_are_kept_on_a_gpu_where_they_take_little_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, wanted: str | bool, free: int, kept: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    settings = HardwareSettings.model_validate({"data_on_device": wanted})
    assert keeps_images(settings, torch.device("cuda"), images=IMAGES) == kept
    assert keeps_images(settings, torch.device("cpu"), images=IMAGES) == (wanted is True)


def test_images_that_do_not_fit_and_are_to_be_kept_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (999, 10**9))
    with pytest.raises(ConfigError, match=r"data_on_device=true needs .* Set hardware"):
        keeps_images(HardwareSettings(data_on_device=True), torch.device("cuda"), images=IMAGES)
