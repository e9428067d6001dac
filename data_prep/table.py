"""One's own click log, CSV, TSV or parquet::

    python data_prep/table.py log.csv --label clicked --categorical user,item,site --numeric price --time when \
        --out data/own

The place of the paper's private "Company" data: with ``--time`` rows are split in time order, 80/10/10.
"""
import sys

from ecstudy.data.prepare import prepare_table
from ecstudy.data.prepare_script import run

if __name__ == "__main__":
    sys.exit(run(prepare_table))
