"""The noise schedule."""

import numpy as np

STEPS = 1000


def cosine_schedule(steps: int = STEPS) -> np.ndarray:
    """Share of the signal's variance at each timestep, [steps], from Nichol and Dhariwal (2021)."""
    times = (np.arange(steps + 1) / steps + 0.008) / 1.008
    alpha_bar = np.cos(times * np.pi / 2) ** 2
    beta = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return np.cumprod(1 - beta).astype(np.float32)


ALPHA_BAR = cosine_schedule()
