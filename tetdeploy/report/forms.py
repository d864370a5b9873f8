"""What the files of a report must look like, see `tetdeploy.form`."""

from __future__ import annotations

from tetdeploy.form import NUMBER, STEP

_ROW = {
    "T!": STEP,
    "accuracy": NUMBER,
    "firing_rate": NUMBER,
    "ac_ops": NUMBER,
    "mac_ops": NUMBER,
    "energy_pj": NUMBER,
    "energy_exact_pj": NUMBER,
    "energy_once_pj": NUMBER,
    "ann_ratio": NUMBER,
    "latency_ms": NUMBER,
    "torch_latency_ms": NUMBER,
    "torch_accuracy": NUMBER,
    "top1_agreement": NUMBER,
    "spike_mismatch_rate": NUMBER,
    "local_mismatch_rate": NUMBER,
    "spike_count_error": NUMBER,
    "max_abs_logit_error": NUMBER,
    "input_rate": NUMBER,
}
_COST = {"energy_pj!": NUMBER, "energy_exact_pj!": NUMBER, "energy_once_pj!": NUMBER}
_EARLY_EXIT = {
    "criterion!": str,
    "threshold!": NUMBER,
    "min_T!": STEP,
    "T!": STEP,
    "accuracy!": NUMBER,
    "fixed_accuracy!": NUMBER,
    "lost!": NUMBER,
    "gained!": NUMBER,
    "loss!": NUMBER,
    "loss_95!": NUMBER,
    "mean_T!": NUMBER,
    "by_steps!": [{"T!": STEP, "num_images!": NUMBER}],
    "cost!": _COST,
    "fixed_cost!": _COST,
    "seconds!": NUMBER,
    "fixed_seconds!": NUMBER,
    "speedup!": NUMBER,
}
RESULT = {
    "model!": str,
    "data!": str,
    "num_samples!": STEP,
    "rows!": [_ROW],
    "model_sha256": str,
    "checkpoint_sha256": str,
    "images_sha256": str,
    "trained_T": STEP,
    "layout": str,
    "device": str,
    "runtime": str,
    "created": str,
    "versions": {"*": str},
    "layers": [{"name!": str, "rows!": [_ROW], "fan_out": NUMBER, "weights": NUMBER}],
    "neurons": [
        {
            "name!": str,
            "rows!": [_ROW],
            "size": NUMBER,
            "spike_mismatch_rate": NUMBER,
            "local_mismatch_rate": NUMBER,
            "margin": {"*": {"median": NUMBER, "max": NUMBER}},
        }
    ],
    "uncounted": [str],
    "ann": {"energy_pj": NUMBER},
    "other_ops": {"*": NUMBER},
    "other_ops_pj": {"*": NUMBER},
    "constants": {"ac_pj!": NUMBER, "mac_pj!": NUMBER, "source!": str},
    "by_class": [{"name!": str, "num_samples!": NUMBER, "accuracy!": [NUMBER]}],
    "early_exit": _EARLY_EXIT,
    "agreement": {"with": str, "num_images": NUMBER, "data": str},
    "gates": [{"key!": str, "T!": STEP, "wanted!": NUMBER, "got": NUMBER, "passed!": bool}],
}
RUN = {
    "network!": {"model": str, "ann": bool},
    "data!": {"name": str, "image_shape": [NUMBER], "train_images": NUMBER, "val_images": NUMBER},
    "training!": {"T": STEP, "tit": str, "loss": str},
}
SUMMARY = {
    "mean_val_accuracy": NUMBER,
    "std_val_accuracy": NUMBER,
    "runs": [{"seed": NUMBER, "best_epoch": NUMBER, "val_accuracy": NUMBER}],
}
