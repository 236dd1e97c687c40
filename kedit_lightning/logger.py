"""TensorBoard over a stream of fits."""

from __future__ import annotations

from lightning.pytorch.loggers import TensorBoardLogger


class EditLogger(TensorBoardLogger):
    """TensorBoard over the whole stream: one event file, although every pass is a fit of its own."""

    def save(self) -> None:
        """Nothing beside the events: config.yaml holds the configuration."""

    def finalize(self, status: str) -> None:
        """Flush, and leave the file open for the next fit."""
        del status
        self.experiment.flush()

    def close(self) -> None:
        """The stream is over."""
        if self._experiment is not None:
            self.experiment.close()
