"""What estimators that follow the variance of every value of a state alone have in common."""

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.uncertainty.estimator import Estimator


class ValueByValue(Estimator):
    """Refuses states whose values say nothing one by one."""

    def check_data(self, data: ImageData) -> None:
        """Refuse states that are decoded, see ``check_decoded``."""
        super().check_data(data)
        if data.space.decoded:
            self.check_decoded()

    def check_decoded(self) -> None:
        """Refuse states that are decoded.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"uncertainty={self.name} follows the variance of every value of a state alone, "
            "which says nothing of decoded pixels; use uncertainty=ensemble or linearised"
        )
