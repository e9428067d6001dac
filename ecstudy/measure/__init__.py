"""What is measured: ranking quality with its uncertainty, losses, latency and peak memory."""
from .allocation import allocation
from .auc import Diverged, Paired, auc, auc_interval, components, delong_covariance, delong_paired, paired
from .latency import Latency, measure_latency
from .loss import logloss, normalised_entropy
from .peak import Peak, peak

__all__ = ["Diverged", "Latency", "Paired", "Peak", "allocation", "auc", "auc_interval", "components",
           "delong_covariance", "delong_paired", "logloss", "measure_latency", "normalised_entropy", "paired", "peak"]
