"""Steps that would spoil the weights are skipped, and counted; many in a row end the run."""

import torch
from torch import Tensor

from training.errors import DivergedError


class StepGuard:
    """Tells steps whose loss or gradient is not finite, without making the host wait.

    The verdict stays on the device: `torch.optim`'s fused optimisers skip the update, and leave
    their state alone, where their `found_inf` is 1 (what gradient scaling for float16 is built
    on). The counts are read by `check`.
    """

    def __init__(self, device: torch.device, *, limit: int, skipped: int = 0) -> None:
        """Start after a step that was not skipped.

        Args:
            device: Where losses and norms lie.
            limit: Steps skipped in a row at which `check` raises.
            skipped: Steps skipped before, by earlier attempts.
        """
        self._limit = limit
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.tensor(skipped, device=device)

    def found_inf(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Return 1 where the step must be skipped, else 0; both count.

        Args:
            loss: Scalar.
            gradient_norm: Scalar, of all gradients together.

        Returns:
            Scalar, float32, on the device.
        """
        bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm))
        self._streak = (self._streak + 1) * bad
        self._longest = torch.maximum(self._longest, self._streak)
        self._skipped = self._skipped + bad
        return bad.float()

    def check(self, step: int, *, stage: str, section: str) -> None:
        """Raise if too many steps in a row were skipped. Waits for the device.

        Args:
            step: Steps taken so far, skipped ones included.
            stage: For the message.
            section: Name of the settings to change.

        Raises:
            DivergedError: With step and settings.
        """
        if int(self._longest) >= self._limit:
            raise DivergedError(
                f"The loss and the gradients must be finite; at step {step} of {stage} they have "
                f"not been for {int(self._longest)} steps in a row, which were skipped. The last "
                "good checkpoint is kept. Usual causes: a learning rate that is too high or a "
                f"warm-up that is too short. Lower {section}.base_lr, raise "
                f"{section}.warmup_epochs, or set {section}.clip_norm."
            )

    def last_was_skipped(self) -> bool:
        """Whether the newest step was skipped. Waits for the device."""
        return bool(self._streak)

    def skipped(self) -> int:
        """Steps skipped so far. Waits for the device."""
        return int(self._skipped)
