"""How long to wait before the next try: exponential with full jitter's lower half kept.

After "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015), the "equal jitter" form.
"""

import random


def delay(failures: int, base: float, cap: float, rng: random.Random | None = None) -> float:
    """Seconds to wait after failure number `failures` (from 1): half of min(cap, base·2^(n-1)), up to all of it."""
    ceiling = min(cap, base * 2.0 ** min(failures - 1, 60))
    return ceiling / 2 + (rng or random.SystemRandom()).uniform(0, ceiling / 2)
