"""What is measured: ranking quality with its uncertainty, losses, latency and peak memory."""
from .auc import Diverged, Paired, auc, auc_interval, delong_paired
from .latency import Latency, measure_latency
from .loss import logloss, normalised_entropy
from .peak import Peak, peak

__all__ = ["Diverged", "Latency", "Paired", "Peak", "auc", "auc_interval", "delong_paired", "logloss",
           "measure_latency", "normalised_entropy", "peak"]
