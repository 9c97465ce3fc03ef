"""Tied weights that an adapter changes apart: the merged model has them as two."""

from lorakit.errors import UserError
from lorakit.merge.apply_delta import Folding, WeightDelta, is_same
from lorakit.model.state_dict import Weights, untied


def weights_to_write(weights: Weights, folding: Folding) -> Weights:
    """The weights that the merged files hold: those of the base, untied where the adapter changes one end of a tied
    weight, or each in another way.

    Raises:
        UserError: the adapter changes what the base does not have, or ends that cannot be apart.
    """
    folds = folding.folds
    apart = [path for path in weights.tied_paths() if _differs(weights, folds, path)]
    target = untied(weights) if apart else weights
    known = {also for path in target.paths() for also in (path, *target.tied_to(path))}
    strange = min(folds.keys() - known, default=None)
    if strange:
        raise UserError(f"adapter: changes {strange}, which the base does not have. A merged model cannot hold it.")
    return target


def _differs(weights: Weights, folds: dict[str, WeightDelta], path: str) -> bool:
    return any(not is_same(folds.get(path), folds.get(other)) for other in weights.tied_to(path))
