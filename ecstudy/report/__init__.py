"""Figures, tables and pages from rows. ``from ecstudy import report`` and call one function per figure."""
from __future__ import annotations

from .datasets import dataset
from .explorer import explorer
from .figures import auc_against_bytes, costs, frequency, timeline
from .impact import (ablation, ablation_questions, ablation_table, allocation, allocation_fields,
                     dimension_gains, dimensions, latency_against_bytes, models, rank_agreement)
from .in_training import choices, drift, kept_chunks, ladder, progressive, stream_costs, stream_table, training_memory
from .picture import Html, Picture, Table
from .retrieval import (best_compressors, corpus_size, each, order_gains, quality, recall_curves,
                        retrieval_cells, retrieval_costs, retrieval_skew, split_gains, table6)
from .significance import contrasts_table, critical_difference, equivalence, learning_rates
from .stamp import mark, stamp
from .summary import cells, t_interval
from .tables import beside_paper, paper_table5, ran, table5

__all__ = ["Html", "Picture", "Table", "ablation", "ablation_questions", "ablation_table", "allocation",
           "allocation_fields", "auc_against_bytes", "beside_paper", "best_compressors", "cells", "choices",
           "contrasts_table", "corpus_size", "costs", "critical_difference", "dataset", "dimension_gains",
           "dimensions", "drift", "each", "equivalence", "explorer", "frequency", "kept_chunks", "ladder",
           "latency_against_bytes", "learning_rates", "mark", "models", "order_gains", "paper_table5",
           "progressive", "quality", "ran", "rank_agreement", "recall_curves", "retrieval_cells", "retrieval_costs",
           "retrieval_skew", "split_gains", "stamp", "stream_costs", "stream_table", "t_interval", "table5", "table6",
           "timeline", "training_memory"]
