"""What the files of a report must look like, see `tetdeploy.storage.form`."""

from __future__ import annotations

from tetdeploy.storage.form import AMOUNT, COUNT, FRACTION, NUMBER, STEP

_ROW = {
    "T!": STEP,
    "accuracy": FRACTION,
    "firing_rate": FRACTION,
    "ac_ops": AMOUNT,
    "mac_ops": AMOUNT,
    "energy_pj": AMOUNT,
    "energy_exact_pj": AMOUNT,
    "energy_once_pj": AMOUNT,
    "ann_ratio": AMOUNT,
    "latency_ms": AMOUNT,
    "torch_latency_ms": AMOUNT,
    "torch_accuracy": FRACTION,
    "top1_agreement": FRACTION,
    "spike_mismatch_rate": FRACTION,
    "local_mismatch_rate": FRACTION,
    "spike_count_error": FRACTION,
    "max_abs_logit_error": AMOUNT,
    "input_rate": FRACTION,
}
_COST = {"energy_pj!": AMOUNT, "energy_exact_pj!": AMOUNT, "energy_once_pj!": AMOUNT}
_EARLY_EXIT = {
    "criterion!": str,
    "threshold!": NUMBER,
    "min_T!": STEP,
    "confident": bool,
    "calibrated_on": bool,
    "T!": STEP,
    "accuracy!": FRACTION,
    "fixed_accuracy!": FRACTION,
    "lost!": AMOUNT,
    "gained!": AMOUNT,
    "loss!": NUMBER,
    "loss_95!": NUMBER,
    "mean_T!": AMOUNT,
    "by_steps!": [{"T!": STEP, "num_images!": AMOUNT}],
    "cost!": _COST,
    "fixed_cost!": _COST,
    "seconds!": AMOUNT,
    "fixed_seconds!": AMOUNT,
    "speedup!": AMOUNT,
}
_TIMES = ("median_ms!", "p95_ms!", "p99_ms!", "images_per_s!")
_MACHINE = {"cpu!": str, "cores!": STEP, "gpu": str, "provider!": str}
RESULT = {
    "model!": str,
    "data!": str,
    "num_samples!": STEP,
    "rows!": [_ROW],
    "model_sha256": str,
    "checkpoint_sha256": str,
    "images_sha256": str,
    "trained_on": bool,
    "trained_T": STEP,
    "layout": str,
    "encoding": str,
    "input_dtype": str,
    "device": str,
    "runtime": str,
    "created": str,
    "versions": {"*": str},
    "layers": [{"name!": str, "rows!": [_ROW], "fan_out": AMOUNT, "weights": AMOUNT, "precision": str}],
    "neurons": [
        {
            "name!": str,
            "rows!": [_ROW],
            "size": AMOUNT,
            "spike_mismatch_rate": FRACTION,
            "local_mismatch_rate": FRACTION,
            "margin": {"*": {"median": NUMBER, "max": NUMBER}},
        }
    ],
    "uncounted": [str],
    "ann": {"energy_pj": AMOUNT, "mac_ops": AMOUNT},
    "other_ops": {"*": AMOUNT},
    "other_ops_pj": {"*": AMOUNT},
    "constants": {"ac_pj!": AMOUNT, "mac_pj!": AMOUNT, "source!": str, "by_layer": str},
    "by_class": [{"name!": str, "num_samples!": AMOUNT, "accuracy!": [FRACTION]}],
    "early_exit": _EARLY_EXIT,
    "machine": _MACHINE,
    "agreement": {"with": str, "num_images": AMOUNT, "data": str},
    "gates": [
        {"key!": str, "T!": STEP, "wanted!": NUMBER, "at_most": bool, "unit": str, "got": NUMBER, "passed!": bool}
    ],
}
BENCH = {
    "kind!": str,
    "model!": str,
    "rows!": [{**dict.fromkeys(("T!", "threads!", "batch!", "calls!"), STEP), **dict.fromkeys(_TIMES, AMOUNT)}],
    "machine!": _MACHINE,
    "model_sha256": str,
    "checkpoint_sha256": str,
    "device": str,
    "runtime": str,
}
RUN = {
    "network!": {"model": str, "ann": bool},
    "data!": {"name": str, "image_shape": [NUMBER], "train_images": AMOUNT, "val_images": AMOUNT},
    "training!": {"T": STEP, "tit": str, "loss": str, "epochs": STEP},
    "restarted": {"epoch": COUNT},
}
SUMMARY = {
    "mean_val_accuracy": FRACTION,
    "std_val_accuracy": FRACTION,
    "num_finished": AMOUNT,
    "runs": [{"seed": NUMBER, "interrupted": bool, "best_epoch": NUMBER, "val_accuracy": FRACTION}],
}
