"""What a bundle says about its training: what it really was trained on, how long, and what it reached."""

import datetime
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from melcore import __version__
from training.config import Config
from training.sources import Source
from training.trainer import Trainer
from training.validation import Metrics

_IMAGES = (
    "means over the validation examples, in the support of the maps: complex NRMSE and PSNR in dB, SSIM of the "
    "magnitude; start is the image that the network begins from"
)
_SAMPLES = "mean error, in dB, of samples that were held out of the validation data"
_TARGET = "fully sampled coil images, combined with the maps that were estimated from the data"
_NO_TARGET = "none: samples that were held out of undersampled data (SSDU)"


def make_card(config: Config, trainer: Trainer, metrics: Metrics) -> dict[str, Any]:
    """The card of a trainer's result; JSON types only."""
    supervised = config.loss.self_supervised is None
    settings = config.training
    return {
        "name": config.name,
        "notes": config.output.notes,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data": describe_data(config, trainer),
        "seed": {"data": config.data.seed, "training": settings.seed},
        "steps": trainer.step,
        "batch": settings.batch,
        "processes": trainer.team.size,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "precision": settings.precision,
        "ema": settings.ema,
        "memory": None if trainer.memory is None else trainer.memory.to_dict(),
        "machine": describe_machine(trainer.device),
        "seconds": round(trainer.seconds),
        "hours": round(trainer.seconds / 3600, 3),
        "repeatable": settings.max_hours is None,
        "began_from": trainer.origin,
        "metrics": {name: {key: round(value, 4) for key, value in m.items()} for name, m in metrics.items()},
        "metrics_meaning": _IMAGES if supervised else _SAMPLES,
        "target": _TARGET if supervised else _NO_TARGET,
        "versions": {"melcore": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "config": _without_folders(config.to_dict()),
    }


def describe_data(config: Config, trainer: Trainer) -> dict[str, Any]:
    """Sources with their shares, subjects, licences and origins, and the ranges that examples were drawn from."""
    settings = config.data
    mixture = getattr(trainer.examples, "mixture", None)
    sources = () if mixture is None else mixture.sources
    total = sum(source.weight for source in sources)
    ranges = settings.model_dump(mode="json", exclude={"sources", "seed", "workers", "ahead", "validation"})
    return {
        "dimensions": settings.dimensions,
        "examples": trainer.step * config.training.batch,
        "validation": settings.validation,
        "sources": [_describe(source, source.weight / total) for source in sources],
        "simulated_share": sum((source.weight / total for source in sources if source.folder is None), start=0.0),
        "ranges": ranges,
    }


def _describe(source: Source, share: float) -> dict[str, Any]:
    if source.folder is None:
        return {"name": "simulation", "share": round(share, 4)}
    return {
        "name": Path(source.folder.path).resolve().name,
        "share": round(share, 4),
        "subjects": len({entry.subject for entry in source.entries}),
        "kinds": dict(Counter(entry.kind for entry in source.entries)),
        "licences": sorted({entry.licence for entry in source.entries if entry.licence}),
        "origins": sorted({entry.origin for entry in source.entries if entry.origin}),
    }


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Bundles travel: folders are told by their last name alone, for others may tell whose data they hold."""
    for source in config["data"].get("sources", []):
        if source.get("folder"):
            source["folder"] = Path(source["folder"]).resolve().name
    return config


def describe_machine(device: torch.device) -> str:
    """Which processor, and how much of it."""
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{threads} of {os.cpu_count()} CPU cores ({model})"
