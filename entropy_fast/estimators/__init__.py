"""The statistics of an entropy change, as pure functions of scores: no model, no files, float64 on the scores' device.

`PairedScores` holds the data, `entropy_change` estimates, `diagnose` looks for what is wrong with the data, and `judge`
says in words whether the number can be believed.
"""

from entropy_fast.estimators.change import EntropyChange, entropy_change
from entropy_fast.estimators.diagnostics import Diagnostics, Endings, SamplerGap, diagnose
from entropy_fast.estimators.first_order import FirstOrder, first_order
from entropy_fast.estimators.noise import NoiseFloor, noise_floor
from entropy_fast.estimators.paired import PairedScores, TokenScores
from entropy_fast.estimators.response import ResponseFit, fit_response
from entropy_fast.estimators.verdict import Finding, Thresholds, Verdict, judge

__all__ = [
    "Diagnostics",
    "Endings",
    "EntropyChange",
    "Finding",
    "FirstOrder",
    "NoiseFloor",
    "PairedScores",
    "ResponseFit",
    "SamplerGap",
    "Thresholds",
    "TokenScores",
    "Verdict",
    "diagnose",
    "entropy_change",
    "first_order",
    "fit_response",
    "judge",
    "noise_floor",
]
