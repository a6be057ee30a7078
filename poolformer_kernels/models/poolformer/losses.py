"""The loss of a classifier, as transformers takes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration import PoolFormerConfig


def classification_loss(logits: Tensor, labels: Tensor, config: PoolFormerConfig) -> Tensor:
    """() in logits' dtype: mean squared error, cross-entropy or binary cross-entropy.

    config.problem_type None is inferred, each time anew: one label is a regression, integer labels
    are class indices (-100: ignored), others are multi-label targets.

    Args:
        logits: (B, num_labels).
        labels: (B) class indices; else (B, num_labels), or (B) if there is one label.

    Raises:
        ValueError: no classifier, or labels of another shape.
        TypeError: labels of a dtype that the problem cannot have.

    Source: transformers, loss/loss_utils.py, ForSequenceClassificationLoss.
    """
    num_labels, problem = config.num_labels, config.problem_type
    if num_labels == 0:
        raise ValueError(
            "labels were given, but num_labels is 0: there is no classifier to take a loss of. "
            "Call reset_classifier(num_labels) first."
        )
    if problem is None:
        if num_labels == 1:
            problem = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            problem = "single_label_classification"
        else:
            problem = "multi_label_classification"
    labels = labels.to(logits.device)
    if problem == "single_label_classification":
        _check(
            labels, problem, (logits.shape[0],), labels.dtype in (torch.int64, torch.int32), "ints"
        )
        return F.cross_entropy(logits, labels.view(-1).long())
    if problem == "multi_label_classification":
        _check(labels, problem, tuple(logits.shape), labels.is_floating_point(), "floating point")
        return F.binary_cross_entropy_with_logits(logits, labels)
    shape = (logits.shape[0],) if num_labels == 1 else tuple(logits.shape)
    _check(labels, problem, shape, not labels.is_complex(), "real")
    return F.mse_loss(logits.view(shape), labels.view(shape))


def _check(labels: Tensor, problem: str, shape: tuple[int, ...], fits: bool, needed: str) -> None:
    if tuple(labels.shape) not in (shape, shape if len(shape) > 1 else (*shape, 1)):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; {problem} needs {shape}. Pass others, or "
            "set config.problem_type."
        )
    if not fits:
        raise TypeError(
            f"labels are {labels.dtype}; {problem} needs {needed}. Convert them, or set "
            "config.problem_type."
        )
