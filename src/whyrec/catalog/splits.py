"""Which events train, which validate and which test; codes index `dataset.SPLITS`.

* leave-one-out: a user's last event is test, the one before it valid, the rest train; users with
  fewer than three events only train.
* temporal: of all events in order of time the first 80 % train, the next 10 % are valid, the last
  10 % test. A valid or test event with nothing before it in its user's history cannot be predicted
  from that history: it is "none", which only serves as history of later events.
"""

import numpy as np

from whyrec.catalog.dataset import SPLITS

RULES = ("leave-one-out", "temporal")
_TRAIN, _VALID, _TEST, _NONE = range(len(SPLITS))


def leave_one_out(positions_E: np.ndarray, lengths_E: np.ndarray) -> np.ndarray:
    """int8 split codes [E].

    Args:
        positions_E: place of each event in its user's history, from 0.
        lengths_E: for each event the number of events of its user.
    """
    from_end_E = lengths_E - positions_E
    codes_E = np.full(len(positions_E), _TRAIN, np.int8)
    evaluated_E = lengths_E >= 3
    codes_E[evaluated_E & (from_end_E == 1)] = _TEST
    codes_E[evaluated_E & (from_end_E == 2)] = _VALID
    return codes_E


def temporal(positions_E: np.ndarray, time_ranks_E: np.ndarray) -> np.ndarray:
    """int8 split codes [E].

    Args:
        positions_E: place of each event in its user's history, from 0.
        time_ranks_E: place of each event among all events in order of time, from 0.
    """
    events = len(positions_E)
    valid_from, test_from = events * 8 // 10, events * 9 // 10
    codes_E = np.full(events, _TRAIN, np.int8)
    codes_E[time_ranks_E >= valid_from] = _VALID
    codes_E[time_ranks_E >= test_from] = _TEST
    codes_E[(codes_E != _TRAIN) & (positions_E == 0)] = _NONE
    return codes_E
