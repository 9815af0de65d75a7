"""A threshold that may be changed after training."""

from __future__ import annotations

from moadapt.errors import ConfigError


class Thresholded:
    """Mixin of the routers with a threshold in [0, 1): what is kept is decided with it in every pass."""

    _threshold: float

    @property
    def threshold(self) -> float:
        """See the option of that name; may be set at any time.

        Raises:
            ConfigError: a value outside of [0, 1).
        """
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"threshold: {value} is not in [0, 1); choose one there")
        self._threshold = value
