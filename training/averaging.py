"""An average of the weights over the steps, which is steadier than the weights of any one step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of the weights that are trained.

    In the first steps it forgets faster, or it would be made of the random first weights for long:
    after step t (from 0) the decay is at most (1 + t) / (10 + t), as in TensorFlow's
    `ExponentialMovingAverage`.

    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992;
        Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017,
        https://arxiv.org/abs/1703.01780, for the exponential form.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            network: On its final device; what is frozen now stays out for good.
            decay: Share of the average that each step keeps, in (0, 1).
        """
        self._decay = decay
        self._live = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, numbered from 0; does not wait for the device."""
        decay = min(self._decay, (1 + step) / (10 + step))
        average: list[Tensor] = list(self._average.values())
        live: list[Tensor] = list(self._live.values())
        torch._foreach_lerp_(average, live, 1 - decay)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the averaged weights by name; they go on changing."""
        return self._average

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        for name, tensor in self._average.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the network the averaged weights for the `with` block, and its own back after it."""
        own = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        self.put_in_place()
        try:
            yield
        finally:
            _copy(own, self._live)

    def put_in_place(self) -> None:
        """Give the network the averaged weights for good."""
        _copy(self._average, self._live)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
