"""The table of a batch of samples, as the job that asks for it sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from synthaug.records import SAMPLES_FILE, SampleBatch

if TYPE_CHECKING:
    import pandas as pd


def read_samples(batch: SampleBatch, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows of samples.parquet that are part of the batch, under the labels of the job, in order of row.

    `row` still points into images.npy, which holds what was drawn, whatever of it is kept.

    Args:
        batch: See `synthaug.records.SampleBatch`, which has the columns.
        columns: Those to read, `label` among them; None: all.
    """
    import pandas as pd

    table = pd.read_parquet(batch.directory / SAMPLES_FILE, columns=None if columns is None else list(columns))
    if batch.labels is None:
        return table
    kept = table[table["label"].isin(list(batch.labels))]
    return kept.assign(label=kept["label"].map(batch.labels).astype("int64")).reset_index(drop=True)
