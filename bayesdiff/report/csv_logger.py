"""Curves as a CSV file that a training which is taken up again goes on with."""

import csv
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import csv_logs


class CSVLogger(csv_logs.CSVLogger):
    """Lightning's, which deletes the file of an earlier process; here the curve goes on.

    Args:
        keep: whether to keep the steps before the first one that is logged; a report is whole and
            replaces an earlier one.
        **options: of Lightning's logger.

    Example:
        >>> import tempfile
        >>> logger = CSVLogger(tempfile.mkdtemp())
        >>> for step, loss in enumerate([2.0, 1.0, 0.5]):
        ...     logger.log_metrics({"loss": loss}, step)
        >>> logger.save()
        >>> with open(f"{logger.log_dir}/metrics.csv") as file:
        ...     file.read().splitlines()
        ['loss,step', '2.0,0', '1.0,1', '0.5,2']
    """

    def __init__(self, save_dir: Any, keep: bool = True, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self._keep = keep

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            kind = _Continued if self._keep else _Replaced
            self._experiment = kind(log_dir=self.log_dir)
        return self._experiment


class _Replaced(csv_logs.ExperimentWriter):
    """Begins anew, without a warning: whoever asks for it has the whole report."""

    def _check_log_dir_exists(self) -> None:
        if self._fs.isfile(self.metrics_file_path):
            self._fs.rm_file(self.metrics_file_path)


class _Continued(csv_logs.ExperimentWriter):
    """Keeps what is there, up to the step that it goes on with."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir)
        self._began = False

    def _check_log_dir_exists(self) -> None:
        pass

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        if not self._began and step is not None:
            self._began = True
            self._cut(step)
        super().log_metrics(metrics_dict, step)

    def _cut(self, step: int) -> None:
        """Drop rows that are about to come again, and take up the columns."""
        if not self._fs.isfile(self.metrics_file_path):
            return
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if _step(row) < step]
            self.metrics_keys = list(reader.fieldnames or ())
        with self._fs.open(self.metrics_file_path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def _step(row: dict[str, str]) -> float:
    """Of a row; infinite where it was cut while it was written."""
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")
