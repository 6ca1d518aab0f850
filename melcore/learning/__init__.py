"""Losses for training and metrics for judging images (torch only)."""

from melcore.learning.losses import ReconstructionLoss, relative_l1, relative_l2, relative_root
from melcore.learning.metrics import decibels, hfen, nrmse, object_region, psnr, ssim, ssim_map

__all__ = [
    "ReconstructionLoss",
    "decibels",
    "hfen",
    "nrmse",
    "object_region",
    "psnr",
    "relative_l1",
    "relative_l2",
    "relative_root",
    "ssim",
    "ssim_map",
]
