"""What a training shows while it runs: TensorBoard, the progress bar, and a line for every validation."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from training.problem import Problem
from training.validation import Metrics, learned, live_channels, zero_filled

if TYPE_CHECKING:
    from training.trainer import Trainer


class Board:
    """TensorBoard's files; a full disk ends them, not the training.

    Parameters
    ----------
    folder
        Where they go.
    step
        What was written for later steps, by a session that was killed, is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = None
        self._do(lambda: self._open(folder, step))

    def _open(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number of a curve."""
        self._do(lambda: self._writer and self._writer.add_scalar(name, value, step))

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """One image ``(1, y, x)`` between 0 and 1."""
        self._do(lambda: self._writer and self._writer.add_image(name, image, step))

    def close(self) -> None:
        """Write what is pending."""
        self._do(lambda: self._writer and self._writer.close())

    def _do(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # the writer's own thread hands on whatever it met
            self._writer = None
            reason = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"mel fit: TensorBoard's files cannot be written any more: {reason}", sys.stderr)


def observe(trainer: "Trainer", board: Board, bar: "tqdm[Any]") -> None:
    """Let a trainer report to TensorBoard and the progress bar."""
    smooth: dict[str, float] = {}

    def report(step: int, figures: dict[str, float]) -> None:
        loss = smooth["loss"] = 0.98 * smooth.get("loss", figures["loss"]) + 0.02 * figures["loss"]
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
        if step % 10 == 0:
            for name, value in figures.items():
                board.scalar(f"training/{name}", value, step)

    def on_validation(step: int, metrics: Metrics) -> None:
        for name, values in metrics.items():
            for key, value in values.items():
                board.scalar(f"validation/{key}/{name}", value, step)
        problem = next(trainer.objective.problems(trainer.validation))
        alive = live_channels(trainer.model, problem)
        if alive is not None:
            board.scalar("training/live_channels", alive, step)
            if alive < 0.5:
                bar.write(
                    f"step {step}: only {alive:.0%} of the channels are alive: lower the learning rate", sys.stderr
                )
        board.image(_PANELS[problem.target is None], _panels(trainer, problem), step)
        words = ", ".join(
            f"{_LABELS[name]} {_UNITS[name].format(metrics['learned'][name])} (CG-SENSE "
            f"{_UNITS[name].format(metrics['cg_sense'][name])})"
            for name in metrics["learned"]
            if name in _LABELS
        )
        live = "unknown" if alive is None else f"{alive:.0%}"
        bar.write(f"step {step}: loss {smooth.get('loss', 0):.4f}, {words}, live channels {live}", sys.stderr)

    trainer.report, trainer.on_validation = report, on_validation


_LABELS = {"nrmse_db": "validation NRMSE", "ssim": "SSIM", "held_out_db": "error of held-out samples"}
_UNITS = {"nrmse_db": "{:.2f} dB", "ssim": "{:.4f}", "held_out_db": "{:.2f} dB"}
_PANELS = (
    "validation/truth, zero-filled, learned, error x 5",
    "validation/CG-SENSE, zero-filled, learned, difference x 5",
)


@torch.no_grad()
def _panels(trainer: "Trainer", problem: Problem) -> torch.Tensor:
    first = problem.cg_sense() if problem.target is None else problem.target
    shown = [first, zero_filled(problem), learned(trainer.model)(problem)]
    error = 5 * (shown[2] - shown[0]).abs()
    return torch.cat([_slice(image) for image in (*shown, error)], dim=1).clamp(max=1)[None]


def _slice(image: torch.Tensor) -> torch.Tensor:
    """Middle frame and slice of the magnitude of the first example, ``(y, x)``."""
    frame = image[0, 0, image.shape[2] // 2].abs().cpu()
    return frame[frame.shape[0] // 2]


def table(metrics: Metrics) -> str:
    """All methods and their metrics, for reading."""
    keys = list(metrics["learned"])
    heads = {"nrmse_db": "NRMSE dB", "psnr_db": "PSNR dB", "ssim": "SSIM", "held_out_db": "held-out dB"}
    lines = [f"{'':12}" + "".join(f"{heads.get(key, key):>12}" for key in keys)]
    for name, values in metrics.items():
        lines.append(
            f"{name:12}" + "".join(f"{values[key]:12.4f}" if key == "ssim" else f"{values[key]:12.2f}" for key in keys)
        )
    return "\n".join(lines)
