"""Logarithmic loss from logits, and the same relative to predicting the base rate."""
from __future__ import annotations

import numpy as np

from .auc import checked


def logloss(label, logit) -> float:
    """Mean -ln of the probability given to the true class, in nats: label [N] in {0, 1}, logit [N].

    Computed in float64 from the logits, so no probability is clipped. Raises as :func:`ecstudy.measure.auc`,
    except that one class is enough.
    """
    label, logit = checked(label, logit)
    return float(np.logaddexp(0, np.where(label, -logit, logit), dtype=np.float64).mean())


def normalised_entropy(label, logit, base_rate: float | None = None) -> float:
    """Log loss over that of always predicting ``base_rate``; 1 is useless, lower is better (He et al., ADKDD 2014).

    ``base_rate`` is the mean of the labels unless given (for example that of the training rows).
    Raises ValueError if it is not strictly between 0 and 1, and as :func:`logloss`.
    """
    label, logit = checked(label, logit)
    mean = label.mean()
    rate = mean if base_rate is None else base_rate
    if not 0 < rate < 1:
        raise ValueError(f"base rate {rate}, expected strictly between 0 and 1: give both classes or base_rate=")
    return logloss(label, logit) / float(-mean * np.log(rate) - (1 - mean) * np.log1p(-rate))
