"""A tiny run of the scaling benchmark, and its arithmetic by hand."""

import json
import runpy
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}

TINY_PARAMETERS = (
    (3 * 8 * 8 * 32 + 32)  # patches to tokens
    + 32  # class token
    + 17 * 32  # positions
    + 4 * (32 * 32 + 32)  # attention: query, key, value, output
    + (32 * 128 + 128 + 128 * 32 + 32)  # MLP
    + 3 * 2 * 32  # norms: two of the block, the last one
    + (32 * 4 + 4)  # head
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("scaling_model")


@pytest.mark.slow
def test_two_processes_take_turns_with_one_and_their_gradients_are_counted() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/scaling.py", "--presets", "imagenet", "--blocks", "3"),
            *(word for name, value in TINY.items() for word in ("--set", f"model.{name}={value}")),
            *("--set", "hardware.precision=float32", "--gpu-rate", "20000"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gradient_bytes_imagenet"] == 4 * TINY_PARAMETERS
    assert found["gradient_buckets_imagenet"] == 1
    assert found["exchange_seconds_imagenet"] > 0
    for name in ("one", "two", "threads"):
        assert found[f"samples_per_second_{name}_imagenet"] > 0
    assert found["speedup_lowest_imagenet"] <= found["speedup_imagenet"]
    assert 0 < found["input_share_imagenet"] < 1
    # So small a step says nothing about speed; that the bound decides must be seen all the same.
    assert found["kept"] == (found["speedup_imagenet"] >= found["bound"])
    assert done.returncode == (0 if found["kept"] else 1), done.stderr

    assert found["assumptions"]["gradient_bytes"] == 4 * TINY_PARAMETERS
    assert found["assumptions"]["samples_per_second"] == 20_000
    places = {(row["network"], row["step"], row["gpus"]) for row in found["predictions"]}
    assert ("node", "divided", 8) in places
    assert ("ethernet-100", "grown", 512) in places
    assert ("infiniband-400", "divided", 512) not in places, "256 images are not 512 parts"


def test_rates_and_ratios_are_medians_of_rounds_without_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scaling: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    found = scaling["figures"](
        scaling["Case"](images_per_step=8, block=2, blocks=4),
        {
            "one": [9, 4.0, 2.0, 4.0],
            "two": [9, 2.0, 2.0, 2.5],
            "threads": [9, 1.0, 2.0, 2.5],
        },
        waits=[9, 1.0, 0.1, 0.4],
        traffic={"bytes": 1000, "buckets": 3, "seconds": [0.5, 0.1, 0.2]},
    )
    assert found["samples_per_second_one"] == 64 / 4
    assert found["samples_per_second_two"] == 64 / 2
    assert (found["speedup_lowest"], found["speedup"], found["speedup_highest"]) == (1, 1.6, 2)
    assert found["efficiency"] == 0.8
    assert (found["over_threads_lowest"], found["over_threads"]) == (0.5, 1)
    assert found["exchange_seconds"] == 0.2
    assert found["exchange_over_step"] == pytest.approx(0.2)
    assert found["input_share"] == pytest.approx(0.1)
    assert (found["gradient_bytes"], found["gradient_buckets"]) == (1000, 3)


def test_a_ring_passes_every_piece_twice_to_all_but_one(model: ModuleType) -> None:
    # Four members: six messages of 24 bytes, three seconds each, and half a second of hop.
    assert model.ring_seconds(96, 4, bandwidth=8, hop_seconds=0.5) == 21
    assert model.ring_seconds(96, 1, bandwidth=8, hop_seconds=0.5) == 0


@pytest.mark.parametrize("buckets", [1, 2, 5])
@pytest.mark.parametrize(("exchange", "backward"), [(1.0, 10.0), (4.0, 5.0), (6.0, 5.0), (9.0, 2)])
def test_what_is_left_of_an_exchange_is_what_sending_bucket_by_bucket_leaves(
    model: ModuleType, exchange: float, backward: float, buckets: int
) -> None:
    sent = 0.0
    for number in range(1, buckets + 1):
        ready = backward * number / buckets
        sent = max(ready, sent) + exchange / buckets
    left = model.exposed_seconds(exchange, backward, buckets)
    assert left == pytest.approx(sent - backward)


def test_steps_in_a_node_and_between_nodes_are_as_reckoned_by_hand(model: ModuleType) -> None:
    given = model.Assumptions(gradient_bytes=100e6, buckets=5, samples_per_second=20_000)
    network = model.NETWORKS["infiniband-400"]

    alone = model.predict(given, 1, 256, network)
    assert alone.exchange_seconds == alone.exposed_seconds == 0
    assert alone.efficiency == pytest.approx(51.2 / 53.2)

    # 128 samples on each: 6.4 ms, and 2 ms. Five times 14 messages of 2.5 MB at 360 GB/s: 8.94 µs.
    node = model.predict(given, 8, 256, network)
    assert node.samples == 1024
    assert node.compute_seconds == pytest.approx(8.4e-3)
    assert node.exchange_seconds == pytest.approx(626.1e-6, rel=1e-3)
    assert node.exposed_seconds == pytest.approx(125.2e-6, rel=1e-3), "the last bucket alone"
    assert node.efficiency == pytest.approx(6.4 / 8.5252, rel=1e-4)
    assert node.efficiency_without_overlap == pytest.approx(6.4 / 9.0261, rel=1e-4)
    assert node.samples_per_second == pytest.approx(1024 / 8.5252e-3, rel=1e-4)

    # 16 samples on each: 0.8 ms, 0.533 of it backward. 126 messages of 312.5 kB at 40 GB/s.
    nodes = model.predict(given, 64, 256, network)
    assert nodes.exchange_seconds == pytest.approx(8.071875e-3)
    assert nodes.exposed_seconds == pytest.approx(7.645208e-3)
    assert nodes.efficiency == pytest.approx(0.8 / 10.445208)

    with pytest.raises(ValueError, match="256, must be divisible by 512 GPUs"):
        model.predict(given, 512, 256, network)


def test_more_adapters_and_faster_networks_exchange_sooner(model: ModuleType) -> None:
    def exchange(network: str, **changes: Any) -> float:
        given = model.Assumptions(
            gradient_bytes=100e6, buckets=5, samples_per_second=20_000, **changes
        )
        seconds: float = model.predict(given, 64, 64, model.NETWORKS[network]).exchange_seconds
        return seconds

    times = [exchange(name) for name in model.NETWORKS]
    assert times == sorted(times)
    # NVLink's rate is the most that adapters add up to.
    times = [exchange("infiniband-400", adapters=count) for count in (1, 2, 8, 9, 20)]
    assert all(later < sooner for sooner, later in pairwise(times[:4]))
    assert times[4] == times[3]


def test_the_picture_of_sizes_is_made_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sizes = import_module("sizes")
    records = ("scaling.txt", "throughput.txt", "checkpoint_cost.txt")
    found = sizes.sizes(*map(sizes.last_line, records))
    assert [size.measured for size in found] == [True, False, False, False, False]
    for size in found:
        assert list(size.seconds) == list(sizes.PARTS)
        assert all(seconds >= 0 for seconds in size.seconds.values())
        assert sum(map(size.share, sizes.PARTS)) == pytest.approx(1)
    two_cores, gpu, node, divided, grown = found
    assert two_cores.share("gradient exchange") == gpu.share("gradient exchange") == 0
    assert divided.share("gradient exchange") > grown.share("gradient exchange")
    assert two_cores.total > gpu.total > node.total > grown.total
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [size for size in found if sizes.in_words(size.total) not in readme] == []
    figure = sizes.draw(found)
    (axes,) = figure.axes
    assert len(axes.patches) == len(found) * len(sizes.PARTS)
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert len(hatched) == 4 * len(sizes.PARTS), "all but the measured bar"


@pytest.mark.parametrize(
    ("seconds", "words"), [(40, "40 seconds"), (91, "1.52 minutes"), (2 * 86_400, "2 days")]
)
def test_times_are_said_in_the_unit_that_suits_them(
    monkeypatch: pytest.MonkeyPatch, seconds: float, words: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert import_module("sizes").in_words(seconds) == words
