"""Records as a suite would leave them, with made-up numbers. The fixtures are the functions that make them."""

from dataclasses import replace

import pytest

from results.record import Record

# label, family, params (M), MACs (G), latency (ms), top-1, mIoU
MODELS = [
    ("hivit_tiny", "HiViT", 18.7, 4.6, 61.0, 93.4, 58.1),
    ("hrvit_b1", "HRViT", 8.2, 2.7, 88.0, 92.1, 57.2),
    ("hrformer_small", "HRFormer", 13.5, 3.6, 121.0, 91.0, 55.9),
    ("hiri_vit_s", "HIRI-ViT", 34.8, 4.5, 75.0, 94.6, 59.4),
    ("deit_tiny_patch16", "DeiT", 5.7, 1.3, 22.0, 84.2, 41.3),
    ("swin_tiny_patch4_window7", "Swin", 28.3, 4.5, 70.0, 92.9, 56.8),
    ("mit_b0", "MiT", 3.7, 0.6, 25.0, 87.5, 49.9),
    ("pvt_v2_b1", "PVTv2", 14.0, 2.1, 48.0, 90.2, 53.3),
]
PROVENANCE = {
    "revision": "e767ae7",
    "command": "python runners/run.py suite=demo",
    "started": "2026-11-20T10:20:27+00:00",
    "seconds": 12.5,
    "versions": {"python": "3.11.7", "torch": "2.15.0", "timm": "1.0.31"},
    "hardware": {"name": "AMD EPYC 7763, 2 cores", "memory_gb": 8},
}
DATA = {"classification": "digit_scenes_classification@1", "segmentation": "digit_scenes_segmentation@1"}


def make_record(stage: str, task: str = "classification", model: str = "hivit_tiny", **changes) -> Record:
    """A done record; `changes` replace its fields."""
    head = "segformer" if task == "segmentation" else None
    seed = changes.get("seed", 0)
    trained = stage in ("train", "evaluate")
    job = {"stage": stage, "task": task, "label": model, "head": head, "num_classes": 11}
    if trained:
        job |= {"data": DATA[task], "seed": seed, "recipe": {"iterations": 100}}
    content = {
        "key": f"{stage}-{task[:3]}-{model}-{seed}",
        "status": "done",
        "stage": stage,
        "task": task,
        "model": model,
        "family": "HiViT",
        "head": head,
        "data": DATA[task] if trained else None,
        "input_size": [96, 96],
        "job": job,
        "provenance": PROVENANCE,
    }
    return Record(**content | changes)


def make_suite(models=MODELS, tasks=("classification", "segmentation"), seeds=(0,)) -> list[Record]:
    """All four stages of `models` (rows like `MODELS`) in both tasks."""
    records = []
    for task in tasks:
        factor = 1 if task == "classification" else 1.4
        for label, family, params, macs, latency, top1, miou in models:
            common = {"task": task, "model": label, "family": family}
            cost = {"params": round(params * 1e6 * factor), "macs": round(macs * 1e9 * factor)}
            cost["activations"] = round(macs * 3.1e6)
            details = {
                "operators": {"convolution": cost["macs"] // 3, "mm": cost["macs"] // 3 * 2},
                "uncounted": ["gelu"],
            }
            records.append(make_record("cost", metrics=cost, details=details, **common))
            ms = latency * factor
            speed = {"latency_ms": ms, "latency_ms_low": ms * 0.96, "latency_ms_high": ms * 1.07}
            speed |= {"throughput": 1000 / ms, "peak_memory_mb": 150 + 8 * params, "train_step_ms": 3.2 * ms}
            samples = {"latency_ms": [ms * (0.95 + 0.01 * i) for i in range(10)]}
            records.append(make_record("speed", metrics=speed, samples=samples, **common))
            for seed in seeds:
                train = {"final_loss": 0.31, "iterations": 300, "seconds": 41.0}
                records.append(make_record("train", seed=seed, metrics=train, **common))
                if task == "classification":
                    score = {"top1": top1 + 0.3 * seed, "top5": 99.0, "baseline_top1": 10.4}
                else:
                    score = {"mIoU": miou + 0.3 * seed, "mAcc": miou + 9, "aAcc": 95.0, "baseline_mIoU": 8.2}
                records.append(make_record("evaluate", seed=seed, metrics=score, **common))
    return records


@pytest.fixture
def record():
    return make_record


@pytest.fixture
def counted(record):
    """A cost record of `model` as a suite leaves it; the label in the suite is another name."""

    def make(model="mine_s", size=224, params=20.04e6, macs=4.5e9, head=None, **changes):
        job = {"model": model, "num_classes": changes.pop("classes", 1000), "model_config": changes.pop("config", {})}
        job["head_config"] = changes.pop("head_config", {})
        metrics = {"params": params, "macs": macs, "activations": 1} | changes.pop("metrics", {})
        task = "segmentation" if head else "classification"
        key = f"{model}-{size}-{head}-{len(str(changes))}"
        content = {"key": key, "metrics": metrics, "head": head, "input_size": [size, size], "job": job}
        return record("cost", task, f"{model} of the suite", **(content | changes))

    return make


@pytest.fixture
def suite():
    return make_suite


@pytest.fixture(scope="session")
def ragged_suite():
    """A suite in which something of every kind went wrong: failed, blocked, not run, not measured."""
    return make_ragged_suite()


def make_ragged_suite() -> list[Record]:
    records = []
    for record in make_suite():
        if record.model == "mit_b0" and record.stage == "speed" and record.task == "segmentation":
            continue
        if record.model == "hrvit_b1" and record.stage == "speed":
            record = replace(record, status="failed", reason="out of memory: needs 9.1 GB, 8 GB free", metrics={})
        if record.model == "swin_tiny_patch4_window7" and record.stage in ("train", "evaluate"):
            record = replace(record, status="blocked", reason="ADE20K was not found in data/ade20k", metrics={})
        records.append(record)
    return records
