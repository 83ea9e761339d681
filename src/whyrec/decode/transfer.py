"""To a device without waiting for it."""

import torch
from torch import Tensor


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device.

    A plain copy to a GPU waits until all is done that the GPU was asked for before, and then the
    GPU waits for the host. From pinned memory the copy stands in the queue like anything else.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
