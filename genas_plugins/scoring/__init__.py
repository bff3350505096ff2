"""What is measured on one architecture: flatness, angle, accuracy and their combinations."""

from genas_plugins.scoring.accuracy import Accuracy, accuracy
from genas_plugins.scoring.angle import angle, parameter_angle
from genas_plugins.scoring.batchnorm import recalibrate_batchnorm
from genas_plugins.scoring.combined import METRICS, CombinedScore, Measurement
from genas_plugins.scoring.errors import MeasurementError
from genas_plugins.scoring.flatness import Flatness, flatness, flatness_from_losses, mean_loss
from genas_plugins.scoring.hessian import Eigenpairs, top_eigenvectors
from genas_plugins.scoring.neighbourhood import NeighbourhoodScore
from genas_plugins.scoring.noise import CommonNoise
from genas_plugins.scoring.perturbation import Perturbation, Recalibration

__all__ = [
    "METRICS",
    "Accuracy",
    "CombinedScore",
    "CommonNoise",
    "Eigenpairs",
    "Flatness",
    "Measurement",
    "MeasurementError",
    "NeighbourhoodScore",
    "Perturbation",
    "Recalibration",
    "accuracy",
    "angle",
    "flatness",
    "flatness_from_losses",
    "mean_loss",
    "parameter_angle",
    "recalibrate_batchnorm",
    "top_eigenvectors",
]
