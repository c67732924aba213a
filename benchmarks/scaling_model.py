"""How a training that is divided among GPUs should scale: arithmetic on stated assumptions.

Nothing here is measured. Each GPU computes an equal part of every step and the gradients are
averaged by a ring all-reduce, bucket by bucket while the backward pass goes on, as
`DistributedDataParallel` does it (Li et al. 2020, https://arxiv.org/abs/2006.15704).
"""

from dataclasses import dataclass

from data.rotation import NUM_ROTATIONS
from training.loop import PASSES_PER_STEP

BACKWARD = (PASSES_PER_STEP - 1) / PASSES_PER_STEP
"""Part of a step's arithmetic that is its backward pass."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What the slowest link of a ring can do.

    Attributes:
        name: For tables.
        bytes_per_second: In one direction, as its maker states it.
        hop_seconds: Time until a message of no length has arrived.
    """

    name: str
    bytes_per_second: float
    hop_seconds: float


NVLINK = Link(name="NVLink 4", bytes_per_second=450e9, hop_seconds=2e-6)
"""Of each GPU of a node with NVSwitch (H100, H200)."""

NETWORKS = {
    "infiniband-400": Link(name="InfiniBand 400 Gb/s", bytes_per_second=50e9, hop_seconds=5e-6),
    "infiniband-200": Link(name="InfiniBand 200 Gb/s", bytes_per_second=25e9, hop_seconds=5e-6),
    "ethernet-100": Link(name="Ethernet 100 Gb/s", bytes_per_second=12.5e9, hop_seconds=10e-6),
}
"""One adapter of each node, by the name to choose it by."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the arithmetic is given.

    Attributes:
        gradient_bytes: Of one step.
        buckets: In which they are exchanged; taken as equal, and as filled at equal times.
        samples_per_second: Of one GPU, with a step that fills it; at any smaller step the same.
        step_seconds: Part of a step that no GPU gains by a smaller share of it: launches, update.
        gpus_per_node: Connected by NVLink; nodes are connected by `adapters` adapters each.
        adapters: Of each node, which share the bytes.
        link_share: Part of a link's stated rate that an all-reduce gets.
    """

    gradient_bytes: float
    buckets: int
    samples_per_second: float
    step_seconds: float = 0.002
    gpus_per_node: int = 8
    adapters: int = 1
    link_share: float = 0.8


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One step of a training on so many GPUs.

    Attributes:
        gpus: That divide it.
        samples: Of the step, in all.
        compute_seconds: Arithmetic, launches and update.
        exchange_seconds: The all-reduces, by themselves.
        exposed_seconds: What is left of them once they run beside the backward pass.
        efficiency: Samples per second over those of as many GPUs that never wait.
        efficiency_without_overlap: The same where the exchange waits for the backward pass.
    """

    gpus: int
    samples: int
    compute_seconds: float
    exchange_seconds: float
    exposed_seconds: float
    efficiency: float
    efficiency_without_overlap: float

    @property
    def samples_per_second(self) -> float:
        """Of all GPUs together, with overlap."""
        return self.samples / (self.compute_seconds + self.exposed_seconds)


def ring_seconds(size: float, count: int, bandwidth: float, hop_seconds: float) -> float:
    """Return the time of a ring all-reduce.

    Each of `count` members sends and receives 2 (count - 1) pieces of size / count, one after the
    other (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). NCCL takes trees
    where these are faster, which is where hops and not bytes take the time: an upper bound there.

    Args:
        size: In bytes, of what each of them has.
        count: Members; nothing is exchanged by one.
        bandwidth: Of the slowest link in the ring, in bytes per second and direction.
        hop_seconds: Of the slowest link.
    """
    messages = 2 * (count - 1)
    return messages * (size / count / bandwidth + hop_seconds)


def exposed_seconds(exchange: float, backward: float, buckets: int) -> float:
    """Return how long an exchange goes on after the backward pass that it runs beside.

    Bucket i of n can be sent once i / n of the backward pass is done and the bucket before it has
    been sent. Either the last bucket alone is left in the end, or, where sending takes longer than
    computing, all of them but what fitted beside the pass after the first bucket was full.

    Args:
        exchange: Seconds of the exchange by itself.
        backward: Seconds of the backward pass.
        buckets: Equal ones.
    """
    return max(exchange / buckets, exchange - backward * (buckets - 1) / buckets)


def predict(given: Assumptions, gpus: int, images: int, network: Link) -> Prediction:
    """Return what a step takes.

    Args:
        given: The assumptions.
        gpus: That divide the step, whole nodes where there are more than one.
        images: Of the step, in all, each in four turns.
        network: Between nodes, one adapter's.

    Raises:
        ValueError: If the images cannot be divided so.
    """
    if images % gpus:
        raise ValueError(f"The images of a step, {images}, must be divisible by {gpus} GPUs.")
    samples = images * NUM_ROTATIONS
    arithmetic = samples / gpus / given.samples_per_second
    bandwidth, hop = NVLINK.bytes_per_second, NVLINK.hop_seconds
    if gpus > given.gpus_per_node:
        # The ring enters and leaves each node once: its pace is that of the network.
        bandwidth = min(bandwidth, given.adapters * network.bytes_per_second)
        hop = max(hop, network.hop_seconds)
    exchange = given.buckets * ring_seconds(
        given.gradient_bytes / given.buckets, gpus, given.link_share * bandwidth, hop
    )
    exposed = exposed_seconds(exchange, BACKWARD * arithmetic, given.buckets)
    compute = arithmetic + given.step_seconds
    return Prediction(
        gpus=gpus,
        samples=samples,
        compute_seconds=compute,
        exchange_seconds=exchange,
        exposed_seconds=exposed,
        efficiency=arithmetic / (compute + exposed),
        efficiency_without_overlap=arithmetic / (compute + exchange),
    )
