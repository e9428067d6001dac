"""Figures, tables and pages from rows. ``from ecstudy import report`` and call one function per figure."""
from __future__ import annotations

from .figures import auc_against_bytes, costs, frequency, timeline
from .picture import Html, Picture, Table
from .significance import contrasts_table, critical_difference, equivalence, learning_rates
from .stamp import mark, stamp
from .summary import cells, t_interval
from .tables import beside_paper, paper_table5, ran, table5

__all__ = ["Html", "Picture", "Table", "auc_against_bytes", "beside_paper", "cells", "contrasts_table", "costs",
           "critical_difference", "equivalence", "frequency", "learning_rates", "mark", "paper_table5", "ran", "stamp",
           "t_interval", "table5", "timeline"]
