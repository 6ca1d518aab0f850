"""Losses for training and metrics for judging images (torch only)."""

from melcore.learning.losses import ReconstructionLoss, relative_l1, relative_l2
from melcore.learning.metrics import decibels, nrmse, psnr, ssim, ssim_map

__all__ = ["ReconstructionLoss", "decibels", "nrmse", "psnr", "relative_l1", "relative_l2", "ssim", "ssim_map"]
